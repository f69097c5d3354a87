"""Tree-structured Parzen estimator (Optuna) over the layers' choices, started from knapsack solutions.

Source: Bergstra et al. (2011); Watanabe (2023). A proposal that misses the budget is brought down to it and learnt from
as what was executed.
"""

from __future__ import annotations

import math

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState

from autoprune.envs.problem import Assignment, FloatArray, Problem
from autoprune.search.base import Account, Searcher
from autoprune.search.knapsack import solve_problem
from autoprune.search.moves import Moves, useful_choices

_COARSE = 2000


def perturbed_solution(problem: Problem, log_L: FloatArray, moves: Moves | None = None) -> Assignment:
    """Return the knapsack's solution with each layer's errors multiplied by exp(``log_L``)."""
    scaled = [error_C * math.exp(log) for error_C, log in zip(problem.errors_LC, log_L, strict=True)]
    return solve_problem(problem, scaled, _COARSE, moves)


class TPESearcher(Searcher):
    """TPE over ladders: per layer the undominated choices, ordered by cost, as an integer.

    Args:
        warm_starts: Solutions of the knapsack, the first exact, the others with errors scaled at random per layer;
            at most a quarter of the evaluations.
        spread: Standard deviation of the logarithm of those factors.
    """

    name = "tpe"

    def __init__(self, warm_starts: int = 16, spread: float = 0.5) -> None:
        self.warm_starts = warm_starts
        self.spread = spread

    def propose(self, account: Account, seed: int) -> None:
        problem = account.problem
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        ladders = useful_choices(problem)
        distributions: dict[str, BaseDistribution] = {
            layer.name: IntDistribution(0, len(ladder) - 1)
            for layer, ladder in zip(problem.layers, ladders, strict=True)
        }
        rungs = [{int(choice): rung for rung, choice in enumerate(ladder)} for ladder in ladders]
        moves = Moves(problem)
        study = optuna.create_study(direction="minimize")
        rng = np.random.default_rng(seed)
        warm_starts = max(1, min(self.warm_starts, account.evaluations // 4))
        for number in range(20 * account.evaluations):
            if number < warm_starts:
                log_L = rng.normal(0.0, self.spread if number else 0.0, len(ladders))
                assignment = perturbed_solution(problem, log_L)
            else:
                # The storage does not keep a sampler's state: a seed per trial makes a resumed search the same one.
                study.sampler = optuna.samplers.TPESampler(seed=int(np.random.default_rng([seed, number]).integers(2**31)))
                trial = study.ask(distributions)
                asked = tuple(
                    int(ladder[trial.params[layer.name]])
                    for layer, ladder in zip(problem.layers, ladders, strict=True)
                )
                study.tell(trial, state=TrialState.FAIL)
                assignment = moves.repair(asked)
            if any(choice not in rung for choice, rung in zip(assignment, rungs, strict=True)):
                assignment = self._on_ladder(problem, assignment, ladders)
            quality = account.evaluate(assignment)
            params = {
                layer.name: rung[choice] for layer, rung, choice in zip(problem.layers, rungs, assignment, strict=True)
            }
            study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=quality.error))
