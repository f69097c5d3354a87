"""Names to objects, with a helpful answer to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from autoprune.core.errors import UnknownName

T = TypeVar("T")

_MOST_LISTED = 40  # names that still fit into a message
_NEAREST = 5


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """Return the error for a name that is not among ``known``, with the nearest one proposed."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=_NEAREST, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if len(names) > _MOST_LISTED:
        others = f" Near it: {', '.join(near[1:])}." if near[1:] else ""
        return UnknownName(f"no {kind} '{name}'.{hint}{others} {len(names)} are known.")
    return UnknownName(f"no {kind} '{name}'.{hint} Known: {', '.join(names)}.")


class Registry(Generic[T]):
    """A closed set of named things of one kind.

    Args:
        kind: What the things are, in the words of an error message ("agent", "trainer").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under ``name``."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """Return the thing called ``name``.

        Raises:
            UnknownName: With the nearest known name.
        """
        if name not in self._items:
            raise unknown_name(self.kind, name, self._items)
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __contains__(self, name: object) -> bool:
        return name in self._items
