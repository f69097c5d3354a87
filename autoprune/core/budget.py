"""Budgets: what a user writes, and what it means.

``latency=50%`` · ``latency=8ms`` · ``speedup=2x`` · ``macs=50%`` · ``params=25%`` · ``size=1MB`` · ``memory=2MB``;
several, joined by commas, must all hold. ``size`` is the packed weights; ``memory`` is the peak while the deployed
network runs: the feature maps it keeps + all packed weights + the largest workspace of any one layer. A percentage of
latency is of the fastest dense execution measured on the machine; every other percentage is of the dense network. A
value carries its unit: ``params=25`` could mean weights or percent, so it is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from autoprune.core.errors import BudgetError
from autoprune.core.registry import unknown_name

BudgetKind = Literal["latency", "macs", "params", "size", "memory"]

_UNITS: dict[BudgetKind, dict[str, float]] = {
    "latency": {"us": 1.0, "ms": 1e3, "s": 1e6},
    "macs": {"K": 1e3, "M": 1e6, "G": 1e9},
    "params": {"K": 1e3, "M": 1e6, "G": 1e9},
    "size": {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    "memory": {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9},
}
_EXAMPLES = {
    "latency": "latency=50% or latency=8ms",
    "macs": "macs=50%",
    "params": "params=25%",
    "size": "size=1MB",
    "memory": "memory=50% or memory=2MB",
}
_NUMBER = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(.*)$")


@dataclass(frozen=True, slots=True)
class Limit:
    """One upper bound.

    Attributes:
        kind: What is bounded.
        value: Microseconds, MACs, weights or bytes; or the fraction of dense when ``relative``.
        relative: Whether ``value`` is a fraction of the dense network's figure.
        text: As the user wrote it.
    """

    kind: BudgetKind
    value: float
    relative: bool
    text: str

    def absolute(self, dense: float) -> float:
        """Return the bound in the kind's own unit, given the dense network's figure."""
        return self.value * dense if self.relative else self.value


@dataclass(frozen=True, slots=True)
class Budget:
    """One or more limits that all must hold."""

    limits: tuple[Limit, ...]

    @property
    def text(self) -> str:
        """Canonical text, ``latency=50%,params=25%``."""
        return ",".join(limit.text for limit in self.limits)

    def limit(self, kind: BudgetKind) -> Limit | None:
        """Return the limit of one kind, if there is one."""
        return next((limit for limit in self.limits if limit.kind == kind), None)


def parse_budget(text: str) -> Budget:
    """Return the budget that ``text`` spells.

    Raises:
        BudgetError: A kind is unknown or given twice, or a value has no unit or lies outside its range.
    """
    limits = tuple(_parse_limit(part.strip()) for part in text.split(",") if part.strip())
    if not limits:
        raise BudgetError(f"--budget {text!r}: empty; write for example {_EXAMPLES['latency']}.")
    kinds = [limit.kind for limit in limits]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise BudgetError(f"--budget {text!r}: {kind} is given twice (speedup counts as latency); keep one.")
    return Budget(limits)


def _parse_limit(part: str) -> Limit:
    name, equals, value = (piece.strip() for piece in part.partition("="))
    kind = next((known for known in _UNITS if known == name), None)
    if kind is None and name != "speedup":
        raise BudgetError(f"--budget '{part}': {unknown_name('budget kind', name, [*_UNITS, 'speedup'])}")
    if not equals or not value:
        example = _EXAMPLES.get(name, "speedup=2x")
        raise BudgetError(f"--budget '{part}': a value is missing; write for example '{example}'.")
    match = _NUMBER.match(value)
    if match is None:
        raise BudgetError(f"--budget '{part}': {value!r} is not a number with a unit.")
    number, unit = float(match.group(1)), match.group(2).strip()
    if not 1e-12 < abs(number) < 1e18 and number != 0.0:
        raise BudgetError(f"--budget '{part}': the value must lie between 1e-12 and 1e18.")
    if kind is None:
        return _speedup(part, number, unit)
    if unit == "%":
        if not 0.0 < number <= 100.0:
            raise BudgetError(f"--budget '{part}': a percentage must be above 0 % and at most 100 %.")
        return Limit(kind, number / 100.0, True, f"{kind}={_spell(number)}%")
    if number <= 0.0:
        raise BudgetError(f"--budget '{part}': the value must be above 0.")
    units = _UNITS[kind]
    if unit not in units:
        got = f"unit '{unit}' is unknown; write" if unit else "add a unit:"
        ways = [f"'{kind}={_spell(number)}{u}'" for u in units]
        if number <= 100.0:
            ways.insert(0, f"'{kind}={_spell(number)}%'")
        raise BudgetError(f"--budget '{part}': {got} {' or '.join(ways)}.")
    return Limit(kind, number * units[unit], False, f"{kind}={_spell(number)}{unit}")


def _speedup(part: str, number: float, unit: str) -> Limit:
    if unit != "x":
        raise BudgetError(f"--budget '{part}': write a speed-up with an x: 'speedup={abs(number):g}x'.")
    if number < 1.0:
        raise BudgetError(f"--budget '{part}': a speed-up must be at least 1x.")
    return Limit("latency", 1.0 / number, True, f"speedup={_spell(number)}x")


def _spell(number: float) -> str:
    """Return the shortest usual text that reads back as exactly ``number``."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)
