"""Dead-channel elimination: all-zero filters leave the network, and what they emit stays (METHODS §1).

In eval mode such a filter emits the constant ``a = act(β − γμ/√(σ² + ε))``. Taking it out is lossless only when
``W[:, c]·a`` is folded into the bias of the layer that reads it, so it is done only where that is possible:

- one reader, a convolution or linear layer, reached through BatchNorm, elementwise functions, pooling and flattening;
  a residual add or a concatenation on the way keeps the channel;
- a convolution that pads with zeros sees no constant at the border: there the channel goes only if ``a`` is zero.

Source: Campfire (arXiv 2001.03253), whose fully connected columns this generalises to any reader.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autoprune.core.errors import ModelError
from autoprune.kernels.plan_ops import norm_terms

_Layer = nn.Conv2d | nn.Linear
_Norm = nn.BatchNorm1d | nn.BatchNorm2d
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardtanh,
)  # fmt: skip
_UNCHANGED = (nn.Dropout, nn.Dropout2d, nn.Identity, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_FUNCTIONS = {F.relu: torch.relu, torch.relu: torch.relu, F.relu6: F.relu6, F.gelu: F.gelu, F.silu: F.silu}
_UNCHANGED_FUNCTIONS = (F.dropout, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


@dataclass(frozen=True, slots=True)
class Eliminated:
    """Channels that left one layer.

    Attributes:
        layer: Whose filters were all zero.
        channels: Their numbers in the network as it was given to this round.
        reader: The layer that took up their constants.
        constants: What each emitted.
    """

    layer: str
    channels: tuple[int, ...]
    reader: str
    constants: tuple[float, ...]


@dataclass(slots=True)
class _Chain:
    """The way from a layer's output to its reader."""

    layer: str
    dead: Tensor
    constants: Tensor
    norms: list[str]
    reader: str = ""


def eliminate_dead_channels(model: nn.Module) -> tuple[nn.Module, list[Eliminated]]:
    """Return a copy in eval mode without the channels that can leave losslessly, and what left.

    Args:
        model: Pruned; left as it was.
    Raises:
        ModelError: The model cannot be traced symbolically.
    """
    smaller = copy.deepcopy(model).eval()
    found: list[Eliminated] = []
    while True:
        # A layer that loses columns may itself become dead, so look again until nothing is left.
        chain = next((chain for chain in _chains(smaller)), None)
        if chain is None:
            return smaller, found
        _cut(smaller, chain)
        constants = tuple(float(value) for value in chain.constants)
        found.append(Eliminated(chain.layer, tuple(chain.dead.tolist()), chain.reader, constants))


def _chains(model: nn.Module) -> list[_Chain]:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # the user's forward: anything can come out of it
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelError(f"the model cannot be traced to find its dead channels: {first_line[:120]}") from None
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    chains = []
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _Layer) and calls[str(node.target)] == 1 and getattr(module, "groups", 1) == 1:
            chain = _follow(node, module, modules, calls)
            if chain is not None:
                chains.append(chain)
    return chains


def _follow(node: fx.Node, layer: _Layer, modules: dict[str, nn.Module], calls: dict[str, int]) -> _Chain | None:
    dead = (layer.weight.detach().flatten(1) == 0).all(1).nonzero().flatten()
    dead = dead[: len(layer.weight) - 1]  # a layer keeps one filter at least
    value = torch.zeros(len(dead), dtype=torch.float64)
    if layer.bias is not None:
        value = layer.bias.detach().double()[dead]
    name, norms = str(node.target), list[str]()
    flat = isinstance(layer, nn.Linear)
    while len(dead) and len(node.users) == 1:
        node = next(iter(node.users))
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _Layer):
            chain = _Chain(name, dead, value, norms, str(node.target))
            return _read(module, chain, flat) if calls[chain.reader] == 1 else None
        if isinstance(module, _Norm) and calls[str(node.target)] == 1 and module.running_mean is not None:
            scale, shift = norm_terms(module)
            value = value * scale[dead] + shift[dead]
            norms.append(str(node.target))
            continue
        stepped = _step(node, module, value)
        if stepped is None:
            return None
        value, flattens = stepped
        flat = flat or flattens
    return None


