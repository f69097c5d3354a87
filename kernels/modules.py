"""Modules that run compiled programs: a cache of programs by shape, and one layer on its own.

A model that cannot be one flat plan keeps its PyTorch code; each sparse layer in it is replaced by a ``ProgramLayer``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels import opaque
from autoprune.kernels.cpu.program import Epilogue, Program
from autoprune.kernels.plan import KernelName
from autoprune.kernels.plan_ops import padding_of

_KEPT_PROGRAMS = 4


class ProgramCache:
    """The few programs last used, by the shape of their input.

    Copies and pickles start empty: programs hold raw memory and are cheap to make again.

    Attributes:
        last: The program last used and its input shape: repeated calls find it without a search.
    """

    def __init__(self) -> None:
        self.last: tuple[torch.Size, Program] | None = None
        self._lock = threading.RLock()
        self._programs: OrderedDict[torch.Size, Program] = OrderedDict()

    def get(self, shape: torch.Size, make: Callable[[], Program]) -> Program:
        """Return the program for inputs of ``shape``, made if it is not kept."""
        with self._lock:
            program = self._programs.pop(shape, None) or make()
            self._programs[shape] = program
            while len(self._programs) > _KEPT_PROGRAMS:
                self._programs.popitem(last=False)
            self.last = (shape, program)
            return program

    def clear(self) -> None:
        """Drop every program; the next run makes a new one from the weights as they are then."""
        with self._lock:
            self.last = None
            self._programs.clear()

    def __reduce__(self) -> tuple[type[ProgramCache], tuple[()]]:
        return (ProgramCache, ())


class FrozenModule(nn.Module):
    """An inference-only module on the CPU in float32 whose programs follow its state."""

    def __init__(self) -> None:
        super().__init__()
        self.programs = ProgramCache()
        self._number = opaque.enlist(self)
        super().train(False)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = opaque.enlist(self)  # a copy is another module, with weights of its own

    def run_opaque(self, x: Tensor) -> Tensor:
        """Return the output; what ``torch.compile`` calls without looking inside."""
        raise ModelError(f"{type(self).__name__} cannot be compiled as one operation.")

    def output_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the output for an input of ``shape``."""
        raise ModelError(f"{type(self).__name__} cannot be compiled as one operation.")

    def train(self, mode: bool = True) -> FrozenModule:
        """Refuse training mode.

        Raises:
            ModelError: ``mode`` is true.
        """
        if mode:
            raise ModelError(
                "a deployed model cannot be trained: its weights are packed; train the PyTorch model (autoprune train) "
                "and convert it again."
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModule:
        probe = fn(torch.zeros(1))
        if probe.dtype != torch.float32 or probe.device.type != "cpu":
            raise ModelError(
                f"a deployed model runs in float32 on the CPU, got {probe.dtype} on {probe.device}; "
                "convert the model for that device instead of moving it."
            )
        self.programs.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, *args: object, **kwargs: object) -> object:
        """Load weights as ``nn.Module`` does; zeros decide anew what the sparse kernels skip."""
        self.programs.clear()
        return super().load_state_dict(*args, **kwargs)  # type: ignore[arg-type]


