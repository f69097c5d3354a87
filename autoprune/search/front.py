"""Fronts: the policies of a search that no other undercuts in error and every cost, and how to search for them.

Agents that know how to go for a whole front do so; any other is run at one budget after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from autoprune.core.errors import InfeasibleBudget
from autoprune.envs.problem import FloatArray, Problem
from autoprune.search.base import Account, EvaluationsSpent, Progress, Searcher
from autoprune.search.study import Study, Trial

# Budgets of a sweep: at most this many, each with at least so many evaluations.
_BUDGETS, _LEAST_EACH = 10, 8


def search_front(
    searcher: Searcher, problem: Problem, study: Study, evaluations: int, seed: int, progress: Progress | None = None
) -> None:
    """Spend the evaluations on policies between the cheapest and the limits of every constraint.

    Args:
        searcher: Goes for the whole front itself, or is run at several budgets.
        problem: Its limits bound the front.
        study: Records every policy.
        evaluations: Distinct policies in all; of a sweep, policies of one budget count apart from another's.
        seed: Same seed, same policies.
        progress: Told (done, total).
    """
    try:
        whole = searcher.propose_front(Account(study, searcher.name, evaluations, progress, problem), seed)
    except EvaluationsSpent:
        whole = True
    if whole:
        return
    budgets = _sweep(problem, max(1, min(_BUDGETS, evaluations // _LEAST_EACH)))
    spent = 0
    for place, limits_D in enumerate(budgets):
        share = (evaluations - spent) // (len(budgets) - place)
        if share < 1:
            continue
        told = later(progress, spent, evaluations)
        searcher.spend(Account(study, searcher.name, share, told, problem.limited(limits_D)), seed)
        spent += share


def later(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a callback for a part of the work that starts when ``before`` of ``total`` are done."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def _sweep(problem: Problem, count: int) -> list[FloatArray]:
    """Return limits, (D,) each, from the problem's own down: all together, then of several costs each alone."""
    floors_D = np.array([problem.cheapest(index).sum() for index in range(len(problem.constraints))])
    axes = len(floors_D) + 1 if len(floors_D) > 1 else 1
    found = []
    for step, axis in itertools.product(range(math.ceil(count / axes)), range(axes)):
        share = 1.0 - step / math.ceil(count / axes)
        share_D = np.full(len(floors_D), share) if axis == 0 else np.ones(len(floors_D))
        if axis:
            share_D[axis - 1] = share
        limits_D = floors_D + share_D * (problem.limits_D - floors_D)
        with contextlib.suppress(InfeasibleBudget):  # limits that each can be met, but not together
            problem.limited(limits_D)
            found.append(limits_D)
    distinct = {tuple(limits_D.tolist()): limits_D for limits_D in found}
    return list(distinct.values())[:count]


def non_dominated(trials: Iterable[Trial]) -> list[Trial]:
    """Return the feasible trials that no other undercuts in error and every cost, by rising first cost."""
    first: dict[tuple[int, ...], Trial] = {}
    for trial in trials:
        if trial.feasible and math.isfinite(trial.quality.error):
            first.setdefault(trial.assignment, trial)
    rows = list(first.values())
    if not rows:
        return []
    points_PD = np.array([[*trial.costs.values(), trial.quality.error] for trial in rows])
    kept: list[int] = []
    for place in np.lexsort(points_PD.T[::-1]).tolist():
        # What comes later in this order undercuts nothing that came before.
        if not any((points_PD[other] <= points_PD[place]).all() for other in kept):
            kept.append(place)
    return [rows[place] for place in kept]


def knee(front: Sequence[Trial]) -> Trial:
    """Return the trial farthest below the line between a front's ends, cost against accuracy lost.

    Either is in units of its range along the front; several costs are averaged.
    """
    cost_PD = np.array([list(trial.costs.values()) for trial in front])
    cost_P = ((cost_PD - cost_PD.min(axis=0)) / np.maximum(np.ptp(cost_PD, axis=0), 1e-12)).mean(axis=1)
    accuracy_P = np.array([trial.quality.accuracy for trial in front])
    lost_P = (accuracy_P.max() - accuracy_P) / max(float(np.ptp(accuracy_P)), 1e-12)
    return front[int((cost_P + lost_P).argmin())]