def _step(node: fx.Node, module: nn.Module | None, value: Tensor) -> tuple[Tensor, bool] | None:
    """Return the constants behind one operation and whether it flattens, or None where they do not pass it."""
    if isinstance(module, _ELEMENTWISE):
        return module(value.clone()), False
    if isinstance(module, _UNCHANGED):
        return value, False
    if isinstance(module, nn.AvgPool2d):
        padded = module.padding not in (0, (0, 0)) and module.count_include_pad
        return None if padded else (value, False)
    if isinstance(module, nn.Flatten):
        return (value, True) if (module.start_dim, module.end_dim) == (1, -1) else None
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target](value.clone()), False
    if node.op == "call_function" and node.target in _UNCHANGED_FUNCTIONS:
        return value, False
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return value.relu(), False
    if _is_flatten(node):
        return value, True
    if _is_spatial_mean(node):
        return value, True
    return None


def _is_flatten(node: fx.Node) -> bool:
    named = node.target is torch.flatten if node.op == "call_function" else node.target == "flatten"
    rest = (*node.args[1:], *node.kwargs.values())
    return named and node.op in ("call_function", "call_method") and rest in ((1,), (1, -1))


def _is_spatial_mean(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in ("mean", torch.mean):
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return isinstance(dims, tuple | list) and tuple(dims) in ((2, 3), (-2, -1)) and not kept


def _read(reader: _Layer, chain: _Chain, flat: bool) -> _Chain | None:
    """Return the finished chain with the channels that its reader can do without, or None."""
    if isinstance(reader, nn.Linear):
        # A linear layer over the last axis of a map mixes positions, not channels.
        return chain if flat else None
    if reader.groups != 1:
        return None
    pads = reader.padding not in ("valid", (0, 0), 0) and reader.padding_mode == "zeros"
    if pads:
        zero = chain.constants == 0
        chain.dead, chain.constants = chain.dead[zero], chain.constants[zero]
    return chain if len(chain.dead) else None


@torch.no_grad()
def _cut(model: nn.Module, chain: _Chain) -> None:
    layer, reader = model.get_submodule(chain.layer), model.get_submodule(chain.reader)
    assert isinstance(layer, _Layer)
    assert isinstance(reader, _Layer)
    filters = len(layer.weight)
    kept = torch.ones(filters, dtype=torch.bool)
    kept[chain.dead] = False
    _fold(reader, chain, filters)
    layer.weight = _part(layer.weight, kept)
    if layer.bias is not None:
        layer.bias = _part(layer.bias, kept)
    for name in chain.norms:
        norm = model.get_submodule(name)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, leaf, None)
            if isinstance(value, nn.Parameter):
                setattr(norm, leaf, _part(value, kept))
            elif isinstance(value, Tensor):
                setattr(norm, leaf, value[kept].clone())
        norm.num_features = int(kept.sum())  # type: ignore[assignment]
    columns = kept.repeat_interleave(reader.weight.shape[1] // filters)
    reader.weight = nn.Parameter(reader.weight.detach()[:, columns].clone(), reader.weight.requires_grad)
    for module in (layer, reader):
        names = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("out_channels", "in_channels")
        for name, size in zip(names, module.weight.shape[:2], strict=True):
            setattr(module, name, int(size))


def _fold(reader: _Layer, chain: _Chain, filters: int) -> None:
    """Add what the dead channels contribute to every output to the reader's bias."""
    weight = reader.weight.detach().double()
    per_channel = weight.reshape(len(weight), filters, -1).sum(-1)
    added = per_channel[:, chain.dead] @ chain.constants
    if not bool(added.any()):
        return
    bias = torch.zeros_like(added) if reader.bias is None else reader.bias.detach().double()
    reader.bias = nn.Parameter((bias + added).to(reader.weight.dtype), reader.weight.requires_grad)


def _part(value: Tensor, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach()[kept].clone(), value.requires_grad)