def check_input(x: Tensor) -> None:
    """Refuse an input no program takes.

    Raises:
        ModelError: It is not float32 or not on the CPU.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ModelError(
            f"a deployed model takes float32 inputs on the CPU, got {x.dtype} on {x.device}; "
            "call it with x.float().cpu()."
        )


@dataclass(frozen=True, slots=True)
class LayerKernel:
    """How one layer runs: kernel, block width in filters, threads."""

    kernel: KernelName
    block: int = 16
    threads: int = 1


def border_of(source: nn.Conv2d | nn.Linear) -> tuple[tuple[int, int, int, int], str] | None:
    """Return the border that is put around a convolution's input before its kernel runs, and what fills it.

    Kernels have zeros on all sides alike; unequal sides of padding 'same' and other modes are made beforehand.

    Returns:
        (left, right, top, bottom) and the mode of ``F.pad``; None where the kernel pads itself.
    """
    if not isinstance(source, nn.Conv2d) or (source.padding_mode == "zeros" and padding_of(source) is not None):
        return None
    left, right, top, bottom = (int(side) for side in source._reversed_padding_repeated_twice)
    return (left, right, top, bottom), "constant" if source.padding_mode == "zeros" else source.padding_mode


class ProgramLayer(FrozenModule):
    """One ``Conv2d`` or ``Linear`` on a sparse kernel; any batch and input size.

    Args:
        name: Dotted name in the model, for messages.
        source: The layer replaced; its weights are copied.
        layer: Its shape facts.
        how: Kernel to run.
    """

    def __init__(self, name: str, source: nn.Conv2d | nn.Linear, layer: LayerSpec, how: LayerKernel) -> None:
        super().__init__()
        self.name, self.layer, self.how = name, layer, how
        self._border = border_of(source)
        if self._border is not None:
            self.layer = replace(layer, padding=(0, 0))
        self.register_buffer("weight", source.weight.detach().clone())
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the shape PyTorch's own layer gives."""
        if torch.compiler.is_compiling():
            return opaque.run(x, self._number)
        return self.run_opaque(x)

    def output_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the output for an input of ``shape``."""
        if self.layer.op == "linear":
            return (*shape[:-1], self.layer.filters)
        rows, columns = (int(size) for size in shape[-2:])
        if self._border is not None:
            left, right, top, bottom = self._border[0]
            rows, columns = rows + top + bottom, columns + left + right
        spec = self._spec(rows, columns)
        return (*shape[:-3], spec.filters, *spec.output_hw)

    def run_opaque(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        check_input(x)
        if self.layer.op == "linear":
            if x.shape[-1] != self.layer.channels:
                raise self._misfit(x)
            # Rows are pixels side by side of one channels-last map, which is how they lie in memory already.
            rows = x.reshape(1, 1, -1, self.layer.channels).permute(0, 3, 1, 2)
            return self._run(rows).permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.layer.filters)
        if self._border is not None:
            sides, mode = self._border
            x = F.pad(x, sides, mode)
        return self._run(x[None])[0] if x.dim() == 3 else self._run(x)

    def _misfit(self, x: Tensor) -> ModelError:
        want = f"(…, {self.layer.channels})" if self.layer.op == "linear" else f"(N, {self.layer.channels}, H, W)"
        return ModelError(f"layer '{self.name}': got an input of shape {tuple(x.shape)}, want {want}.")

    def _run(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.layer.channels:
            raise self._misfit(x)
        spec = self._spec(int(x.shape[2]), int(x.shape[3]))
        if x.numel() == 0:
            return x.new_empty((0, spec.filters, *spec.output_hw))
        program = self.programs.get(x.shape, lambda: self._program(spec, int(x.shape[0])))
        return program.run(x).reshape(x.shape[0], spec.filters, *spec.output_hw)

    def _spec(self, height: int, width: int) -> LayerSpec:
        layer = self.layer
        if layer.op == "linear":
            shape, size = (*layer.weight_shape, 1, 1), (height, width)
            return replace(layer, op="conv", weight_shape=shape, input_hw=size, output_hw=size)
        sizes = zip((height, width), layer.padding, layer.dilation, layer.window, layer.stride, strict=True)
        rows, columns = ((size + 2 * pad - dil * (win - 1) - 1) // step + 1 for size, pad, dil, win, step in sizes)
        if rows < 1 or columns < 1:
            raise ModelError(f"layer '{self.name}': a {height}x{width} input is smaller than its window.")
        return replace(layer, input_hw=(height, width), output_hw=(rows, columns))

    def _program(self, spec: LayerSpec, batch: int) -> Program:
        program = Program(batch, self.how.threads)
        x = program.buffer(spec.channels, *spec.input_hw, halo=max(spec.padding))
        out = program.buffer(spec.filters, *spec.output_hw)
        program.set_input(x)
        weight, bias = self.get_buffer("weight"), self.bias
        assert bias is None or isinstance(bias, Tensor)
        weight = weight.reshape(spec.weight_shape)
        program.conv(x, out, spec, weight, bias, self.how.kernel, Epilogue(), self.how.block)
        program.set_output(out)
        program.finish()
        return program
