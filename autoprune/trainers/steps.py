"""What a training step takes per layer, direction and kernel, measured; and the choice of what a layer is trained on.

A direction is the forward pass, the gradient of the input or that of the weight. Each is measured on torch's dense
kernels and on the sparse ones that can run it, at the batch, precision and threads of the training, maps included as
the training has them. The fastest of each direction are then measured together, as the layer's whole step with all that
calling them costs; a layer whose step they do not speed up by ``MARGIN`` stays as it is, at no cost.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.core.rundir import write_text
from autoprune.lut.context import current_context
from autoprune.trainers.execution import FrozenLayer, LayerRun, SparseForward

if TYPE_CHECKING:
    from autoprune.kernels.cpu.trained import Kernels

# Layer shape, choice and density → its rows.
StepTable = dict[str, list["StepRow"]]
Direction = Literal["forward", "input gradient", "weight gradient"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
STEP: Literal["step"] = "step"  # all directions, by autograd
MARGIN = 0.97  # of the dense time: what wins by less may as well lose
_ROUNDS, _SECONDS = 7, 0.4  # of one layer's kernels by turns: at most so many, but no further round after so long
_BLOCKS_OFFERED = 0.85  # share of kept blocks above which their kernel does nearly a dense layer's work


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The training that steps are measured for.

    Attributes:
        batch: Images that this process takes a step.
        half: Whether maps are bfloat16 (autocast), else float32.
        threads: That share a batch; None: torch's number.
    """

    batch: int
    half: bool = False
    threads: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the maps."""
        return torch.bfloat16 if self.half else torch.float32

    @property
    def key(self) -> str:
        """Short hash of all that a measurement depends on: machine, versions, batch, precision and threads."""
        context = current_context(self.batch, _threads(self), direction="training")
        context = context.model_copy(update={"dtype": str(self.dtype).removeprefix("torch."), "epilogue": "none"})
        return hashlib.sha256(context.model_dump_json().encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class StepRow:
    """Median microseconds of one direction of one layer on one kernel (``dense``, ``block``, ``csr``).

    Of a whole step: on dense kernels, and on the ``chosen`` ones.
    """

    layer: str
    direction: Direction | Literal["step"]
    kernel: str
    us: float


def decide_step(layer: str, rows: Sequence[StepRow]) -> LayerRun:
    """Return the fastest kernel of each direction; see the module.

    Args:
        layer: Its name.
        rows: Of this layer, a dense one for each direction among them, and of its whole step where measured.
    """
    kernels: dict[str, str] = {}
    parts: list[str] = []
    dense_us = chosen_us = 0.0
    for direction in DIRECTIONS:
        times = {row.kernel: row.us for row in rows if row.direction == direction}
        dense = times.pop("dense")
        name, us = min(times.items(), key=lambda item: item[1], default=("dense", dense))
        if us >= MARGIN * dense:
            others = "".join(f", {kernel} {value:.0f} us" for kernel, value in times.items())
            name, us = "dense", dense
            parts.append(f"{direction} dense {dense:.0f} us{others}")
        else:
            parts.append(f"{direction} {name} {us:.0f} us against {dense:.0f} us dense")
        kernels[direction] = name
        dense_us, chosen_us = dense_us + dense, chosen_us + us
    whole = {row.kernel: row.us for row in rows if row.direction == STEP}
    if whole:
        dense_us, chosen_us = whole["dense"], whole["chosen"]
    if chosen_us >= MARGIN * dense_us and any(kernel != "dense" for kernel in kernels.values()):
        kernels = dict.fromkeys(kernels, "dense")
        parts.insert(0, f"a whole step takes {chosen_us:.0f} us on sparse kernels against {dense_us:.0f} us")
    found = LayerRun(layer, kernels, "; ".join(parts), dense_us, chosen_us)
    if not found.sparse:
        return LayerRun(layer, kernels, f"dense because no sparse kernel is faster: {found.why}", dense_us, dense_us)
    share = f"{chosen_us / dense_us:.2f} of a dense step"
    return LayerRun(layer, kernels, f"sparse because it takes {share}: {found.why}", dense_us, chosen_us)


@dataclass(slots=True)
class StepChooser:
    """A session's chooser that measures each layer when its mask is final.

    What was measured is part of the session's state, so that a resumed training runs on the same kernels.

    Attributes:
        settings: Of the training.
        rows: Key of a layer's shape and mask → its rows; may be given from an earlier measurement.
        runs: What each layer is trained on, in the order of the decisions.
    """

    settings: StepSettings
    rows: StepTable = field(default_factory=dict)
    runs: dict[str, LayerRun] = field(default_factory=dict)

    def __call__(self, frozen: FrozenLayer) -> SparseForward | None:
        """Return the operator that is to run a layer, or None to leave it dense."""
        from autoprune.kernels.cpu.trained import refusal
        from autoprune.kernels.training import SparseConv

        reason = _refusal(frozen)
        if reason is None and frozen.spec is not None:
            reason = refusal(frozen.spec)
        if reason is not None or frozen.spec is None:
            dense = {str(direction): "dense" for direction in DIRECTIONS}
            self.runs[frozen.name] = LayerRun(frozen.name, dense, f"dense because {reason}")
            return None
        key = _key(frozen)
        if key not in self.rows:
            self.rows[key] = measure_step(frozen.spec, frozen.mask, self.settings)
        run = self.runs[frozen.name] = decide_step(frozen.name, self.rows[key])
        if not run.sparse:
            return None
        return SparseConv(frozen.spec, frozen.mask, chosen_kernels(run), _threads(self.settings))

    def explain(self) -> tuple[LayerRun, ...]:
        """Return what each layer is trained on, and why."""
        return tuple(self.runs.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, as plain values."""
        return plain(self.rows)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take ``state_dict``'s answer instead of measuring."""
        self.runs.clear()
        self.rows.update(_TABLE.validate_python(state))


