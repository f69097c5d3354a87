"""Tree-structured Parzen estimator (Optuna) over the layers' choices, started from knapsack solutions.

Source: Bergstra et al. (2011); Watanabe (2023). A proposal that misses the budget is brought down to it, one that
leaves some of it uses it up, and what is learnt from is what was executed.
"""

from __future__ import annotations

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState

from autoprune.envs.problem import IntArray, Problem
from autoprune.search.base import Account, Searcher
from autoprune.search.knapsack import perturbed_solution
from autoprune.search.moves import Moves, useful_choices

# Proposals in a row that are known already: the space is as good as exhausted, or the sampler has settled.
_PATIENCE = 40


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
        moves = Moves(problem)
        study = optuna.create_study(direction="minimize")
        rng = np.random.default_rng(seed)
        warm_starts = max(1, min(self.warm_starts, account.evaluations // 4))
        number = known = 0
        while known < _PATIENCE:
            before = account.left
            if number < warm_starts:
                log_L = rng.normal(0.0, self.spread if number else 0.0, len(ladders))
                assignment = perturbed_solution(problem, log_L)
            else:
                # The storage does not keep a sampler's state: a seed per trial makes a resumed search the same one.
                own_seed = int(np.random.default_rng([seed, number]).integers(2**31))
                study.sampler = optuna.samplers.TPESampler(seed=own_seed)
                trial = study.ask(distributions)
                asked = tuple(
                    int(ladder[trial.params[layer.name]])
                    for layer, ladder in zip(problem.layers, ladders, strict=True)
                )
                study.tell(trial, state=TrialState.FAIL)
                assignment = moves.fill(moves.repair(asked))
            quality = account.evaluate(assignment)
            params = {
                layer.name: _rung(problem, place, choice, ladders[place])
                for place, (layer, choice) in enumerate(zip(problem.layers, assignment, strict=True))
            }
            study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=quality.error))
            known = known + 1 if account.left == before else 0
            number += 1


def _rung(problem: Problem, layer: int, choice: int, ladder: IntArray) -> int:
    """Return the place of a choice on its ladder; of one that was left out as dominated, the nearest in cost."""
    costs_C = problem.costs_LCD[layer][:, 0]
    return int(np.abs(costs_C[ladder] - costs_C[choice]).argmin())
