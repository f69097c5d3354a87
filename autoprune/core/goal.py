"""What a search is asked for: a budget to keep, an accuracy to keep, or a front of both.

``--budget latency=50%``: least error within it. ``--constraint accuracy=-0.5%``: least latency with at most half a
point of accuracy lost. ``--objective accuracy,latency``: every trade-off between them. A budget given with one of the
other two bounds what it proposes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from autoprune.core.budget import Budget, BudgetKind, parse_budget
from autoprune.core.errors import BudgetError
from autoprune.core.registry import unknown_name

GoalKind = Literal["budget", "constraint", "front"]
COST_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)

_NUMBER = re.compile(r"^([+\-−]?(?:\d+\.?\d*|\.\d+))\s*(.*)$")


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked for.

    Attributes:
        budget: Limits; none where only a constraint or objectives are given.
        drop: Largest loss of accuracy against dense, a fraction; None when accuracy is not bounded.
        objectives: Costs that are traded against accuracy; empty without ``--objective``.
    """

    budget: Budget
    drop: float | None = None
    objectives: tuple[BudgetKind, ...] = ()

    @property
    def kind(self) -> GoalKind:
        """Which of the three it is."""
        return "constraint" if self.drop is not None else "front" if self.objectives else "budget"

    @property
    def text(self) -> str:
        """Canonical text: what names a run and stands in its result."""
        parts = [self.budget.text] if self.budget.limits else []
        if self.drop is not None:
            parts.append(f"accuracy=-{100.0 * self.drop:g}%")
        if self.objectives:
            parts.append("+".join(("accuracy", *self.objectives)))
        return ",".join(parts)


    def shortfall(self, accuracy: float | None, dense: float | None) -> float:
        """Return by how much an accuracy misses the constraint, a fraction; 0 where it is kept or none is asked for."""
        if self.drop is None or accuracy is None or dense is None:
            return 0.0
        return max(0.0, dense - self.drop - accuracy - 1e-9)


def parse_goal(budget: str, constraint: str | None = None, objective: str | None = None) -> Goal:
    """Return the goal that the three options spell.

    Args:
        budget: As in ``--budget``; empty for none.
        constraint: As in ``--constraint``.
        objective: As in ``--objective``.
    Raises:
        BudgetError: One cannot be read, none is given, or a constraint and objectives are given together.
    """
    if not (budget or constraint or objective):
        raise BudgetError(
            "nothing is asked for; give --budget latency=50%, --constraint accuracy=-0.5% or "
            "--objective accuracy,latency."
        )
    if constraint and objective:
        raise BudgetError(
            "--constraint and --objective: got both; a front shows every accuracy, so leave --constraint out."
        )
    limits = parse_budget(budget) if budget else Budget(())
    return Goal(limits, _parse_drop(constraint) if constraint else None, _parse_objectives(objective or ""))


def _parse_drop(text: str) -> float:
    """Return the loss of accuracy that ``accuracy=-0.5%`` allows, a fraction."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if name != "accuracy":
        raise BudgetError(f"--constraint '{text}': {unknown_name('constraint', name, ['accuracy'])}")
    match = _NUMBER.match(value)
    if not equals or match is None:
        raise BudgetError(f"--constraint '{text}': write the loss against dense that is allowed: 'accuracy=-0.5%'.")
    number, unit = match.group(1).replace("−", "-"), match.group(2).strip()
    if unit != "%":
        got = f"unit '{unit}' is unknown; write" if unit else "add the unit:"
        raise BudgetError(f"--constraint '{text}': {got} 'accuracy=-{number.lstrip('+-')}%', in points of accuracy.")
    points = float(number)
    if points > 0.0:
        raise BudgetError(
            f"--constraint '{text}': a loss against dense is 0 or negative; write 'accuracy=-{points:g}%'."
        )
    if points <= -100.0:
        raise BudgetError(f"--constraint '{text}': 100 points of loss or more allow everything; write less.")
    return -points / 100.0


def _parse_objectives(text: str) -> tuple[BudgetKind, ...]:
    """Return the costs among ``accuracy,latency,…``, in the order given."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        return ()
    for name in names:
        if name != "accuracy" and name not in COST_KINDS:
            raise BudgetError(f"--objective '{text}': {unknown_name('objective', name, ['accuracy', *COST_KINDS])}")
        if names.count(name) > 1:
            raise BudgetError(f"--objective '{text}': {name} is given twice; keep one.")
    if "accuracy" not in names or len(names) < 2:
        raise BudgetError(
            f"--objective '{text}': a front needs accuracy and at least one of {', '.join(COST_KINDS)}; "
            "write 'accuracy,latency'."
        )
    return tuple(kind for name in names for kind in COST_KINDS if kind == name)