_TABLE = TypeAdapter(StepTable)


def plain(table: StepTable) -> dict[str, Any]:
    """Return a table as plain values."""
    found: dict[str, Any] = _TABLE.dump_python(table, mode="json")
    return found


def load_steps(path: Path) -> StepTable:
    """Return a stored table; an empty one where there is none that can be read."""
    try:
        return _TABLE.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


def save_steps(path: Path, table: StepTable) -> None:
    """Store a table."""
    write_text(path, json.dumps(plain(table)))


def _refusal(frozen: FrozenLayer) -> str | None:
    if frozen.spec is None:
        return "the model could not be traced"
    if frozen.mask.device.type != "cpu":
        return f"no table of training steps on {frozen.mask.device.type} exists"
    if not tuple(frozen.module.weight.shape) == tuple(frozen.mask.shape) == frozen.spec.weight_shape:
        return "channels were taken out of it meanwhile"
    module = frozen.module
    if isinstance(module, torch.nn.Conv2d) and module.padding_mode != "zeros":
        return f"it pads by {module.padding_mode}"
    if type(module) not in (torch.nn.Conv2d, torch.nn.Linear):
        return f"its class {type(module).__name__} may compute something of its own"
    return None


def _key(frozen: FrozenLayer) -> str:
    assert frozen.spec is not None
    return f"{frozen.spec.signature} {frozen.choice.text} {float(frozen.mask.float().mean()):.4f}"


def _threads(settings: StepSettings) -> int:
    return settings.threads or torch.get_num_threads()


def measure_step(layer: LayerSpec, mask: Tensor, settings: StepSettings) -> list[StepRow]:
    """Return the rows of one layer under one mask.

    Args:
        layer: A convolution as traced; its one call is measured.
        mask: (K, C, R, S) boolean.
        settings: Batch, precision and threads.
    """
    generator = torch.Generator().manual_seed(0)
    x = _maps((settings.batch, layer.channels, *layer.input_hw), settings.dtype, generator)
    dy = _maps((settings.batch, layer.filters, *layer.output_hw), settings.dtype, generator)
    weight = torch.randn(layer.weight_shape, generator=generator) * mask
    cases = {("dense", name): run for name, run in _dense_cases(layer, x, dy, weight).items()}
    cases |= _sparse_cases(layer, mask, (x, dy, weight), settings)
    samples: dict[tuple[str, Direction], list[float]] = {case: [] for case in cases}
    began = time.perf_counter()
    for number in range(_ROUNDS + 1):
        for case, run in cases.items():
            before = time.perf_counter()
            run()
            if number > 0:  # the first one warms up
                samples[case].append(1e6 * (time.perf_counter() - before))
        if number > 1 and time.perf_counter() - began > _SECONDS:
            break
    rows = [StepRow(layer.name, name, kernel, float(np.median(us))) for (kernel, name), us in samples.items()]
    chosen = decide_step(layer.name, rows)
    return rows + (_whole_steps(layer, mask, (x, dy, weight), chosen, settings) if chosen.sparse else [])


