"""Moves of one layer at a time between feasible policies: bring down to the budget, use what is left of it.

Shapes: L layers, C choices of the largest layer (padded), D constraints.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autoprune.envs.problem import Assignment, FloatArray, IntArray, Problem
from autoprune.envs.reach import useful_rows


class Moves:
    """Repair and fill under one table of errors.

    Args:
        problem: Gives costs and limits.
        error_LC: Additive errors by which moves are weighed; the problem's single-layer errors by default.
    """

    def __init__(self, problem: Problem, error_LC: Sequence[npt.NDArray[np.float64]] | None = None) -> None:
        self.problem = problem
        errors = problem.errors_LC if error_LC is None else error_LC
        layers, most = len(problem.sizes), max(problem.sizes)
        self._cost_LCD = np.full((layers, most, len(problem.limits_D)), np.inf)
        self._error_LC = np.full((layers, most), np.inf)
        for layer, (costs_CD, error_C) in enumerate(zip(problem.costs_LCD, errors, strict=True)):
            self._cost_LCD[layer, : len(costs_CD)] = costs_CD
            self._error_LC[layer, : len(error_C)] = np.where(np.isfinite(error_C), error_C, 1e9)
        self._rows = np.arange(layers)
        self._scale_D = np.maximum(problem.limits_D, 1e-12)

    @functools.cached_property
    def _ladders(self) -> list[IntArray]:
        return useful_choices(self.problem)

    def repair(self, assignment: Assignment) -> Assignment:
        """Return a feasible assignment: while over budget, the move that costs least error per excess it removes."""
        current = np.array(assignment, dtype=np.int64)
        while not self.problem.feasible(current.tolist()):
            totals_LCD, error_LC = self._after_moves(current)
            excess = np.maximum(totals_LCD - self.problem.limits_D, 0.0) / self._scale_D
            excess_LC = excess.sum(axis=2)
            gain_LC = excess_LC[0, current[0]] - excess_LC
            useful_LC = gain_LC > 1e-12
            if not useful_LC.any():
                return self.problem.decode_down(tuple(current.tolist()))
            price_LC = np.where(useful_LC, error_LC / np.where(useful_LC, gain_LC, 1.0), np.inf)
            # A move that removes excess and error at once is best by what it removes, not by their ratio.
            price_LC = np.where(useful_LC & (error_LC <= 0.0), -1e12 * gain_LC, price_LC)
            self._take(current, price_LC)
        return tuple(current.tolist())

    def fill(self, assignment: Assignment) -> Assignment:
        """Return a feasible assignment no worse under the table: while a move fits and lowers the error, the best."""
        current = np.array(assignment, dtype=np.int64)
        while True:
            totals_LCD, error_LC = self._after_moves(current)
            fits_LC = (totals_LCD <= self.problem.limits_D).all(axis=2)
            useful_LC = fits_LC & (error_LC < -1e-12)
            if not useful_LC.any():
                return tuple(current.tolist())
            used_D = self.problem.costs(current.tolist())
            growth_LC = np.maximum((totals_LCD - used_D) / self._scale_D, 1e-9).max(axis=2)
            self._take(current, np.where(useful_LC, error_LC, np.inf) / np.where(useful_LC, growth_LC, 1.0))

    def neighbours(self, assignment: IntArray, reach: int = 3) -> IntArray:
        """Return feasible assignments one move away, (N, L): a layer up or down, or one up and another down.

        Args:
            assignment: (L,), feasible.
            reach: Most rungs of a layer's ladder (its undominated choices by cost) taken in one move.
        """
        ups, downs = self._single_moves(assignment, reach)
        used_D = self.problem.costs(assignment.tolist())
        up_UD, down_WD = self._changes(assignment, ups), self._changes(assignment, downs)
        limits_D = self.problem.limits_D
        pairs_UW = (used_D + up_UD[:, None, :] + down_WD[None, :, :] <= limits_D).all(axis=2)
        pairs_UW &= ups[:, None, 0] != downs[None, :, 0]
        up_P, down_P = np.nonzero(pairs_UW)
        moves = [(ups[up_P], downs[down_P])]
        for single, change_D in ((ups, up_UD), (downs, down_WD)):
            fits = single[(used_D + change_D <= limits_D).all(axis=1)]
            moves.append((fits, fits))
        found = []
        for first, second in moves:
            block = np.repeat(assignment[None, :], len(first), axis=0)
            row = np.arange(len(first))
            block[row, first[:, 0]] = first[:, 1]
            block[row, second[:, 0]] = second[:, 1]
            found.append(block)
        moved = np.concatenate(found)
        if self.problem.separable:
            return moved
        # Two layers that meet in a third change its cost together.
        return np.asarray(moved[(self.problem.costs_of(moved) <= limits_D).all(axis=1)])

    def _single_moves(self, assignment: IntArray, reach: int) -> tuple[IntArray, IntArray]:
        """Return moves (layer, choice) to dearer and to cheaper rungs, (N, 2) each."""
        ups, downs = [], []
        for layer, ladder in enumerate(self._ladders):
            costs = self._cost_LCD[layer, ladder, 0]
            here = self._cost_LCD[layer, assignment[layer], 0]
            # The present choice need not be on the ladder: repair and fill may take any.
            dearer = np.flatnonzero(costs > here)[:reach]
            cheaper = np.flatnonzero(costs < here)[::-1][:reach]
            ups += [(layer, ladder[rung]) for rung in dearer]
            downs += [(layer, ladder[rung]) for rung in cheaper]
        return np.array(ups, dtype=np.int64).reshape(-1, 2), np.array(downs, dtype=np.int64).reshape(-1, 2)

    def _changes(self, assignment: IntArray, moves: IntArray) -> FloatArray:
        totals_LCD = self.problem.after_moves(assignment)
        return np.asarray(totals_LCD[moves[:, 0], moves[:, 1]] - self.problem.costs(assignment.tolist()))

    def _after_moves(self, current: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return total costs (L, C, D) and change of error (L, C) after each single-layer move."""
        totals_LCD = self.problem.after_moves(current)
        error_LC = self._error_LC - self._error_LC[self._rows, current][:, None]
        return totals_LCD, error_LC

    @staticmethod
    def _take(current: IntArray, price_LC: FloatArray) -> None:
        layer, choice = np.unravel_index(int(price_LC.argmin()), price_LC.shape)
        current[layer] = choice


def useful_choices(problem: Problem) -> list[IntArray]:
    """Return per layer the choices that no other undercuts in error and every cost at once, by rising first cost."""
    return useful_rows(problem.errors_LC, problem.costs_LCD)
