"""The default searcher: the knapsack's solution, corrected by what the evaluations teach about interactions.

1. Knapsack solutions: the exact one, then some with each layer's errors scaled at random (SPDY's coefficients).
2. Until the evaluations are spent: fit ``InteractionModel`` to everything evaluated, draw one plausible error function,
   bring the best policies so far to a minimum of it by moves of one or two layers within the budget, evaluate the best
   new policy met on the way (Thompson sampling).

Source: SPDY (Frantar, Alistarh 2022) for the start, EvoPress (Sieberling et al. 2024) for moves that trade one layer's
level against another's; both spend an evaluation on every move, the model spends one on the best of many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoprune.envs.problem import Assignment
from autoprune.search.base import Account, Searcher
from autoprune.search.interaction import InteractionModel
from autoprune.search.knapsack import perturbed_solution
from autoprune.search.moves import Moves
from autoprune.search.settings import check_setting

# Proposals in a row that brought nothing new before the space counts as exhausted.
_PATIENCE = 40


@dataclass(frozen=True, slots=True)
class AutoSettings:
    """How the evaluations are spent.

    Attributes:
        starts: Knapsack solutions evaluated first.
        spread: Standard deviation of the logarithm of their random factors.
        parents: Best policies from which each descent starts.
    """

    starts: int = 10
    spread: float = 0.5
    parents: int = 3

    def __post_init__(self) -> None:
        check_setting("auto", "starts", self.starts, self.starts >= 1, "1 or more")
        check_setting("auto", "spread", self.spread, self.spread > 0, "above 0")
        check_setting("auto", "parents", self.parents, self.parents >= 0, "0 or more")


class AutoSearcher(Searcher):
    """Knapsack, then Thompson sampling over pairwise interactions."""

    name = "auto"
    settings_class = AutoSettings
    settings: AutoSettings

    def propose(self, account: Account, seed: int) -> None:
        rng = np.random.default_rng(seed)
        layers = len(account.problem.layers)
        moves = Moves(account.problem)
        account.evaluate(perturbed_solution(account.problem, np.zeros(layers), 10_000))
        for _ in range(self.settings.starts - 1):
            account.evaluate(perturbed_solution(account.problem, rng.normal(0.0, self.settings.spread, layers)))
        model = InteractionModel(account.problem.errors_LC)
        known = 0
        while known < _PATIENCE:
            before = account.left
            assignment = self._descend(account, model, moves, rng)
            if assignment is None:
                assignment = perturbed_solution(account.problem, rng.normal(0.0, self.settings.spread, layers))
            account.evaluate(assignment)
            known = known + 1 if account.left == before else 0

    def _descend(
        self, account: Account, model: InteractionModel, moves: Moves, rng: np.random.Generator
    ) -> Assignment | None:
        """Return the best policy not yet evaluated that descents under one drawn error function meet."""
        evaluated = list(account.scored)
        model.fit(np.array(evaluated), np.array([quality.error for quality in account.scored.values()]))
        matrix = model.draw(rng)
        met: dict[Assignment, float] = {}
        # One descent sets out from elsewhere: the best policies may all lie in one basin.
        log_L = rng.normal(0.0, 2.0 * self.settings.spread, len(account.problem.layers))
        stranger = perturbed_solution(account.problem, log_L)
        for start in [*account.ranked()[: self.settings.parents], stranger]:
            current = np.array(start)
            value = float(model.predict(matrix, current[None, :])[0])
            while True:
                near_NL = moves.neighbours(current)
                values_N = model.predict(matrix, near_NL)
                order_N = np.argsort(values_N, kind="stable")[:3]
                met |= {tuple(near_NL[index].tolist()): float(values_N[index]) for index in order_N}
                if not len(order_N) or values_N[order_N[0]] >= value - 1e-9:
                    break
                current, value = near_NL[order_N[0]], float(values_N[order_N[0]])
        new = [assignment for assignment in met if assignment not in account.scored]
        return min(new, key=lambda assignment: (met[assignment], assignment), default=None)
