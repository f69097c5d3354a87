"""A network in PyTorch's own form, before its sparse layers are replaced: BatchNorms folded where that is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoprune.kernels.fold import fold_batchnorm, fold_by_hooks
from autoprune.kernels.inputs import Example, call, random_like, tensors_in
from autoprune.kernels.plan_norms import split_norms
from autoprune.kernels.plan_ops import PlanRefusal
from autoprune.kernels.plan_record import eval_view
from autoprune.kernels.survey import Layer, Survey, survey

__all__ = ["Layer", "Survey", "disagreement", "layers_by_hooks", "torch_form"]

# Folding BatchNorm and another order of summation move results by about 1e-6 of their scale.
_TOLERANCE = 1e-4


def disagreement(model: nn.Module, deployed: nn.Module, example: Example) -> PlanRefusal | None:
    """Return why a plan is wrong about the model, on random inputs; hooks and in-place tricks can cause it."""
    x = random_like(example)
    with torch.no_grad():
        want = list(tensors_in(call(eval_view(model), x)))
        got = list(tensors_in(call(deployed, x)))
    if not want or [tensor.shape for tensor in want] != [tensor.shape for tensor in got]:
        return PlanRefusal("output", "the plan's output has another shape than the model's")
    error = max(_difference(*pair) for pair in zip(got, want, strict=True))
    if not error <= _TOLERANCE:
        return PlanRefusal("output", f"the plan's outputs differ from the model's by {error:.1e} of their scale")
    return None


def _difference(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def torch_form(model: nn.Module, example: Example) -> nn.Module:
    """Return a copy of a model in eval mode, BatchNorms folded where that leaves its outputs as they are.

    By the model's graph where it can be traced symbolically, else by what its layers hand to each other in a pass.
    """
    plain = copy.deepcopy(model).eval()
    ways: tuple[Callable[[], nn.Module], ...] = (
        lambda: fold_batchnorm(split_norms(copy.deepcopy(plain))),
        lambda: fold_by_hooks(split_norms(copy.deepcopy(plain)), example),
    )
    for fold in ways:
        try:
            folded = fold()
            if disagreement(plain, folded, example) is None:
                return folded
        except Exception:  # foreign code in a changed form: whatever it raises, this way does not serve
            continue
    return plain


def layers_by_hooks(network: nn.Module, example: Example) -> dict[str, Layer]:
    """Return the layers one forward pass runs, in order of execution, with their shapes.

    Raises:
        ModelError: The model fails on the example.
    """
    return survey(network, example).layers
