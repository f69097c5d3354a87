"""Channel choices of a search space, given to whole groups: one place to choose, and every member follows.

Widths are those of the device's measured grid; a width in between is moved to the nearest one that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.coupling import ALIGNMENT, Coupling, variants
from autoprune.core.errors import SpaceError
from autoprune.core.layers import LayerSpec
from autoprune.search_spaces.space import SearchSpace, ordered

# Shapes of one network that a table may have to hold; each takes about a tenth of a second to measure.
_MOST_SHAPES = 20_000


def has_channels(space: SearchSpace) -> bool:
    """Return whether any layer of a space may lose channels."""
    return any(isinstance(choice, Channels) for choices in space.choices.values() for choice in choices)


def with_groups(space: SearchSpace, coupling: Coupling, alignment: int = ALIGNMENT) -> SearchSpace:
    """Return the space with channel choices at the groups' leaders alone, at measured widths.

    A group is offered what the rules offer each of its writers; one writer that stays dense keeps the group whole.

    Args:
        space: As rules spell it, layer by layer.
        coupling: Groups of the network.
        alignment: Widths are multiples of it.
    Raises:
        SpaceError: A layer may be sparse while channels beside it may leave, or shapes are too many to be measured.
    """
    choices: dict[str, tuple[Choice, ...]] = {}
    for layer in space.layers:
        other = [choice for choice in space.choices[layer.name] if not isinstance(choice, Channels)]
        group = coupling.group_of(layer.name)
        if group is not None and group.leader == layer.name:
            keeps = [_keeps(space.choices[writer]) for writer in group.writers]
            offered = {keep for keep in keeps[0] if all(keep in own for own in keeps)}
            other += [group.aligned(keep, alignment) for keep in sorted(offered)]
        choices[layer.name] = tuple(ordered(layer, other))
    grouped = replace(space, choices=choices, coupling=coupling)
    _check_mixed(grouped)
    count = sum(len(shapes) for shapes in measured_shapes(grouped).values())
    if count > _MOST_SHAPES:
        raise SpaceError(
            f"search space '{space.name}': {count:,} shapes of layers to measure, at most {_MOST_SHAPES:,}; give fewer "
            "'keep' values of channels, or leave layers out by name."
        )
    return grouped


def _keeps(choices: Sequence[Choice]) -> set[float]:
    return {choice.keep for choice in choices if isinstance(choice, Channels)}


def _check_mixed(space: SearchSpace) -> None:
    """Refuse what no table of two widths holds: a sparse layer whose channels are searched."""
    searched = channel_options(space)
    for layer in space.layers:
        sides = space.coupling.layers.get(layer.name)
        sparse = next((c for c in space.choices[layer.name] if not isinstance(c, Dense | Channels)), None)
        leader = next((leader for leader in sides.leaders if leader in searched), None) if sides is not None else None
        if sparse is not None and leader is not None:
            raise SpaceError(
                f"search space '{space.name}': layer '{layer.name}' may take {sparse.text} while channels of group "
                f"'{leader}' beside it may leave; give one of the two rules a 'name' pattern that leaves it out."
            )


def channel_options(space: SearchSpace) -> dict[str, tuple[int, ...]]:
    """Return leader → units that may stay, of the groups that a space searches."""
    found = {}
    for leader, group in space.coupling.groups.items():
        choices = space.choices[leader]
        if any(isinstance(choice, Channels) for choice in choices):
            widths = [choice for choice in choices if isinstance(choice, Dense | Channels)]
            found[leader] = tuple(group.kept_units(choice) for choice in widths)
    return found


def measured_shapes(space: SearchSpace) -> dict[LayerSpec, tuple[LayerSpec, ...]]:
    """Return layer → the other shapes that it can come to, of layers that channel choices change."""
    options = channel_options(space)
    found = {}
    for layer in space.layers:
        shapes = tuple(spec for spec in variants(layer, space.coupling, options).values() if spec != layer)
        if shapes:
            found[layer] = shapes
    return found


def table_rows(space: SearchSpace) -> dict[LayerSpec, tuple[Choice, ...]]:
    """Return what a latency table must hold for a space: each layer's choices, and dense rows of the smaller shapes."""
    own = {layer: tuple(c for c in space.choices[layer.name] if not isinstance(c, Channels)) for layer in space.layers}
    rows: dict[LayerSpec, tuple[Choice, ...]] = dict(own)
    for shapes in measured_shapes(space).values():
        rows.update({shape: (Dense(),) for shape in shapes if shape not in rows})
    return rows


def split_choices(choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Return the choices of layers that keep their channels."""
    return {name: choice for name, choice in choices.items() if not isinstance(choice, Channels)}
