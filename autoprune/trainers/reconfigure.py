"""Physical removal of dead channels while training goes on, and their return at its end.

A copy of the model whose every parameter and buffer holds the numbers of its own elements loses the dead channels with
their groups; what the copy holds afterwards says which elements of anything shaped like the original stay: weights,
buffers, masks and the optimizer's state are all gathered by it, and scattered back by it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoprune.sparsity.channel_graph import channel_groups
from autoprune.sparsity.channels import Layer, mask_channels, set_sizes, take_out

# Element numbers of every parameter and buffer that has any, by name in the state dict.
Elements = dict[str, Tensor]


def surviving(model: nn.Module, example: Tensor, dead: Mapping[str, Tensor]) -> Elements:
    """Return which elements stay when dead channels are taken out, and set what is left of those to zero.

    A channel goes only if every layer that writes it (through residual adds) has it dead; the depthwise convolutions
    and BatchNorms that it passes go with it.

    Args:
        model: Its dead channels' remains become zero.
        example: One input with batch dimension.
        dead: Layer name → (K,) boolean.
    Returns:
        State-dict name → int64 element numbers, in the shape that stays.
    """
    groups = channel_groups(model, example)
    kept: dict[str, Tensor] = {}
    for leader, group in groups.coupling.groups.items():
        alive_U = torch.zeros(group.units, dtype=torch.bool)
        for name in groups.writers(leader):
            module = model.get_submodule(name)
            if isinstance(module, Layer) and getattr(module, "groups", 1) == 1:
                alive_K = ~dead[name].cpu() if name in dead else torch.ones(len(module.weight), dtype=torch.bool)
                alive_U |= groups.unit_sums(leader, (name, "out"), alive_K) > 0
        if not bool(alive_U.all()) and bool(alive_U.any()):
            kept[leader] = alive_U
    mask_channels(model, groups, kept)
    shadow = copy.deepcopy(model).cpu().double()
    with torch.no_grad():
        for tensor in _numbered(shadow).values():
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape))
    return {name: tensor.detach().round().long() for name, tensor in _numbered(take_out(shadow, groups, kept)).items()}


def _numbered(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if value.dim() > 0}


def compose(first: Elements | None, second: Elements) -> Elements:
    """Return the original's elements that stay after two removals, the second numbered in the first one's result."""
    if first is None:
        return second
    return {name: first[name].flatten()[index] for name, index in second.items()}


def shrink(model: nn.Module, optimizer: Optimizer, elements: Elements) -> dict[nn.Parameter, nn.Parameter]:
    """Take everything but ``elements`` out of the model and of the optimizer's state.

    Returns:
        Old parameter → new one. New ones, because a backward graph that is still alive remembers the old shapes.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, index in elements.items():
        owner, leaf = _owner(model, name)
        value = getattr(owner, leaf)
        if value.shape == index.shape:
            continue
        smaller = take(value.detach(), index)
        if isinstance(value, nn.Parameter):
            replaced[value] = nn.Parameter(smaller, requires_grad=value.requires_grad)
            setattr(owner, leaf, replaced[value])
            _move_state(optimizer, value, replaced[value], index)
        else:
            setattr(owner, leaf, smaller)
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    for module in model.modules():
        set_sizes(module)
    return replaced


def restore(model: nn.Module, optimizer: Optimizer, elements: Elements, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give the model its original shapes back, dead channels as zeros (running variances as ones).

    Args:
        model, optimizer: As ``shrink`` left them; the optimizer's state of changed parameters is dropped.
        elements: Numbered in the original shapes.
        shapes: State-dict name → original shape.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, index in elements.items():
        owner, leaf = _owner(model, name)
        value = getattr(owner, leaf)
        if tuple(value.shape) == shapes[name]:
            continue
        whole = put(value.detach(), index, shapes[name], 1.0 if leaf == "running_var" else 0.0)
        if isinstance(value, nn.Parameter):
            replaced[value] = nn.Parameter(whole, requires_grad=value.requires_grad)
            setattr(owner, leaf, replaced[value])
            optimizer.state.pop(value, None)
        else:
            setattr(owner, leaf, whole)
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    for module in model.modules():
        set_sizes(module)


def take(value: Tensor, index: Tensor) -> Tensor:
    """Return the elements ``index`` of ``value``, in the shape of ``index`` and the memory format of ``value``."""
    taken = value.contiguous().flatten()[index.to(value.device)]
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if channels_last else taken


def put(value: Tensor, index: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    """Return a tensor of ``shape`` with ``value`` at its elements ``index`` and ``fill`` elsewhere."""
    whole = torch.full(shape, fill, dtype=value.dtype, device=value.device).flatten()
    whole[index.to(value.device).flatten()] = value.contiguous().flatten()
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    whole = whole.reshape(shape)
    return whole.contiguous(memory_format=torch.channels_last) if channels_last else whole


def _move_state(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, index: Tensor) -> None:
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            name: take(value, index) if isinstance(value, Tensor) and value.shape == old.shape else value
            for name, value in state.items()
        }


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