def chosen_kernels(run: LayerRun) -> Kernels:
    """Return what a layer's operator is to be made of."""
    from autoprune.kernels.cpu.trained import Kernels

    chosen = (None if run.kernels[name] == "dense" else run.kernels[name] for name in DIRECTIONS)
    return Kernels(*chosen)  # type: ignore[arg-type]


def _whole_steps(
    layer: LayerSpec, mask: Tensor, tensors: tuple[Tensor, Tensor, Tensor], run: LayerRun, settings: StepSettings
) -> list[StepRow]:
    """Return the rows of a layer's whole step, on dense kernels and on those of ``run``."""
    from autoprune.kernels.training import SparseConv

    x, dy, weight = tensors
    # The weight's layout is that of a network in channels-last memory, in which dense convolutions are fastest.
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    x = x.detach().requires_grad_()
    sparse = SparseConv(layer, mask, chosen_kernels(run), _threads(settings))
    cases: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation),
        "chosen": lambda: sparse(x, weight, None),
    }
    samples: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(_ROUNDS + 1):
        for case, forward in cases.items():
            before = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.half):
                y = forward()
            torch.autograd.grad(y, (x, weight), dy)
            if number > 0:
                samples[case].append(1e6 * (time.perf_counter() - before))
    return [StepRow(layer.name, STEP, case, float(np.median(us))) for case, us in samples.items()]


def _maps(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)


Case = Callable[[], object]


def _dense_cases(layer: LayerSpec, x: Tensor, dy: Tensor, weight: Tensor) -> dict[Direction, Case]:
    weight = weight.contiguous(memory_format=torch.channels_last)
    shape = (list(layer.stride), list(layer.padding), list(layer.dilation))

    def backward(wants_x: bool, wants_weight: bool) -> object:
        # The weight's conversion is part of a step under autocast.
        found: object = torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), None, *shape, False, [0, 0], 1, [wants_x, wants_weight, False]
        )
        return found

    return {
        "forward": lambda: F.conv2d(x, weight.to(x.dtype), None, layer.stride, layer.padding, layer.dilation),
        "input gradient": lambda: backward(True, False),
        "weight gradient": lambda: backward(False, True),
    }


def _sparse_cases(
    layer: LayerSpec, mask: Tensor, tensors: tuple[Tensor, Tensor, Tensor], settings: StepSettings
) -> dict[tuple[str, Direction], Case]:
    from autoprune.kernels.cpu.trained import Kernels, TrainedConv

    x, dy, weight = tensors
    threads = _threads(settings)
    cases: dict[tuple[str, Direction], Case] = {}
    blocks = block_share(mask) <= _BLOCKS_OFFERED

    def offer(kernel: str, direction: Direction, kernels: Kernels, run: Callable[[TrainedConv], Case]) -> None:
        try:
            cases[kernel, direction] = run(TrainedConv(layer, mask, kernels, threads))
        except ModelError:  # no kernel makes this direction of this layer
            return

    forward: Callable[[TrainedConv], Case] = lambda conv: lambda: conv.forward(x, weight, settings.dtype)  # noqa: E731
    offer("csr", "forward", Kernels(forward="csr"), forward)
    gradient: Callable[[TrainedConv], Case] = lambda conv: lambda: conv.backward(dy, x, weight, False, True)  # noqa: E731
    offer("csr", "weight gradient", Kernels(weight_gradient="csr"), gradient)
    if blocks:
        offer("block", "forward", Kernels(forward="block"), forward)
        offer("block", "weight gradient", Kernels(weight_gradient="block"), gradient)
    offer(
        "csr", "input gradient", Kernels(input_gradient="csr"),
        lambda conv: lambda: conv.backward(dy, x, weight, True, False),
    )  # fmt: skip
    return cases


def block_share(mask: Tensor, filters: int = 16) -> float:
    """Return the share of blocks, ``filters`` neighbouring filters at one position, in which a mask keeps a weight."""
    flat = mask.flatten(1)
    padded = F.pad(flat, (0, 0, 0, -len(flat) % filters))
    return float(padded.reshape(-1, filters, flat.shape[1]).any(1).float().mean())
