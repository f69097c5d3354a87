"""An end for the searches of torch-pruning's dependency graph, which has none of its own.

Where a network rearranges positions, as Swin's merged patches do, a search goes round for ever with ever more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

# DenseNet-121 takes .3 steps a node; small networks take more, which costs nothing.
_MOST_STEPS = 2
_LEAST_STEPS = 1000
_MOST_POSITIONS = 4


@dataclass
class Steps:
    """Counts the steps of one search of the graph, and the positions of each; too many end it."""

    most: int = 0
    widest: int = 0
    taken: int = 0

    def step(self, positions: int = 0) -> None:
        self.taken += positions == 0
        if self.taken > self.most or positions > self.widest:
            raise RecursionError("positions are rearranged without end")


class _Counted(list[Any]):
    """How positions go from one node to the next; each use is a step."""

    def __init__(self, items: Iterable[object], steps: Steps) -> None:
        super().__init__(items)
        self.steps = steps

    def __iter__(self) -> Iterator[Any]:
        self.steps.step()
        for mapping in super().__iter__():
            yield None if mapping is None else partial(self._mapped, mapping)

    def _mapped(self, mapping: Callable[[object], list[object]], positions: object) -> list[object]:
        found = mapping(positions)
        self.steps.step(len(found))
        return found


def bounded(nodes: Collection[Any], widest: int) -> Steps:
    """Let every search among a graph's nodes count its steps; set ``taken`` to 0 before each search.

    Args:
        nodes: Of torch-pruning's graph, changed in place.
        widest: The most positions that a layer has.
    """
    steps = Steps(max(_LEAST_STEPS, _MOST_STEPS * len(nodes)), _MOST_POSITIONS * widest)
    for dependency in (dependency for node in nodes for dependency in node.dependencies):
        dependency.index_mapping = _Counted(dependency.index_mapping, steps)
    return steps
