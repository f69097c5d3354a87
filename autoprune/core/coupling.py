"""Which channels of a network can only leave together, and the shapes of its layers when they do.

A *group* is a row of equal *units*; a unit is everything that one removal takes out: a filter of each layer that writes
the channel (several where an addition joins them), the input weights of each layer that reads it, a whole group of a
grouped convolution, all positions of a flattened map. A group is named after its *leader*, the first layer that writes
nothing else; its choice is the group's, and the other writers carry the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.errors import PolicyError
from autoprune.core.layers import LayerSpec

ALIGNMENT = 8
"""Widths of a CPU's measured grid are multiples of this many channels."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one side of a layer that a group owns: ``each`` channels a unit."""

    leader: str
    each: int


@dataclass(frozen=True, slots=True)
class Side:
    """Input or output channels of a layer: what groups own, and how many no group does."""

    shares: tuple[Share, ...] = ()
    fixed: int = 0

    def width(self, kept: Mapping[str, int], units: Mapping[str, int]) -> int:
        """Return the channels that stay.

        Args:
            kept: Leader → units that stay, of the groups that are pruned.
            units: Leader → units in all.
        """
        owned = sum(share.each * kept.get(share.leader, units[share.leader]) for share in self.shares)
        return self.fixed + owned


@dataclass(frozen=True, slots=True)
class LayerSides:
    """Both sides of one layer; ``grouped`` counts the groups of a grouped convolution, one unit's ``each`` of them."""

    inputs: Side
    outputs: Side
    grouped: Side | None = None

    @property
    def leaders(self) -> tuple[str, ...]:
        """Groups on either side, each once."""
        return tuple(dict.fromkeys(share.leader for side in (self.inputs, self.outputs) for share in side.shares))


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that leave together.

    Attributes:
        leader: The layer that the group is named after.
        writers: Every layer with all its filters in this group, the leader first; grouped convolutions not among them.
        units: How many units there are.
        each: Filters of the leader in a unit.
    """

    leader: str
    writers: tuple[str, ...]
    units: int
    each: int

    @property
    def filters(self) -> int:
        """Filters of the leader."""
        return self.units * self.each

    def kept_units(self, choice: Choice) -> int:
        """Return how many units stay under the leader's choice.

        Raises:
            PolicyError: The width is no whole number of units.
        """
        if not isinstance(choice, Channels):
            return self.units
        width = choice.width(self.filters)
        if width % self.each:
            raise PolicyError(
                f"layer '{self.leader}': {choice.text} keeps {width} of {self.filters} filters, which leave "
                f"{self.each} together; keep a multiple of {self.each}."
            )
        return width // self.each

    def choice_of(self, width: int) -> Choice:
        """Return the choice that keeps ``width`` of the leader's filters."""
        return Dense() if width >= self.filters else Channels(width / self.filters)

    def aligned(self, keep: float, alignment: int = ALIGNMENT) -> Choice:
        """Return the choice of the grid's width that is nearest to ``keep`` (the wider of two), dense if that is all.

        At least one aligned block of channels stays.
        """
        step = math.lcm(alignment, self.each)
        return self.choice_of(max(1, math.floor(keep * self.filters / step + 0.5)) * step)


