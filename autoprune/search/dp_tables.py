"""The tables behind the exact solver: one layer's undominated choices, and sums over layers in buckets or exactly.

Shapes: L layers, C choices (ragged), B buckets, P budgets or points of a front.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autoprune.envs.problem import FloatArray, IntArray

# Below this many states the exact front of (cost, error) sums is kept instead of buckets.
_EXACT_STATES = 2048


class Reduced:
    """One layer's undominated choices by rising cost and falling error; costs counted from the cheapest."""

    def __init__(self, error_C: FloatArray, cost_C: FloatArray) -> None:
        error_C = finite_errors(error_C)
        order = np.lexsort((np.arange(len(error_C)), error_C, cost_C))
        least = np.minimum.accumulate(error_C[order])
        keep = np.append(True, error_C[order][1:] < least[:-1])
        self.index = order[keep]
        self.error = error_C[self.index]
        self.floor = float(cost_C[self.index[0]])
        self.cost = cost_C[self.index] - self.floor


def finite_errors(error_C: FloatArray) -> FloatArray:
    """Return errors, (C,), with infinite ones replaced by one worse than all others."""
    finite = np.isfinite(error_C)
    # Large, but small enough that sums with it still tell the other layers' errors apart.
    worst = 1e6 * (1.0 + (error_C[finite].max() if finite.any() else 0.0))
    return np.where(finite, error_C, worst)


def reduced(errors: npt.ArrayLike, costs: npt.ArrayLike) -> Reduced:
    """Return one layer's undominated choices, from its errors and costs, (C,) each."""
    return Reduced(np.asarray(errors, dtype=np.float64), np.asarray(costs, dtype=np.float64))


class BucketTable:
    """Least error of the first l layers within b buckets, for every l and b; solutions by walking back.

    Storing the values alone and finding the choices again on the way back halves the work of the forward pass.
    """

    def __init__(self, tables: Sequence[Reduced], least_LB: FloatArray, width: float) -> None:
        self.tables = tables
        self.least_LB = least_LB
        self.width = width

    def steps(self) -> FloatArray:
        """Return a cost above the cheapest in every bucket at which the least error falls."""
        last_B = self.least_LB[-1]
        return np.asarray((np.flatnonzero(np.append(True, last_B[1:] < last_B[:-1])) + 0.5) * self.width)

    def solutions(self, free_P: FloatArray) -> IntArray:
        """Return the rungs, (P, L), of the solutions within costs above the cheapest."""
        buckets = self.least_LB.shape[1] - 1
        left_P = np.full(len(free_P), buckets)
        if self.width > 0.0:
            left_P = np.minimum(buckets, np.floor(free_P / self.width)).astype(np.int64)
        rungs_PL = np.empty((len(free_P), len(self.tables)), dtype=np.int64)
        for layer in range(len(self.tables) - 1, -1, -1):
            table = self.tables[layer]
            weight_C = _weights(table, self.width)
            rest_PC = left_P[:, None] - np.minimum(weight_C, buckets + 1)[None, :]
            value_PC = self.least_LB[layer][np.maximum(rest_PC, 0)] + table.error
            rung_P = np.where(rest_PC >= 0, value_PC, np.inf).argmin(axis=1)
            rungs_PL[:, layer] = rung_P
            left_P = rest_PC[np.arange(len(left_P)), rung_P]
        return rungs_PL


def _weights(table: Reduced, width: float) -> IntArray:
    if width == 0.0:
        return np.where(table.cost > 0.0, np.iinfo(np.int64).max, 0)
    # Round the bucket up: rounding down lets the sum exceed the budget.
    return np.asarray(np.ceil(np.minimum(table.cost / width, 2.0**40)), dtype=np.int64)


def bucket_table(tables: Sequence[Reduced], free: float, buckets: int) -> BucketTable:
    """Return the table of costs up to ``free`` above the cheapest policy's, rounded up to buckets."""
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
    return BucketTable(tables, least_LB, width)


class ExactTable:
    """Every undominated (cost, error) sum of all layers, with the picks that lead to it."""

    def __init__(self, cost_P: FloatArray, picks_PL: IntArray) -> None:
        self.cost_P = cost_P
        self.picks_PL = picks_PL

    def steps(self) -> FloatArray:
        """Return the cost of every solution above the cheapest."""
        return self.cost_P

    def solutions(self, free_P: FloatArray) -> IntArray:
        """Return the rungs, (P, L), of the solutions within costs above the cheapest."""
        # Sums rise in cost and fall in error: the last one that fits is the best.
        last_P = np.searchsorted(self.cost_P, free_P, side="right") - 1
        return self.picks_PL[np.maximum(last_P, 0)]


def exact_table(tables: Sequence[Reduced], free: float) -> ExactTable | None:
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
    return ExactTable(cost_P, picks_PL)
