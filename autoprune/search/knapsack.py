"""The exact solver for additive errors: a multiple-choice knapsack by dynamic programming.

Choice k of layer l has error e and cost w; the sum of costs is bounded, the sum of errors is least. Costs are rounded
*up* to buckets, so that no solution can exceed the budget; what the rounding can lose is bounded by L buckets.

Shapes: L layers, C choices (ragged), B buckets, D constraints.
Source: Sinha and Zoltners, "The multiple-choice knapsack problem" (1979); for pruning SPDY (Frantar, Alistarh 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoprune.core.errors import InfeasibleBudget
from autoprune.envs.coupled import CoupledProblem
from autoprune.envs.problem import Assignment, FloatArray, IntArray, Problem
from autoprune.search.base import Account, Searcher
from autoprune.search.coupled import solve_coupled
from autoprune.search.dp_tables import BucketTable, ExactTable, Reduced, bucket_table, exact_table, reduced
from autoprune.search.moves import Moves
from autoprune.search.settings import check_setting


def solve(
    error_LC: Sequence[npt.ArrayLike], cost_LC: Sequence[npt.ArrayLike], budget: float, buckets: int = 10_000
) -> IntArray:
    """Return the choice per layer, (L,), of least total error whose total cost is within the budget.

    Exact when the layers' undominated sums stay few; else optimal up to rounding: no assignment whose cost is at most
    ``budget - L * (budget - cheapest) / buckets`` has a smaller error.

    Args:
        error_LC: Per layer (C,); non-finite ones are chosen only where the budget leaves nothing else.
        cost_LC: Per layer (C,), finite, same unit as the budget.
        budget: Upper bound of the sum of costs.
        buckets: Resolution of the cost axis.
    Raises:
        InfeasibleBudget: Even the cheapest choices exceed the budget.
    """
    return np.asarray(pareto(error_LC, cost_LC, [budget], buckets)[0])


def pareto(
    error_LC: Sequence[npt.ArrayLike], cost_LC: Sequence[npt.ArrayLike], budgets: Sequence[float], buckets: int = 10_000
) -> IntArray:
    """Return the solutions for several budgets, (len(budgets), L), all from one table.

    Raises:
        InfeasibleBudget: The smallest budget cannot be met.
    """
    tables = [reduced(errors, costs) for errors, costs in zip(error_LC, cost_LC, strict=True)]
    floor = float(sum(table.floor for table in tables))
    if min(budgets) < floor:
        raise InfeasibleBudget(f"budget {min(budgets):g}; the least cost that can be reached is {floor:g}.")
    solver = _solver(tables, max(budgets) - floor, buckets)
    return _named(tables, solver.solutions(np.asarray(budgets, dtype=np.float64) - floor))


@dataclass(frozen=True, slots=True)
class Front:
    """Solutions none of which another undercuts in cost and error, by rising cost; P of them.

    Attributes:
        cost_P: Their costs.
        error_P: Their additive errors.
        picks_PL: Their choices per layer.
    """

    cost_P: FloatArray
    error_P: FloatArray
    picks_PL: IntArray


def solve_front(
    error_LC: Sequence[npt.ArrayLike],
    cost_LC: Sequence[npt.ArrayLike],
    budget: float | None = None,
    buckets: int = 10_000,
) -> Front:
    """Return the whole trade-off between cost and error from one table: the cheapest first, the least error last.

    Exact where ``solve`` is; else the solution of every bucket, as far as no other undercuts it.

    Args:
        error_LC: Per layer (C,).
        cost_LC: Per layer (C,), finite.
        budget: Dearest cost of interest; by default that of the least errors.
        buckets: Resolution of the cost axis.
    Raises:
        InfeasibleBudget: Even the cheapest choices exceed the budget.
    """
    tables = [reduced(errors, costs) for errors, costs in zip(error_LC, cost_LC, strict=True)]
    floor = float(sum(table.floor for table in tables))
    most = float(sum(table.cost[-1] for table in tables))
    if budget is not None and budget < floor:
        raise InfeasibleBudget(f"budget {budget:g}; the least cost that can be reached is {floor:g}.")
    free = most if budget is None else min(most, budget - floor)
    solver = _solver(tables, free, buckets)
    rungs_PL = solver.solutions(solver.steps())
    if free == most:  # rounding up may have left the last bucket's solution short of it
        rungs_PL = np.vstack([rungs_PL, [len(table.index) - 1 for table in tables]])
    picks_PL = _named(tables, rungs_PL)
    error_P, cost_P = _totals(error_LC, picks_PL), _totals(cost_LC, picks_PL)
    order = np.lexsort((error_P, cost_P))
    keep = order[np.append(True, error_P[order][1:] < np.minimum.accumulate(error_P[order])[:-1])]
    return Front(cost_P[keep], error_P[keep], picks_PL[keep])


def _totals(value_LC: Sequence[npt.ArrayLike], picks_PL: IntArray) -> FloatArray:
    columns = [np.asarray(row, dtype=np.float64)[picks_PL[:, layer]] for layer, row in enumerate(value_LC)]
    return np.asarray(np.sum(columns, axis=0))


def _named(tables: Sequence[Reduced], rungs_PL: IntArray) -> IntArray:
    """Return the choices that the tables' rungs stand for, (P, L)."""
    return np.stack([table.index[rungs_PL[:, layer]] for layer, table in enumerate(tables)], axis=1)


