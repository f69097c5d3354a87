"""Which BatchNorm reads which convolution or linear layer, seen in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autoprune.trainers.method import PrunedLayer
from autoprune.trainers.schedule import TrainerError

Norm = nn.BatchNorm1d | nn.BatchNorm2d


def norms_behind(model: nn.Module, example: Tensor) -> dict[str, Norm]:
    """Return layer name → the affine BatchNorm that reads its output, for the layers that have one.

    Args:
        model: Any module that runs on ``example``; its mode and buffers are left as they were.
        example: One input with batch dimension.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, Norm] = {}

    def remember(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[id(output)] = (name, output)  # kept alive, so that no other tensor takes its id

        return hook

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        name, tensor = outputs.get(id(inputs[0]), ("", None))
        if tensor is inputs[0] and isinstance(module, Norm) and module.affine:
            found[name] = module

    flags = [(module, module.training) for module in model.modules()]
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                stack.callback(module.register_forward_hook(remember(name)).remove)  # type: ignore[arg-type]
            elif isinstance(module, Norm):
                stack.callback(module.register_forward_pre_hook(look).remove)
        try:
            for module, _ in flags:
                module.training = False
            device = next(model.parameters()).device
            with torch.no_grad():
                model(example.to(device))
        finally:
            for module, training in flags:
                module.training = training
    return found


def attach_companions(layers: Iterable[PrunedLayer], model: nn.Module, norms: Mapping[str, Norm]) -> None:
    """Let each layer's bias, and the scale and shift of the BatchNorm behind it, die with its filters."""
    modules = dict(model.named_modules())
    for layer in layers:
        norm, module = norms.get(layer.name), modules[layer.name]
        bias = getattr(module, "bias", None)
        vectors = [bias, None if norm is None else norm.weight, None if norm is None else norm.bias]
        layer.companions = [vector for vector in vectors if isinstance(vector, nn.Parameter)]


def need_example(method: str) -> TrainerError:
    """Return the error of a method that must see the model run and could not."""
    return TrainerError(
        f"trainer '{method}' must see one input of the model to find its BatchNorms; give attach(…, example=…)."
    )
