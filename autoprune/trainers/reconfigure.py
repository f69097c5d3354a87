"""Physical removal of dead channels while training goes on, and their return at its end.

A copy of the model whose every parameter and buffer holds the numbers of its own elements is pruned along
torch-pruning's dependency graph; what the copy holds afterwards says which elements of anything shaped like the
original stay: weights, buffers, masks and the optimizer's state are all gathered by it, and scattered back by it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Element numbers of every parameter and buffer that has any, by name in the state dict.
Elements = dict[str, Tensor]


def surviving(model: nn.Module, example: Tensor, dead: Mapping[str, Tensor]) -> Elements:
    """Return which elements stay when dead channels are taken out.

    A channel goes only if every layer that writes it (through residual adds) has it dead.

    Args:
        model: Left as it was.
        example: One input with batch dimension.
        dead: Layer name → (K,) boolean.
    Returns:
        State-dict name → int64 element numbers, in the shape that stays.
    """
    import torch_pruning

    shadow = copy.deepcopy(model).cpu().double().eval().requires_grad_(True)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(shadow, example_inputs=example.cpu().double())
    names = {module: name for name, module in shadow.named_modules()}
    with torch.no_grad():
        for tensor in _numbered(shadow).values():
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape))
    done: set[str] = set()
    for name, dead_K in dead.items():
        layer = shadow.get_submodule(name)
        if name in done or not bool(dead_K.any()):
            continue
        linear = isinstance(layer, nn.Linear)
        prune = torch_pruning.prune_linear_out_channels if linear else torch_pruning.prune_conv_out_channels
        index = dead_K.nonzero().flatten().tolist()
        group = graph.get_pruning_group(layer, prune, idxs=index)
        writers = _writers(group, graph, names)
        done.update(writers)
        agreed = [place for place, number in enumerate(index) if _all_dead(writers, dead, place, len(index))]
        chosen = [index[place] for place in agreed]
        if chosen:
            graph.get_pruning_group(layer, prune, idxs=chosen).prune()
    return {name: tensor.detach().round().long() for name, tensor in _numbered(shadow).items()}


def _writers(group: object, graph: object, names: Mapping[nn.Module, str]) -> dict[str, list[int]]:
    """Return the convolutions and linears whose outputs a group removes, with the channels of each."""
    found: dict[str, list[int]] = {}
    for dependency, index in group:  # type: ignore[attr-defined]
        module = dependency.target.module
        if isinstance(module, nn.Conv2d | nn.Linear) and graph.is_out_channel_pruning_fn(dependency.handler):  # type: ignore[attr-defined]
            found[names[module]] = [int(getattr(number, "idx", number)) for number in index]
    return found


def _all_dead(writers: Mapping[str, list[int]], dead: Mapping[str, Tensor], place: int, length: int) -> bool:
    return all(
        name in dead and len(index) == length and bool(dead[name][index[place]]) for name, index in writers.items()
    )


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
    _set_sizes(model)
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
    _set_sizes(model)


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


def _set_sizes(model: nn.Module) -> None:
    """Let modules say of themselves what their weights are; grouped convolutions keep their shape here."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.num_features = len(module.running_mean)
