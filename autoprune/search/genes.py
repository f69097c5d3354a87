"""What an Optuna sampler's parameters stand for: coefficients of the exact solver, or the layers' choices themselves.

Either decodes to a policy within the budget; in front mode a third part of the parameters says which budget, as a
share of what lies between the cheapest policy and the problem's limits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from autoprune.core.errors import InfeasibleBudget
from autoprune.envs.problem import Assignment, FloatArray, IntArray, Problem
from autoprune.search.knapsack import perturbed_solution
from autoprune.search.moves import Moves, useful_choices

Params = Mapping[str, float]

_SHARE = "budget"
# Of the way from the cheapest policy to the limits; below the first even rounding decides.
_SHARES = (0.02, 1.0)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A policy as executed.

    Attributes:
        assignment: Within the problem's limits.
        excess_D: What the parameters asked for, over each limit, less 1; negative where it was met.
        executed: Parameters that stand for ``assignment`` itself.
    """

    assignment: Assignment
    excess_D: FloatArray
    executed: dict[str, float]


class Genes(ABC):
    """Parameters of a sampler and the policies they stand for.

    Args:
        problem: What is searched.
        shares: Whether parameters for the budget are among them, one per constraint.
    """

    def __init__(self, problem: Problem, *, shares: bool = False) -> None:
        self.problem = problem
        self._kinds = [constraint.kind for constraint in problem.constraints] if shares else []
        self._floors_D = np.array([problem.cheapest(index).sum() for index in range(len(problem.constraints))])

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Name of each parameter → its range."""
        shares = {f"{_SHARE} {kind}": FloatDistribution(*_SHARES) for kind in self._kinds}
        return {**self._distributions(), **shares}

    def decode(self, params: Params) -> Decoded:
        """Return the policy that parameters stand for."""
        problem = self._limited(params)
        assignment, asked, executed = self._decode(problem, params)
        excess_D = problem.costs(asked) / np.maximum(problem.limits_D, 1e-12) - 1.0
        shares = {name: params[name] for name in params if name.startswith(_SHARE)}
        return Decoded(assignment, excess_D, {**executed, **shares})

    def start(self, number: int, count: int, spread: float, rng: np.random.Generator) -> dict[str, float]:
        """Return parameters of a warm start: the exact solution first, then some with errors scaled at random.

        Args:
            number: Which one, from 0.
            count: How many there will be; in front mode their budgets spread evenly, those of later ones at random.
            spread: Standard deviation of the logarithm of the factors.
            rng: Draws them.
        """
        log_L = rng.normal(0.0, spread if number and not self._kinds else 0.0, len(self.problem.layers))
        low, high = _SHARES
        place = number / max(1, count - 1) if number < count else float(rng.random())
        share = high - (high - low) * place
        shares = {f"{_SHARE} {kind}": share for kind in self._kinds}
        return {**self._start(self._limited(shares), log_L), **shares}

    def _limited(self, params: Params) -> Problem:
        if not self._kinds:
            return self.problem
        share_D = np.array([params[f"{_SHARE} {kind}"] for kind in self._kinds])
        for _ in range(12):
            limits_D = self._floors_D + share_D * (self.problem.limits_D - self._floors_D)
            try:
                return self.problem.limited(limits_D)
            except InfeasibleBudget:  # limits that each can be met, but not together
                share_D = 0.5 * (share_D + 1.0)
        return self.problem

    @abstractmethod
    def _distributions(self) -> dict[str, BaseDistribution]: ...

    @abstractmethod
    def _decode(self, problem: Problem, params: Params) -> tuple[Assignment, Assignment, dict[str, float]]:
        """Return the policy executed, the one asked for, and the parameters of the former."""

    @abstractmethod
    def _start(self, problem: Problem, log_L: FloatArray) -> dict[str, float]: ...


class Coefficients(Genes):
    """Per layer the logarithm of a factor on its errors; the solver does the rest (SPDY's search space)."""

    def __init__(self, problem: Problem, reach: float, *, shares: bool = False) -> None:
        super().__init__(problem, shares=shares)
        self._reach = reach

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {layer.name: FloatDistribution(-self._reach, self._reach) for layer in self.problem.layers}

    def _decode(self, problem: Problem, params: Params) -> tuple[Assignment, Assignment, dict[str, float]]:
        log_L = np.array([params[layer.name] for layer in problem.layers])
        found = perturbed_solution(problem, log_L)
        return found, found, {layer.name: params[layer.name] for layer in problem.layers}

    def _start(self, problem: Problem, log_L: FloatArray) -> dict[str, float]:
        log_L = np.clip(log_L, -self._reach, self._reach)
        return {layer.name: float(value) for layer, value in zip(problem.layers, log_L, strict=True)}


class Choices(Genes):
    """Per layer the place on its ladder: its undominated choices, ordered by cost.

    What exceeds the budget is brought down to it, what leaves some of it uses it up.
    """

    def __init__(self, problem: Problem, *, shares: bool = False) -> None:
        super().__init__(problem, shares=shares)
        self._ladders = useful_choices(problem)

    def _distributions(self) -> dict[str, BaseDistribution]:
        rows = zip(self.problem.layers, self._ladders, strict=True)
        return {layer.name: IntDistribution(0, len(ladder) - 1) for layer, ladder in rows}

    def _decode(self, problem: Problem, params: Params) -> tuple[Assignment, Assignment, dict[str, float]]:
        rows = zip(problem.layers, self._ladders, strict=True)
        asked = tuple(int(ladder[int(params[layer.name])]) for layer, ladder in rows)
        moves = Moves(problem)
        found = moves.fill(moves.repair(asked))
        return found, asked, self._rungs(found)

    def _start(self, problem: Problem, log_L: FloatArray) -> dict[str, float]:
        return self._rungs(perturbed_solution(problem, log_L))

    def _rungs(self, assignment: Assignment) -> dict[str, float]:
        return {
            layer.name: _rung(self.problem, place, choice, self._ladders[place])
            for place, (layer, choice) in enumerate(zip(self.problem.layers, assignment, strict=True))
        }


def _rung(problem: Problem, layer: int, choice: int, ladder: IntArray) -> int:
    """Return the place of a choice on its ladder; of one that was left out as dominated, the nearest in cost."""
    costs_C = problem.costs_LCD[layer][:, 0]
    return int(np.abs(costs_C[ladder] - costs_C[choice]).argmin())
