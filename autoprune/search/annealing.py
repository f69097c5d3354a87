"""Simulated annealing over the choices, by moves that keep the budget.

A move takes one or two layers to other levels of their ladders. What is worse is accepted with probability
exp(−Δ ln error / temperature), the temperature falling geometrically as the evaluations are spent. After a while
without a new best policy the search returns to the best.

Source: Kirkpatrick, Gelatt, Vecchi, "Optimization by Simulated Annealing" (1983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autoprune.envs.problem import Assignment, Problem
from autoprune.search.base import Account, Searcher
from autoprune.search.knapsack import solve_problem
from autoprune.search.moves import Moves
from autoprune.search.random_search import random_assignment
from autoprune.search.settings import check_setting

# Moves in a row to policies already known before the space counts as exhausted.
_PATIENCE = 400
_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class AnnealingSettings:
    """Schedule and start.

    Attributes:
        start: ``knapsack`` (the exact solver's policy) or ``random``.
        hot, cold: First and last temperature, in units of ln error: .1 accepts a policy 10 % worse with 37 %.
        reach: Most levels that a layer moves.
        sift: Moves drawn, of which the one of least added single-layer error is proposed; 1 is plain annealing.
        patience: Evaluations without a new best policy after which it is returned to.
    """

    start: str = "knapsack"
    hot: float = 0.1
    cold: float = 0.002
    reach: int = 3
    sift: int = 8
    patience: int = 15

    def __post_init__(self) -> None:
        starts = ("knapsack", "random")
        check_setting("annealing", "start", self.start, self.start in starts, "'knapsack' or 'random'")
        check_setting("annealing", "cold", self.cold, self.cold > 0, "above 0")
        check_setting("annealing", "hot", self.hot, self.hot >= self.cold, "at least cold")
        for name in ("reach", "sift", "patience"):
            check_setting("annealing", name, getattr(self, name), getattr(self, name) >= 1, "1 or more")


class AnnealingSearcher(Searcher):
    """Simulated annealing from the exact solver's policy."""

    name = "annealing"
    settings_class = AnnealingSettings
    settings: AnnealingSettings

    def propose(self, account: Account, seed: int) -> None:
        rng = np.random.default_rng(seed)
        settings, moves = self.settings, Moves(account.problem)
        current = self._start(account.problem, moves, rng)
        here = best = math.log(account.evaluate(current).error + _LEAST)
        best_at = known = 0
        while known < _PATIENCE:
            spent = account.evaluations - account.left
            if spent - best_at >= settings.patience:
                current, best_at = account.ranked()[0], spent
                here = best
            proposed = self._neighbour(account.problem, moves, current, rng)
            if proposed is None:
                return
            error = math.log(account.evaluate(proposed).error + _LEAST)
            known = known + 1 if account.evaluations - account.left == spent else 0
            temperature = settings.hot * (settings.cold / settings.hot) ** (spent / account.evaluations)
            if rng.random() < math.exp(min(0.0, (here - error) / temperature)):
                current, here = proposed, error
            if error < best:
                best, best_at = error, spent

    def _neighbour(
        self, problem: Problem, moves: Moves, current: Assignment, rng: np.random.Generator
    ) -> Assignment | None:
        near_NL = moves.neighbours(np.array(current), self.settings.reach)
        if not len(near_NL):
            return None
        drawn = [tuple(near_NL[int(place)].tolist()) for place in rng.integers(len(near_NL), size=self.settings.sift)]
        return moves.fill(min(drawn, key=problem.additive_error))

    def _start(self, problem: Problem, moves: Moves, rng: np.random.Generator) -> Assignment:
        if self.settings.start == "random":
            return random_assignment(problem, rng)
        return solve_problem(problem, moves=moves)