def _solver(tables: Sequence[Reduced], free: float, buckets: int) -> ExactTable | BucketTable:
    exact = exact_table(tables, free)
    return exact if exact is not None else bucket_table(tables, free, buckets)


def solve_problem(
    problem: Problem, error_LC: Sequence[FloatArray] | None = None, buckets: int = 10_000, moves: Moves | None = None
) -> Assignment:
    """Return a feasible assignment of (nearly) least additive error under all constraints of a problem.

    One constraint: ``solve``, then rounding slack is used up. Several: one knapsack over a weighted sum of the
    constraints, whose weights grow for what is exceeded; the best assignment that meets all of them is returned.

    Args:
        problem: Gives costs and limits.
        error_LC: Errors to minimise; the problem's own single-layer errors by default.
        buckets: Resolution of the cost axis.
        moves: Of the same problem and errors, if the caller has one.
    """
    errors = list(problem.errors_LC if error_LC is None else error_LC)
    moves = moves or Moves(problem, errors)
    if isinstance(problem, CoupledProblem):
        return _coupled(problem, errors, buckets, moves)
    if len(problem.constraints) == 1:
        costs = [costs_CD[:, 0] for costs_CD in problem.costs_LCD]
        # The problem grants a limit that equals the least cost up to rounding; so must the solver.
        budget = max(float(problem.limits_D[0]), float(problem.cheapest().sum()))
        picks = solve(errors, costs, budget, buckets)
        return moves.fill(moves.repair(tuple(int(pick) for pick in picks)))
    return _surrogate(problem, errors, buckets, moves)


def _coupled(problem: CoupledProblem, errors: list[FloatArray], buckets: int, moves: Moves) -> Assignment:
    """Return the coupled solver's assignment; several constraints are one weighted sum, as in ``_surrogate``."""
    scale_D = np.maximum(problem.limits_D, 1e-12)
    weight_D = np.full(len(scale_D), 1.0 / len(scale_D))
    best: Assignment | None = None
    best_error = np.inf
    for step in range(1 if len(scale_D) == 1 else 8):
        budget = float(weight_D @ (problem.limits_D / scale_D))
        picks = solve_coupled(problem, errors, weight_D / scale_D, budget, buckets)
        candidate = moves.fill(moves.repair(tuple(picks.tolist())))
        error = float(sum(errors[layer][pick] for layer, pick in enumerate(candidate)))
        if best is None or error < best_error:
            best, best_error = candidate, error
        used_D = problem.costs_of(picks[None])[0] / scale_D
        weight_D = weight_D * np.exp(np.clip(used_D - used_D.mean(), -2.0, 2.0) / (1.0 + 0.25 * step))
        weight_D /= weight_D.sum()
    assert best is not None
    return best


