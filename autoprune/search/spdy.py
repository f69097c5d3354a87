"""SPDY: one coefficient per layer steers the exact solver, and the coefficients are searched.

1. Coefficients drawn at random; the best vector so far is kept.
2. A local search with a shrinking neighbourhood: redraw a tenth of the coefficients, later fewer and at last one of
   them; keep what is better.

Source: Frantar, Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees" (2022). There the solver's errors are a
quadratic prior, coefficient × (level / levels)²; here they are by default the measured single-layer errors, multiplied
by a coefficient around 1. ``--set prior=quadratic`` gives the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autoprune.envs.problem import Assignment, FloatArray, Problem
from autoprune.search.base import Account, Searcher
from autoprune.search.knapsack import perturbed_solution, solve_problem
from autoprune.search.moves import useful_choices
from autoprune.search.settings import check_setting

# Proposals in a row that brought nothing new before the space counts as exhausted.
_PATIENCE = 100


@dataclass(frozen=True, slots=True)
class SPDYSettings:
    """How coefficients are drawn and searched.

    Attributes:
        prior: ``measured`` (single-layer errors) or ``quadratic`` (the paper's).
        spread: Standard deviation of a coefficient's logarithm under the measured prior.
        explore: Share of the evaluations for step 1.
        neighbourhood: Share of the coefficients that the first local steps redraw.
    """

    prior: str = "measured"
    spread: float = 0.5
    explore: float = 0.25
    neighbourhood: float = 0.1

    def __post_init__(self) -> None:
        allowed = ("measured", "quadratic")
        check_setting("spdy", "prior", self.prior, self.prior in allowed, "'measured' or 'quadratic'")
        check_setting("spdy", "spread", self.spread, self.spread > 0, "above 0")
        check_setting("spdy", "explore", self.explore, 0 < self.explore <= 1, "above 0 and at most 1")
        share = self.neighbourhood
        check_setting("spdy", "neighbourhood", share, 0 < share <= 1, "above 0 and at most 1")


class SPDYSearcher(Searcher):
    """Search over the solver's coefficients."""

    name = "spdy"
    settings_class = SPDYSettings
    settings: SPDYSettings

    def propose(self, account: Account, seed: int) -> None:
        rng = np.random.default_rng(seed)
        problem, settings = account.problem, self.settings
        coefficients = _Coefficients(problem, settings)
        best_L = coefficients.first()
        best = account.evaluate(coefficients.solve(best_L)).error
        widest = math.ceil(settings.neighbourhood * len(best_L))
        explore = round(settings.explore * account.evaluations)
        known = 0
        while known < _PATIENCE:
            spent = account.evaluations - account.left
            trial_L = coefficients.draw(rng)
            if spent >= explore:
                done = (spent - explore) / max(1, account.evaluations - explore)
                size = max(1, math.ceil(widest * (1.0 - done)))
                redrawn = rng.permutation(len(best_L))[:size]
                trial_L = np.where(np.isin(np.arange(len(best_L)), redrawn), trial_L, best_L)
            before = account.left
            error = account.evaluate(coefficients.solve(trial_L)).error
            if error < best:
                best_L, best = trial_L, error
            known = known + 1 if account.left == before else 0


class _Coefficients:
    """What a vector of coefficients, (L,), means under a prior."""

    def __init__(self, problem: Problem, settings: SPDYSettings) -> None:
        self._problem = problem
        self._settings = settings
        self._levels = _level_errors(problem) if settings.prior == "quadratic" else None

    def first(self) -> FloatArray:
        layers = len(self._problem.layers)
        return np.zeros(layers) if self._levels is None else np.full(layers, 0.5)

    def draw(self, rng: np.random.Generator) -> FloatArray:
        layers = len(self._problem.layers)
        if self._levels is None:
            return rng.normal(0.0, self._settings.spread, layers)
        return rng.uniform(0.0, 1.0, layers)

    def solve(self, coefficients_L: FloatArray) -> Assignment:
        if self._levels is None:
            return perturbed_solution(self._problem, coefficients_L)
        scaled = [c * errors_C for c, errors_C in zip(coefficients_L.tolist(), self._levels, strict=True)]
        return solve_problem(self._problem, scaled, buckets=2_000)


def _level_errors(problem: Problem) -> list[FloatArray]:
    """Return per layer (rung / rungs)² by falling cost; a choice that another undercuts is never taken."""
    errors = []
    for ladder, size in zip(useful_choices(problem), problem.sizes, strict=True):
        error_C = np.full(size, np.inf)
        error_C[ladder] = np.linspace(1.0, 0.0, len(ladder)) ** 2
        errors.append(error_C)
    return errors
