"""A network in PyTorch's own form, before its sparse layers are replaced: the layers it runs, and what they need."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.fold import fold_batchnorm
from autoprune.kernels.plan_ops import PlanRefusal, layer_spec, padding_of
from autoprune.kernels.plan_record import eval_view

# Folding BatchNorm and another order of summation move results by about 1e-6 of their scale.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the model: shape facts, its module, and why PyTorch must keep it (empty: it need not)."""

    spec: LayerSpec
    weight: Tensor
    torch_only: str = ""


def disagreement(model: nn.Module, deployed: nn.Module, example: Tensor) -> PlanRefusal | None:
    """Return why a plan is wrong about the model, on random inputs; hooks and in-place tricks can cause it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(example.shape, generator=generator)
    with torch.no_grad():
        want, got = eval_view(model)(x), deployed(x)
    if not isinstance(want, Tensor) or want.shape != got.shape:
        return PlanRefusal("output", "the plan's output has another shape than the model's")
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
    if not error <= _TOLERANCE:
        return PlanRefusal("output", f"the plan's outputs differ from the model's by {error:.1e} of their scale")
    return None


def torch_form(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of a model in eval mode, BatchNorms folded where that leaves its outputs as they are."""
    plain = copy.deepcopy(model).eval()
    try:
        folded = fold_batchnorm(model)
    except ModelError:
        return plain
    return folded if disagreement(plain, folded, example) is None else plain


def layers_by_hooks(network: nn.Module, example: Tensor) -> dict[str, Layer]:
    """Return the layers one forward pass runs, in order of execution, with their shapes."""
    layers: dict[str, Layer] = {}

    def record(name: str, module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        why = ""
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            why = f"a grouped convolution (groups={module.groups})"
        elif isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or padding_of(module) is None):
            why = f"padding {module.padding!r} in mode '{module.padding_mode}'"
        calls = layers[name].spec.calls + 1 if name in layers else 1
        spec = layer_spec(name, module, inputs[0].shape, output.shape)
        layers[name] = Layer(replace(spec, calls=calls), module.weight.detach(), why)

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(
                module.register_forward_hook(lambda m, inputs, output, name=name: record(name, m, inputs, output))
            )
    try:
        with torch.no_grad():
            network(example)
    except Exception as error:  # the user's forward: anything can come out of it
        raise ModelError(
            f"the model does not run on an example of shape {tuple(example.shape)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return layers
