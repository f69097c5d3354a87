"""Where to aim so that the deployed network, not its prediction, meets a latency budget.

A solver that minimises predicted latency picks the rows that were measured a little too fast, so what it proposes
runs a little slower than predicted. The exact solver's policy is therefore deployed before the search, and the
latency budget is scaled until that policy's measurement meets the budget as it was given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from autoprune.core.budget import Budget
from autoprune.core.errors import InfeasibleBudget
from autoprune.core.policy import Cost
from autoprune.core.rundir import write_text

# Aim this far below the budget: measurements of one network scatter by about a percent.
AIM = 0.99
_ROUNDS = 5
_NEAR = (0.975, 0.998)
_RANGE = (0.7, 1.1)


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


def open_margin(run: Path, kept: Path, *, fresh: bool, probe: Callable[[float], float]) -> float:
    """Return the factor of an earlier session or search of the same budget, or find it now and keep it."""
    for path in (run, *(() if fresh else (kept,))):
        if path.exists():
            try:
                margin = float(json.loads(path.read_text(encoding="utf-8"))["margin"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it costs seconds to find again
            save_margin(run, margin)
            return margin
    margin = find_margin(probe)
    save_margin(kept, margin)
    save_margin(run, margin)
    return margin


def save_margin(path: Path, margin: float) -> None:
    """Store a factor."""
    write_text(path, json.dumps({"margin": margin}) + "\n")
