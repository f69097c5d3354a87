"""Where to aim so that the deployed network, not its prediction, meets a latency budget.

A solver that minimises predicted latency picks the rows that were measured a little too fast, so what it proposes
runs a little slower than predicted. The exact solver's policy is therefore deployed before the search, and the
latency budget is scaled until that policy's measurement meets the budget as it was given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autoprune.core.budget import Budget
from autoprune.core.errors import InfeasibleBudget
from autoprune.core.policy import Cost
from autoprune.core.rundir import write_text
from autoprune.search.config import TOLERANCE

# Aim this far below the budget: measurements of one network scatter by about a percent.
AIM = 0.99
_ROUNDS = 5
_NEAR = (0.975, 0.998)
_RANGE = (0.7, 1.3)
# Below this fraction of the budget accuracy is given away for speed that nobody asked for.
_UNUSED = 0.95


def latency_over_budget(budget: Budget, measured: Cost) -> float:
    """Return measured latency over the latency budget; 0 without one."""
    limit = budget.limit("latency")
    value = None if limit is None else measured.latency_ratio if limit.relative else measured.latency_us
    return 0.0 if limit is None or value is None else value / limit.value


def find_margin(probe: Callable[[float], float]) -> float:
    """Return the factor on the latency budget under which the exact solver's policy just meets it.

    Args:
        probe: Factor → measured latency of that policy over the budget; raises InfeasibleBudget.
    """
    margin = 1.0
    for _ in range(_ROUNDS):
        try:
            ratio = probe(margin)
        except InfeasibleBudget:
            if margin == 1.0:
                raise
            return margin  # the verification will say that it is missed
        if _NEAR[0] <= ratio <= _NEAR[1] or ratio == 0.0:
            break
        margin = closer(margin, ratio)
    return margin


def closer(margin: float, ratio: float) -> float:
    """Return the next factor after a policy found under ``margin`` measured ``ratio`` of its budget."""
    return min(max(margin * AIM / ratio, _RANGE[0]), _RANGE[1])


def off_target(margin: float, ratio: float) -> bool:
    """Return whether a policy that measured ``ratio`` of its budget misses it, or leaves much of it unused."""
    # Half of the tolerance is left to the next measurement, which decides.
    if ratio > 1.0 + TOLERANCE / 2:
        return True
    return 0.0 < ratio < _UNUSED and closer(margin, ratio) > 1.01 * margin


@dataclass(frozen=True, slots=True)
class AimFiles:
    """Where the factor of one budget is kept: in the run, and for later searches of the same budget."""

    run: Path
    kept: Path

    def load(self, *, fresh: bool) -> float | None:
        """Return the factor of an earlier session, or (unless ``fresh``) of an earlier search."""
        for path in (self.run,) if fresh else (self.run, self.kept):
            try:
                return float(json.loads(path.read_text(encoding="utf-8"))["margin"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # absent or damaged: it costs seconds to find again
        return None

    def save(self, margin: float) -> None:
        """Store a factor."""
        for path in (self.kept, self.run):
            write_text(path, json.dumps({"margin": margin}) + "\n")


@dataclass(frozen=True, slots=True)
class Guard:
    """Accuracy asked for beyond a constraint's, since the evaluation images flattered an earlier attempt."""

    path: Path

    def load(self) -> float:
        """Return it, a fraction; 0 before the first miss."""
        try:
            return float(json.loads(self.path.read_text(encoding="utf-8"))["extra"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0  # absent or damaged: the attempt that told it is made again

    def raise_by(self, missed: float) -> None:
        """Ask for more from now on."""
        write_text(self.path, json.dumps({"extra": self.load() + missed}) + "\n")
