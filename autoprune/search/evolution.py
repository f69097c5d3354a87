"""Evolution by level switches: one layer goes down, another takes the cost that this frees.

A generation makes many offspring of the best policy so far, each by one to three switches that keep the budget. A
first selection costs nothing: those stay whose errors, under the sum of single-layer errors, are least, and a few at
random, since that sum misjudges interactions. The survivors are evaluated, and the best of all becomes the parent.

Source: EvoPress (Sieberling, Kuznedelev, Kurtic, Alistarh 2024). There offspring are sifted on ever more data; here the
first sieve is the layer database. We start from the exact solver's policy instead of a uniform one, and a switch is
measured in latency: any number of levels up that fits into what the step down frees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoprune.envs.problem import Assignment
from autoprune.search.base import Account, Searcher
from autoprune.search.knapsack import perturbed_solution, solve_problem
from autoprune.search.moves import Moves
from autoprune.search.settings import check_setting

# Generations in a row that brought nothing new before the space counts as exhausted.
_PATIENCE = 20


@dataclass(frozen=True, slots=True)
class EvolutionSettings:
    """Constants of the evolution.

    Attributes:
        starts: Solutions of the exact solver evaluated first; all but one with errors scaled at random per layer.
        spread: Standard deviation of the logarithm of those factors.
        offspring: Made in each generation.
        survivors: Evaluated of them.
        switches: Most switches of one mutation; the number is the smaller of two draws, so that one is usual.
        reach: Most levels that a layer moves in one switch.
    """

    starts: int = 10
    spread: float = 0.5
    offspring: int = 64
    survivors: int = 4
    switches: int = 3
    reach: int = 3

    def __post_init__(self) -> None:
        for name in ("starts", "offspring", "survivors", "switches", "reach"):
            check_setting("evolution", name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check_setting("evolution", "spread", self.spread, self.spread > 0, "above 0")


class EvolutionSearcher(Searcher):
    """Level switches from the exact solver's policy."""

    name = "evolution"
    settings_class = EvolutionSettings
    settings: EvolutionSettings

    def propose(self, account: Account, seed: int) -> None:
        rng = np.random.default_rng(seed)
        problem, settings = account.problem, self.settings
        moves = Moves(problem)
        account.evaluate(solve_problem(problem, moves=moves))
        for _ in range(min(settings.starts, max(1, account.evaluations // 4)) - 1):
            account.evaluate(perturbed_solution(problem, rng.normal(0.0, settings.spread, len(problem.layers))))
        barren = 0
        while barren < _PATIENCE:
            parent = account.ranked()[0]
            before = account.left
            for child in self._survivors(account, parent, moves, rng):
                account.evaluate(child)
            barren = barren + 1 if account.left == before else 0

    def _survivors(
        self, account: Account, parent: Assignment, moves: Moves, rng: np.random.Generator
    ) -> list[Assignment]:
        """Return offspring not evaluated before: most by predicted error, every fourth at random."""
        settings = self.settings
        made = (self._mutated(parent, moves, rng) for _ in range(settings.offspring))
        new = [child for child in dict.fromkeys(made) if child not in account.scored]
        lucky = [new[int(index)] for index in rng.permutation(len(new))[: settings.survivors // 4]]
        rest = [child for child in new if child not in lucky]
        rest.sort(key=lambda child: (account.problem.additive_error(child), child))
        return [*rest[: settings.survivors - len(lucky)], *lucky]

    def _mutated(self, parent: Assignment, moves: Moves, rng: np.random.Generator) -> Assignment:
        current = np.array(parent, dtype=np.int64)
        highest = self.settings.switches + 1
        for _ in range(min(int(rng.integers(1, highest)), int(rng.integers(1, highest)))):
            near_NL = moves.neighbours(current, self.settings.reach)
            if len(near_NL):
                current = near_NL[int(rng.integers(len(near_NL)))]
        return moves.fill(tuple(current.tolist()))
