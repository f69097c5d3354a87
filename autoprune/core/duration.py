"""Durations as a user writes them: ``90s``, ``8m``, ``1.5h``."""

from __future__ import annotations

import re

from autoprune.core.errors import AutopruneError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)")


class DurationError(AutopruneError):
    """A duration that cannot be read."""


def parse_seconds(flag: str, text: str) -> float:
    """Return the seconds that ``text`` spells.

    Args:
        flag: The option's name, for the message.
        text: A number above 0 with a unit.
    Raises:
        DurationError: No number, no unit, or not above 0.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match.group(1)) * _UNITS.get(match.group(2), 0.0) if match is not None else 0.0
    if seconds <= 0.0:
        raise DurationError(f"{flag} {text!r}: write a time above 0 with its unit, for example '90s', '8m' or '1.5h'.")
    return seconds
