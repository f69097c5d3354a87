"""Folds inference BatchNorms into the layers before them, in PyTorch's own form of the model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from autoprune.core.errors import ModelError
from autoprune.kernels.plan_ops import norm_terms


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose BatchNorms are folded into the convolutions or linears before them.

    Raises:
        ModelError: The model cannot be traced symbolically.
    """
    try:
        graph = fx.symbolic_trace(copy.deepcopy(model).eval())
    except Exception as error:  # the user's forward: anything can come out of it
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelError(f"the model cannot be traced to fold its BatchNorms: {first_line[:120]}") from None
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or not isinstance(node.args[0], fx.Node):
            continue
        if norm.running_mean is None:  # it normalises by the batch, in eval mode too
            continue
        source = node.args[0]
        layer = modules.get(str(source.target)) if source.op == "call_module" else None
        callers = sum(str(other.target) == str(source.target) for other in graph.graph.nodes)
        if isinstance(layer, nn.Conv2d | nn.Linear) and len(source.users) == 1 and callers == 1:
            _fold_into(layer, norm)
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def fold_norm(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the float32 weight and bias of a layer followed by an inference BatchNorm."""
    scale, shift = norm_terms(norm)
    weight = layer.weight.detach().double() * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach().double()
    return weight.float(), (bias * scale + shift).float()


def _fold_into(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    weight, bias = fold_norm(layer, norm)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
