"""Accuracy-guaranteed search: the least latency at which a policy keeps the accuracy asked for.

A bisection on the latency budget. The exact solver's policies bracket it, an evaluation each; then the agent searches
at budgets below the cheapest policy that kept the accuracy so far. Whatever is evaluated counts, at whichever budget:
the answer is the cheapest policy of all that keeps the accuracy on the evaluation images, before any training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoprune.core.errors import InfeasibleBudget
from autoprune.envs.problem import Assignment, Problem, Quality
from autoprune.search.base import Account, Progress, Searcher
from autoprune.search.front import later
from autoprune.search.knapsack import solve_problem
from autoprune.search.study import Study, Trial

_PROBES = 8
# Runs of the agent: at most this many, each with at least so many evaluations.
_ROUNDS, _LEAST_EACH = 5, 10
# How far below a budget that suffices the next one lies; doubled after each success, halved towards a failure.
_STEP = 0.04


@dataclass(frozen=True, slots=True)
class Cheapest:
    """What came of it.

    Attributes:
        trials: Policies that keep the accuracy, the cheapest first; if there is none, the most accurate ones.
        kept: Whether they keep it.
    """

    trials: list[Trial]
    kept: bool


def search_cheapest(
    searcher: Searcher,
    problem: Problem,
    study: Study,
    evaluations: int,
    seed: int,
    drop: float,
    progress: Progress | None = None,
) -> Cheapest:
    """Return the cheapest policies found that lose at most ``drop`` of the dense network's accuracy.

    Args:
        searcher: Searches at each budget.
        problem: Its first constraint is what is minimised; all of its limits hold throughout.
        study: Records every policy.
        evaluations: Distinct policies in all; of one budget they count apart from another's.
        seed: Same seed, same policies.
        drop: A fraction, on the images that policies are evaluated on.
        progress: Told (done, total).
    """
    dense = study.evaluate((0,) * len(problem.layers), "dense")
    hunt = _Hunt(problem, dense.accuracy - drop)
    probes = min(_PROBES, evaluations // 4)
    account = Account(study, searcher.name, probes, later(progress, 0, evaluations), problem)
    low, high = 0.0, 1.0
    for _ in range(probes):
        middle = 0.5 * (low + high)
        assignment = solve_problem(hunt.limited(middle))
        if hunt.take(assignment, account.evaluate(assignment)):
            high = middle
        else:
            low = middle
    spent = len(account.scored)
    rounds = max(1, min(_ROUNDS, (evaluations - spent) // _LEAST_EACH))
    low, step = 0.0, _STEP
    for place in range(rounds):
        share = (evaluations - spent) // (rounds - place)
        high = hunt.share()
        target = 1.0 if not hunt.kept else max(high * (1.0 - step), 0.5 * (min(low, high) + high))
        inner = Account(study, searcher.name, share, later(progress, spent, evaluations), hunt.limited(target))
        searcher.spend(inner, seed)
        spent += share
        if any([hunt.take(assignment, quality) for assignment, quality in inner.scored.items()]):
            step *= 2.0
        else:
            low = target
    return hunt.answer(study, searcher.name)


class _Hunt:
    """What was evaluated so far, and which of it keeps the accuracy."""

    def __init__(self, problem: Problem, floor: float) -> None:
        self._problem = problem
        self._floor = floor
        self._least = float(problem.cheapest().sum())
        self.scored: dict[Assignment, Quality] = {}
        self.kept: list[Assignment] = []

    def take(self, assignment: Assignment, quality: Quality) -> bool:
        """Take an evaluated policy; return whether it keeps the accuracy within all limits."""
        keeps = quality.accuracy >= self._floor - 1e-9 and self._problem.feasible(assignment)
        if assignment not in self.scored:
            self.scored[assignment] = quality
            if keeps:
                self.kept.append(assignment)
        return keeps

    def limited(self, share: float) -> Problem:
        """Return the problem with its first limit at a share of the way from the cheapest policy."""
        limits_D = self._problem.limits_D.copy()
        while share < 1.0:
            limits_D[0] = self._least + share * (self._problem.limits_D[0] - self._least)
            try:
                return self._problem.limited(limits_D)
            except InfeasibleBudget:  # together with the other limits
                share = 0.5 * (share + 1.0) if share < 0.999 else 1.0
        return self._problem

    def share(self) -> float:
        """Return the share of the cheapest policy that keeps the accuracy; 1 while there is none."""
        free = float(self._problem.limits_D[0]) - self._least
        if not self.kept or free <= 0.0:
            return 1.0
        cost = min(float(self._problem.costs(assignment)[0]) for assignment in self.kept)
        return float(np.clip((cost - self._least) / free, 0.0, 1.0))

    def answer(self, study: Study, proposer: str) -> Cheapest:
        """Return the policies in the order of preference."""
        if self.kept:
            order = sorted(self.kept, key=lambda a: (float(self._problem.costs(a)[0]), self.scored[a].error))
        else:
            feasible = [assignment for assignment in self.scored if self._problem.feasible(assignment)]
            order = sorted(feasible, key=lambda a: (-self.scored[a].accuracy, self.scored[a].error))
        return Cheapest([study.trial(assignment, proposer) for assignment in order], bool(self.kept))
