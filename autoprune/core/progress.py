"""How long work tells whoever waits for it what it is doing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of the stages of a run; a stage ends when the next one starts, or with ``finish``."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Start a stage of ``total`` steps; ``None`` when their number is unknown."""
        ...

    def advance(self, n: int = 1) -> None:
        """Count ``n`` steps of the present stage as done."""
        ...

    def note(self, text: str) -> None:
        """Say one line that stays readable after the stage."""
        ...

    def finish(self) -> None:
        """End the last stage; calling it twice does no harm."""
        ...


class Silent:
    """A ``Progress`` that says nothing: for use as a library and in tests."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Say nothing."""

    def advance(self, n: int = 1) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Say nothing."""
