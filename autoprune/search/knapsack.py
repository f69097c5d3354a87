"""The exact solver for additive errors: a multiple-choice knapsack by dynamic programming.

Choice k of layer l has error e and cost w; the sum of costs is bounded, the sum of errors is least. Costs are rounded
*up* to buckets, so that no solution can exceed the budget; what the rounding can lose is bounded by L buckets.

Shapes: L layers, C choices (ragged), B buckets, D constraints.
Source: Sinha and Zoltners, "The multiple-choice knapsack problem" (1979); for pruning SPDY (Frantar, Alistarh 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autoprune.core.errors import InfeasibleBudget
from autoprune.envs.problem import Assignment, FloatArray, IntArray, Problem
from autoprune.search.base import Account, Searcher
from autoprune.search.moves import Moves

# Below this many states the exact front of (cost, error) sums is kept instead of buckets.
_EXACT_STATES = 2048


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
    tables = [_reduced(errors, costs) for errors, costs in zip(error_LC, cost_LC, strict=True)]
    floor = float(sum(table.floor for table in tables))
    if min(budgets) < floor:
        raise InfeasibleBudget(f"budget {min(budgets):g}; the least cost that can be reached is {floor:g}.")
    free = max(budgets) - floor
    exact = _exact_table(tables, free)
    solver = exact if exact is not None else _bucket_table(tables, free, buckets)
    picks = [solver.solution(budget - floor) for budget in budgets]
    rows = [[table.index[pick] for table, pick in zip(tables, row, strict=True)] for row in picks]
    return np.array(rows, dtype=np.int64)


class _Reduced:
    """One layer's undominated choices by rising cost and falling error; costs counted from the cheapest."""

    def __init__(self, error_C: FloatArray, cost_C: FloatArray) -> None:
        finite = np.isfinite(error_C)
        # Large, but small enough that sums with it still tell the other layers' errors apart.
        worst = 1e6 * (1.0 + (error_C[finite].max() if finite.any() else 0.0))
        error_C = np.where(finite, error_C, worst)
        order = np.lexsort((np.arange(len(error_C)), error_C, cost_C))
        least = np.minimum.accumulate(error_C[order])
        keep = np.append(True, error_C[order][1:] < least[:-1])
        self.index = order[keep]
        self.error = error_C[self.index]
        self.floor = float(cost_C[self.index[0]])
        self.cost = cost_C[self.index] - self.floor


def _reduced(errors: npt.ArrayLike, costs: npt.ArrayLike) -> _Reduced:
    return _Reduced(np.asarray(errors, dtype=np.float64), np.asarray(costs, dtype=np.float64))


class _BucketTable:
    """Least error of the first l layers within b buckets, for every l and b; solutions by walking back.

    Storing the values alone and finding the choices again on the way back halves the work of the forward pass.
    """

    def __init__(self, tables: Sequence[_Reduced], least_LB: FloatArray, width: float) -> None:
        self.tables = tables
        self.least_LB = least_LB
        self.width = width

    def solution(self, free: float) -> list[int]:
        buckets = self.least_LB.shape[1] - 1
        left = buckets if self.width == 0.0 else min(buckets, int(free / self.width))
        picks: list[int] = []
        for row in range(len(self.tables), 0, -1):
            table = self.tables[row - 1]
            weights = _weights(table, self.width)
            fits = np.flatnonzero(weights <= left)
            values = self.least_LB[row - 1, left - weights[fits]] + table.error[fits]
            pick = int(fits[values.argmin()])
            picks.append(pick)
            left -= int(weights[pick])
        return picks[::-1]


def _weights(table: _Reduced, width: float) -> IntArray:
    if width == 0.0:
        return np.where(table.cost > 0.0, np.iinfo(np.int64).max, 0)
    # Round the bucket up: rounding down lets the sum exceed the budget.
    return np.asarray(np.ceil(np.minimum(table.cost / width, 2.0**40)), dtype=np.int64)


def _bucket_table(tables: Sequence[_Reduced], free: float, buckets: int) -> _BucketTable:
    width = free / buckets
    least_LB = np.zeros((len(tables) + 1, buckets + 1))
    candidate = np.empty(buckets + 1)
    for row, table in enumerate(tables, start=1):
        before, now = least_LB[row - 1], least_LB[row]
        now.fill(np.inf)
        for weight, error in zip(_weights(table, width).tolist(), table.error.tolist(), strict=True):
            if weight > buckets:
                continue
            size = buckets + 1 - weight
            np.add(before[:size], error, out=candidate[:size])
            np.minimum(now[weight:], candidate[:size], out=now[weight:])
    return _BucketTable(tables, least_LB, width)


class _ExactTable:
    """Every undominated (cost, error) sum of all layers, with the picks that lead to it."""

    def __init__(self, cost_P: FloatArray, picks_PL: IntArray) -> None:
        self.cost_P = cost_P
        self.picks_PL = picks_PL

    def solution(self, free: float) -> list[int]:
        # Sums rise in cost and fall in error: the last one that fits is the best.
        last = int(np.searchsorted(self.cost_P, free, side="right")) - 1
        return [int(pick) for pick in self.picks_PL[max(last, 0)]]


def _exact_table(tables: Sequence[_Reduced], free: float) -> _ExactTable | None:
    """Merge layer after layer, keeping only undominated sums; None when they become too many."""
    cost_P, error_P = np.zeros(1), np.zeros(1)
    picks_PL = np.zeros((1, 0), dtype=np.int64)
    for table in tables:
        cost = (cost_P[:, None] + table.cost[None, :]).ravel()
        error = (error_P[:, None] + table.error[None, :]).ravel()
        order = np.lexsort((error, cost))
        order = order[cost[order] <= free]
        least = np.minimum.accumulate(error[order])
        keep = order[np.append(True, error[order][1:] < least[:-1])]
        if len(keep) > _EXACT_STATES:
            return None
        parents, picks = np.divmod(keep, len(table.cost))
        cost_P, error_P = cost[keep], error[keep]
        picks_PL = np.concatenate([picks_PL[parents], picks[:, None]], axis=1)
    return _ExactTable(cost_P, picks_PL)


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
    if len(problem.constraints) == 1:
        costs = [costs_CD[:, 0] for costs_CD in problem.costs_LCD]
        # The problem grants a limit that equals the least cost up to rounding; so must the solver.
        budget = max(float(problem.limits_D[0]), float(problem.cheapest().sum()))
        picks = solve(errors, costs, budget, buckets)
        return moves.fill(moves.repair(tuple(int(pick) for pick in picks)))
    return _surrogate(problem, errors, buckets, moves)


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


class KnapsackSearcher(Searcher):
    """One policy: the knapsack's solution for the measured single-layer errors."""

    name = "knapsack"

    def propose(self, account: Account, seed: int) -> None:
        account.evaluate(solve_problem(account.problem))