@dataclass(frozen=True)
class Coupling:
    """The groups of a network.

    Attributes:
        groups: Leader → group, in the order in which the leaders run.
        layers: Layer → its sides, of the layers that have a group on one of them.
        refused: Layer → why its filters cannot be taken out.
    """

    groups: Mapping[str, ChannelGroup] = field(default_factory=dict)
    layers: Mapping[str, LayerSides] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        leaders = {writer: group.leader for group in self.groups.values() for writer in group.writers}
        object.__setattr__(self, "_leaders", leaders)
        object.__setattr__(self, "_units", {leader: group.units for leader, group in self.groups.items()})

    def group_of(self, layer: str) -> ChannelGroup | None:
        """Return the group that owns all filters of a layer, if one does."""
        leader = self._leaders.get(layer)  # type: ignore[attr-defined]
        return None if leader is None else self.groups[leader]

    def kept(self, choices: Mapping[str, Choice]) -> dict[str, int]:
        """Return leader → units that stay, of the groups that a policy prunes.

        Raises:
            PolicyError: A layer's filters cannot be taken out, or layers of one group have different choices.
        """
        kept: dict[str, int] = {}
        for name, choice in choices.items():
            if not isinstance(choice, Channels):
                continue
            group = self.group_of(name)
            if group is None:
                reason = self.refused.get(name, "no layer of this name has filters that can leave")
                raise PolicyError(f"layer '{name}' cannot take {choice.text}: {reason}.")
            for other in group.writers:
                if choices.get(other, Dense()) != choice:
                    raise PolicyError(
                        f"layers '{name}' and '{other}' write the same channels, but the policy gives {choice.text} "
                        f"and {choices.get(other, Dense()).text}; give both the same choice."
                    )
            units = group.kept_units(choice)
            if units < group.units:
                kept[group.leader] = units
        return kept

    def expanded(self, choices: Mapping[str, Choice]) -> dict[str, Choice]:
        """Return the choices with every writer of a group following its leader."""
        found = dict(choices)
        for leader, group in self.groups.items():
            choice = choices.get(leader)
            if isinstance(choice, Channels):
                found.update({writer: choice for writer in group.writers})
        return found

    def harmonised(self, choices: Mapping[str, Choice], alignment: int = ALIGNMENT) -> dict[str, Choice]:
        """Return choices that groups can follow, from choices made for each layer by itself.

        A group with a writer that is to keep all its filters keeps them all, as does a layer whose filters cannot
        leave; widths become aligned ones.
        """
        found = dict(choices)
        for name, choice in choices.items():
            if not isinstance(choice, Channels):
                continue
            group = self.group_of(name)
            own = [choices.get(writer, Dense()) for writer in group.writers] if group is not None else []
            agreed = group is not None and all(isinstance(other, Channels) for other in own)
            most = max((other.keep for other in own if isinstance(other, Channels)), default=1.0)
            found[name] = group.aligned(most, alignment) if group is not None and agreed else Dense()
        return found

    def resized(self, layers: Iterable[LayerSpec], choices: Mapping[str, Choice]) -> tuple[LayerSpec, ...]:
        """Return the layers in the shapes that they have once a policy's channels are taken out.

        Raises:
            PolicyError: As ``kept``.
        """
        kept = self.kept(choices)
        return tuple(self.resize(layer, kept) for layer in layers)

    def resize(self, layer: LayerSpec, kept: Mapping[str, int]) -> LayerSpec:
        """Return one layer's shape under leader → units that stay."""
        sides = self.layers.get(layer.name)
        if sides is None:
            return layer
        units: Mapping[str, int] = self._units  # type: ignore[attr-defined]
        return resized(layer, sides, kept, units)


def resized(
    layer: LayerSpec, sides: LayerSides, kept: Mapping[str, int], units: Mapping[str, int]
) -> LayerSpec:
    """Return a layer's shape when only some units of its groups stay.

    Args:
        layer: As it is.
        sides: Its sides.
        kept: Leader → units that stay, of the groups that are pruned.
        units: Leader → units in all.
    """
    filters = sides.outputs.width(kept, units)
    if sides.grouped is not None:
        groups = sides.grouped.width(kept, units)
        return replace(layer, weight_shape=(filters, *layer.weight_shape[1:]), groups=groups)
    return replace(layer, weight_shape=(filters, sides.inputs.width(kept, units), *layer.weight_shape[2:]))


def variants(
    layer: LayerSpec, coupling: Coupling, options: Mapping[str, Iterable[int]]
) -> dict[tuple[int, int, int], LayerSpec]:
    """Return every shape that a layer can come to, by its amounts: input channels, filters and groups that stay.

    Args:
        layer: As it is.
        coupling: Groups of the network.
        options: Leader → units that may stay, of the groups that are searched.
    """
    sides = coupling.layers.get(layer.name)
    if sides is None:
        return {(layer.channels, layer.filters, layer.groups): layer}
    leaders = [leader for leader in sides.leaders if leader in options]
    found: set[tuple[int, int, int]] = {amounts(layer, sides, coupling)}
    # What a group takes away does not depend on the others: sums of all combinations, each once.
    for leader in leaders:
        steps = {taken(sides, leader, coupling.groups[leader].units - kept) for kept in options[leader]}
        found = {(i - a, o - b, g - c) for i, o, g in found for a, b, c in steps}
    return {key: _shaped(layer, key) for key in sorted(found)}


def amounts(layer: LayerSpec, sides: LayerSides, coupling: Coupling) -> tuple[int, int, int]:
    """Return a layer's input channels, filters and groups, nothing taken out."""
    units = {leader: group.units for leader, group in coupling.groups.items()}
    return sides.inputs.width({}, units), sides.outputs.width({}, units), layer.groups


def taken(sides: LayerSides, leader: str, units: int) -> tuple[int, int, int]:
    """Return the input channels, filters and groups that a layer loses with some units of one group."""

    def lost(side: Side | None) -> int:
        return 0 if side is None else units * sum(share.each for share in side.shares if share.leader == leader)

    return lost(sides.inputs), lost(sides.outputs), lost(sides.grouped)


def _shaped(layer: LayerSpec, key: tuple[int, int, int]) -> LayerSpec:
    channels, filters, groups = key
    return replace(layer, weight_shape=(filters, channels // groups, *layer.weight_shape[2:]), groups=groups)
