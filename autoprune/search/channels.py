"""Searches over channels: the space of a model's groups, and what their widths cost by a latency table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense
from autoprune.core.coupling import Coupling, amounts, taken, variants
from autoprune.core.errors import SpaceError
from autoprune.core.layers import LayerSpec
from autoprune.envs.coupled import Factor
from autoprune.search_spaces.grouped import has_channels, with_groups
from autoprune.search_spaces.space import SearchSpace, load_space
from autoprune.sparsity.channel_graph import channel_groups
from autoprune.sparsity.channels import ChannelGroups

CostOf = Callable[[LayerSpec, Choice], float]


def open_space(
    source: str | Path, model: nn.Module, example: Tensor, layers: Sequence[LayerSpec], device: str = "cpu"
) -> tuple[SearchSpace, ChannelGroups]:
    """Return the space that a preset or file spans over a model, channel choices given to whole groups.

    Args:
        source: Name of a preset, or path of a file.
        model, example: The model on its own device, and an input of it.
        layers: Of the model, as traced.
        device: Where networks are measured.
    Raises:
        SpaceError: As ``with_groups``; no channels of the model can leave; channels on a GPU.
    """
    space = load_space(source, layers)
    if not has_channels(space):
        return space, ChannelGroups()
    if device != "cpu":
        raise SpaceError(
            f"search space '{space.name}': channels are searched on the CPU for now, not on device '{device}'; "
            "give --device cpu or a space without channels."
        )
    groups = channel_groups(model, example)
    if not groups.coupling.groups:
        layer, reason = next(iter(groups.coupling.refused.items()), ("none", "it has no layer"))
        raise SpaceError(
            f"search space '{space.name}': no channels of this network can leave (layer '{layer}': {reason}); give a "
            "space without channels."
        )
    grouped = with_groups(space, groups.coupling)
    if not grouped.searched:
        raise SpaceError(
            f"search space '{space.name}': no group of channels has a measured width below its own (multiples of 8), "
            "or a rule keeps each of them dense; widen the rules."
        )
    return grouped, groups


def touched_layers(
    layers: Sequence[LayerSpec], options: Mapping[LayerSpec, Sequence[Choice]], coupling: Coupling
) -> dict[LayerSpec, tuple[str, ...]]:
    """Return layer → the searched groups on its sides, of the layers that have one."""
    order = [layer.name for layer in options]
    found = {}
    for layer in layers:
        sides = coupling.layers.get(layer.name)
        leaders = () if sides is None else tuple(sorted(set(sides.leaders) & set(order), key=order.index))
        if leaders:
            found[layer] = leaders
    return found


def make_factors(
    layers: Sequence[LayerSpec],
    options: Mapping[LayerSpec, Sequence[Choice]],
    coupling: Coupling,
    costs: Sequence[CostOf],
) -> list[Factor]:
    """Return the cost of every layer that a searched group touches, by the shapes it can come to.

    Args:
        layers: Of the whole network.
        options: Choices of each searched layer, leaders of groups among them.
        coupling: Groups of the network.
        costs: One per constraint: what a layer of some shape costs.
    Raises:
        MissingLatency: The table lacks one of the shapes; nothing is guessed.
    """
    places = {layer.name: index for index, layer in enumerate(options)}
    widths = {
        layer.name: [coupling.groups[layer.name].kept_units(choice) for choice in choices]
        for layer, choices in options.items()
        if layer.name in coupling.groups
    }
    factors = []
    for layer, leaders in touched_layers(layers, options, coupling).items():
        sides = coupling.layers[layer.name]
        losses = [
            [taken(sides, leader, coupling.groups[leader].units - kept) for kept in widths[leader]]
            for leader in leaders
        ]
        shapes = variants(layer, coupling, {leader: widths[leader] for leader in leaders})
        table = {key: [cost(shape, Dense()) for cost in costs] for key, shape in shapes.items()}
        units = [places[leader] for leader in leaders]
        factors.append(Factor.make(units, amounts(layer, sides, coupling), losses, table))
    return factors
