"""What one forward pass of any model shows: the layers that run, how often, and what is special about each.

Forward hooks, not a symbolic graph, so that any model that runs can be surveyed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.inputs import Example, call, shape_text
from autoprune.kernels.plan_ops import layer_spec

# Layers with weights that no choice is made for, and what they are called.
_FOREIGN: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.ConvTranspose1d, "a transposed convolution"),
    (nn.ConvTranspose2d, "a transposed convolution"),
    (nn.ConvTranspose3d, "a transposed convolution"),
    (nn.Conv1d, "a convolution in one dimension"),
    (nn.Conv3d, "a convolution in three dimensions"),
    (nn.Bilinear, "a bilinear layer"),
    (nn.RNNBase, "a recurrent layer"),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution or linear layer that runs.

    Attributes:
        spec: Shape facts; ``calls`` counts every call.
        weight: Of the module, detached.
        torch_only: Why PyTorch must run it as it is (empty: it need not).
    """

    spec: LayerSpec
    weight: Tensor
    torch_only: str = ""


@dataclass(slots=True)
class Survey:
    """What a pass showed.

    Attributes:
        layers: By name, ordered by their first call.
        uncalled: Conv and linear modules that the pass did not call.
        varying: Layers whose calls saw different map sizes; their spec is of the first call.
        tied: Layer → the layer called before it that has the same weight.
        fixed: Layer → why its weight cannot be pruned on its own.
        foreign: Layers of other kinds with weights → what they are.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()
    varying: set[str] = field(default_factory=set)
    tied: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)


def survey(model: nn.Module, example: Example) -> Survey:
    """Run a model once and return what it showed.

    Args:
        model: Runs in eval mode without gradients; it is left as it was, modes, buffers and random generators included.
        example: What the model takes, with batch dimension.
    Raises:
        ModelError: The model fails on the example.
    """
    found = Survey()
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_eval_mode(model))
        stack.enter_context(_same_rng(model))
        for name, module in candidates.items():
            handle = module.register_forward_hook(_Hook(found, name), with_kwargs=True)
            stack.callback(handle.remove)
        try:
            with torch.no_grad():
                call(model, example)
        except ModelError:
            raise
        except Exception as error:  # a model is foreign code: whatever it raises means that it cannot be surveyed
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ModelError(
                f"model {type(model).__name__} failed on an example of shape {shape_text(example)}: {reason}; "
                "give an example of the size, type and device it takes."
            ) from error
    found.uncalled = tuple(name for name in candidates if name not in found.layers)
    found.foreign = {name: what for name, m in model.named_modules() for kind, what in _FOREIGN if isinstance(m, kind)}
    _find_ties(found, model)
    _find_frozen(found, candidates)
    return found


def is_plain(module: nn.Module) -> bool:
    """Return whether a conv or linear module computes what its class is known for, by its own code."""
    known = {nn.Conv2d.forward, nn.Linear.forward}
    return type(module).forward in known and "forward" not in vars(module)


class _Hook:
    """One layer's forward hook."""

    def __init__(self, found: Survey, name: str) -> None:
        self.found, self.name = found, name

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object
    ) -> None:
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        assert isinstance(module, nn.Conv2d | nn.Linear)
        if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
            raise ModelError(f"layer '{self.name}' is called without a tensor; autoprune cannot trace it.")
        spec, found = layer_spec(self.name, module, x.shape, output.shape), self.found
        seen = found.layers.get(self.name)
        if seen is not None:
            if (seen.spec.input_hw, seen.spec.output_hw) != (spec.input_hw, spec.output_hw):
                found.varying.add(self.name)
            found.layers[self.name] = replace(seen, spec=replace(seen.spec, calls=seen.spec.calls + 1))
            return
        why = _own_code(module, x, output)
        if why:
            found.fixed[self.name] = why
        elif isinstance(module, nn.Conv2d) and module.groups != 1:
            why = f"a grouped convolution (groups={module.groups})"
        found.layers[self.name] = Layer(spec, module.weight.detach(), why)


def _own_code(module: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> str:
    """Return why a layer is not what its class and weight say, empty where it is."""
    if "weight" not in module._parameters:
        return "its weight is computed from other tensors (a parametrization)"
    if is_plain(module):
        return ""
    try:
        plain = nn.Conv2d.forward(module, x) if isinstance(module, nn.Conv2d) else nn.Linear.forward(module, x)
    except RuntimeError:
        plain = output.new_empty(0)
    same = plain.shape == output.shape and torch.allclose(plain, output, rtol=1e-4, atol=1e-5)
    return "" if same else f"{type(module).__name__} has a forward of its own"


def _find_ties(found: Survey, model: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name in found.layers:
        weight = model.get_submodule(name)._parameters.get("weight")
        if weight is None:
            continue
        first = owners.setdefault(id(weight), name)
        if first != name:
            found.tied[name] = first
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            continue
        for own in module._parameters.values():
            if own is not None and id(own) in owners:
                why = f"its weight is also that of '{name}' ({type(module).__name__})"
                found.fixed.setdefault(owners[id(own)], why)


def _find_frozen(found: Survey, candidates: Mapping[str, nn.Conv2d | nn.Linear]) -> None:
    """Note layers that do not train while others do; where nothing trains the model is only prepared for inference."""
    frozen = [name for name in found.layers if not candidates[name].weight.requires_grad]
    if len(frozen) < len(found.layers):
        for name in frozen:
            found.fixed.setdefault(name, "its weight is frozen (requires_grad is False)")


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and give each back its own flag (train() may be overridden, the flag is not)."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def _same_rng(model: nn.Module) -> Iterator[None]:
    """Restore torch's generators of the CPU and of every CUDA device that the model's weights live on."""
    devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield
