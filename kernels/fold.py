"""Folds inference BatchNorms into the layers before them, in PyTorch's own form of the model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from autoprune.core.errors import ModelError
from autoprune.kernels.inputs import Example, call
from autoprune.kernels.plan_norms import is_plain_norm
from autoprune.kernels.plan_ops import norm_terms
from autoprune.kernels.plan_record import LayerTracer


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose BatchNorms are folded into the convolutions or linears before them.

    Raises:
        ModelError: The model cannot be traced symbolically.
    """
    try:
        own = copy.deepcopy(model).eval()
        graph = fx.GraphModule(own, LayerTracer().trace(own))
    except Exception as error:  # the user's forward: anything can come out of it
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelError(f"the model cannot be traced to fold its BatchNorms: {first_line[:120]}") from None
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or not isinstance(node.args[0], fx.Node):
            continue
        if not is_plain_norm(norm):
            continue
        source = node.args[0]
        layer = modules.get(str(source.target)) if source.op == "call_module" else None
        callers = sum(str(other.target) == str(source.target) for other in graph.graph.nodes)
        if isinstance(layer, nn.Conv2d | nn.Linear) and _is_plain(layer) and len(source.users) == 1 and callers == 1:
            _fold_into(layer, norm)
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def fold_by_hooks(model: nn.Module, example: Example) -> nn.Module:
    """Fold each BatchNorm into the layer whose output it was handed in one pass, both called once.

    Another reader of that output would show only in the results: compare them with the model's before use.

    Args:
        model: In eval mode; changed in place, and returned.
        example: What it takes.
    """
    writers: dict[int, nn.Module] = {}
    pairs: dict[str, nn.Module] = {}
    calls: dict[int, int] = {}
    alive: list[object] = []  # an id is only unique while its tensor lives

    def after(name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        alive.append(output)
        if isinstance(module, nn.Conv2d | nn.Linear):
            writers[id(output)] = module
        elif inputs and id(inputs[0]) in writers:
            pairs[name] = writers[id(inputs[0])]

    handles = [
        module.register_forward_hook(lambda m, i, o, n=name: after(n, m, i, o))
        for name, module in model.named_modules()
        if (isinstance(module, nn.Conv2d | nn.Linear) and _is_plain(module)) or is_plain_norm(module)
    ]
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in pairs.items():
        norm = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        if calls[id(layer)] == calls[id(norm)] == 1:
            _fold_into(layer, norm)
            model.set_submodule(name, nn.Identity())
    return model


def _is_plain(layer: nn.Conv2d | nn.Linear) -> bool:
    return type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward)


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