def _surrogate(problem: Problem, errors: list[FloatArray], buckets: int, moves: Moves, rounds: int = 12) -> Assignment:
    floors_LD = np.stack([costs_CD.min(axis=0) for costs_CD in problem.costs_LCD])
    free_D = np.maximum(problem.limits_D - floors_LD.sum(axis=0), 1e-9 * np.maximum(problem.limits_D, 1e-9))
    # In units of what is free above the cheapest, each limit reads "at most 1", and so does any weighted mean of them.
    share_LCD = [(c - f) / free_D for c, f in zip(problem.costs_LCD, floors_LD, strict=True)]
    weight_D = np.full(len(free_D), 1.0 / len(free_D))
    best: Assignment | None = None
    best_error = np.inf
    for step in range(rounds):
        picks = tuple(int(p) for p in solve(errors, [share @ weight_D for share in share_LCD], 1.0, buckets))
        candidate = moves.fill(moves.repair(picks))
        error = float(sum(errors[layer][pick] for layer, pick in enumerate(candidate)))
        if best is None or error < best_error:
            best, best_error = candidate, error
        used_D = np.sum([share[pick] for share, pick in zip(share_LCD, picks, strict=True)], axis=0)
        # Multiplicative weights: a constraint used beyond the others' mean gains weight, ever more gently.
        weight_D = weight_D * np.exp(np.clip(used_D - used_D.mean(), -2.0, 2.0) / (1.0 + 0.25 * step))
        weight_D /= weight_D.sum()
    assert best is not None
    return best


def perturbed_solution(problem: Problem, log_L: FloatArray, buckets: int = 2_000) -> Assignment:
    """Return the solution for each layer's errors multiplied by exp(``log_L``), (L,); coarser, as it is one of many."""
    scaled = [error_C * math.exp(log) for error_C, log in zip(problem.errors_LC, log_L, strict=True)]
    return solve_problem(problem, scaled, buckets)


@dataclass(frozen=True, slots=True)
class KnapsackSettings:
    """The solver's.

    Attributes:
        buckets: Resolution of the cost axis.
    """

    buckets: int = 10_000

    def __post_init__(self) -> None:
        check_setting("knapsack", "buckets", self.buckets, 10 <= self.buckets <= 10_000_000, "10 to 10,000,000")


class KnapsackSearcher(Searcher):
    """One policy: the knapsack's solution for the measured single-layer errors."""

    name = "knapsack"
    settings_class = KnapsackSettings
    settings: KnapsackSettings

    def propose(self, account: Account, seed: int) -> None:
        account.evaluate(solve_problem(account.problem, buckets=self.settings.buckets))

    def propose_front(self, account: Account, seed: int) -> bool:
        """Evaluate the solver's own front, as many of its policies as are granted, evenly in cost; of one cost only."""
        problem = account.problem
        if len(problem.constraints) > 1 or not problem.separable:
            return False
        costs = [costs_CD[:, 0] for costs_CD in problem.costs_LCD]
        budget = max(float(problem.limits_D[0]), float(problem.cheapest().sum()))
        front = solve_front(problem.errors_LC, costs, budget, self.settings.buckets)
        wanted = np.linspace(front.cost_P[-1], front.cost_P[0], account.evaluations)
        places = np.searchsorted(front.cost_P, wanted * (1.0 + 1e-12), side="right") - 1
        for place in dict.fromkeys(np.maximum(places, 0).tolist()):
            account.evaluate(problem.decode_down(front.picks_PL[place].tolist()))
        return True
