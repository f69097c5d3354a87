"""Sensitivity analysis: every layer is pruned alone as far as one common threshold of error allows.

The classical baseline: each layer takes its cheapest choice whose single-layer error is at most T, and T is the least
threshold whose policy meets the budget. It ignores how layers interact, and what a layer's pruning saves.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (2017), with the threshold as in AMC's comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from autoprune.core.sensitivity import CurvePoint, LayerCurve, Sensitivity
from autoprune.envs.problem import Assignment, Problem, scheme
from autoprune.search.base import Account, Searcher
from autoprune.search.moves import Moves


def least_threshold(problem: Problem, among: list[list[int]] | None = None) -> tuple[float, Assignment]:
    """Return the least threshold, nats, whose policy meets the budget, and that policy; found by bisection.

    Where even the cheapest choices of ``among`` exceed the budget, the threshold is infinite and its policy is brought
    down to the budget.

    Args:
        problem: Gives single-layer errors and costs.
        among: Choices of each layer to consider; all by default.
    """
    options = among or [list(range(size)) for size in problem.sizes]
    values = {float(problem.errors_LC[layer][index]) for layer, row in enumerate(options) for index in row}
    levels = sorted(value for value in values if np.isfinite(value))
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        if problem.feasible(_policy(problem, options, levels[middle])):
            high = middle
        else:
            low = middle + 1
    if low < len(levels):
        return levels[low], _policy(problem, options, levels[low])
    return float("inf"), Moves(problem).repair(_policy(problem, options, float("inf")))


def _policy(problem: Problem, options: Iterable[list[int]], threshold: float) -> Assignment:
    """Return the policy of one threshold; of several costs the share of the limits counts that is largest."""
    picks = []
    for layer, row in enumerate(options):
        errors_C = problem.errors_LC[layer]
        share_C = (problem.costs_LCD[layer] / np.maximum(problem.limits_D, 1e-12)).max(axis=1)
        allowed = [index for index in row if errors_C[index] <= threshold] or [int(np.argmin(errors_C))]
        picks.append(min(allowed, key=lambda index: (share_C[index], errors_C[index], index)))
    return tuple(picks)


class SensitivitySearcher(Searcher):
    """The threshold's policy over all choices, then of each scheme by itself."""

    name = "sensitivity"

    def propose(self, account: Account, seed: int) -> None:
        problem = account.problem
        account.evaluate(least_threshold(problem)[1])
        names = sorted({scheme(choice) for choices in problem.choices for choice in choices[1:]})
        found = []
        for name in names:
            members = [
                [0, *(index for index, choice in enumerate(choices) if index > 0 and scheme(choice) == name)]
                for choices in problem.choices
            ]
            found.append(least_threshold(problem, members)[1])
        for assignment in sorted(found, key=lambda assignment: (problem.additive_error(assignment), assignment)):
            account.evaluate(assignment)


def sensitivity_of(problem: Problem) -> Sensitivity:
    """Return the curves of single-layer errors, and the threshold that sensitivity analysis sets for the budget."""
    threshold = least_threshold(problem)[0]
    curves = [
        LayerCurve(
            layer=layer.name,
            points=[
                CurvePoint(choice=choice.text, density=choice.density(layer), error=float(error))
                for choice, error in zip(choices, errors_C, strict=True)
                if math.isfinite(error)
            ],
        )
        for layer, choices, errors_C in zip(problem.layers, problem.choices, problem.errors_LC, strict=True)
    ]
    return Sensitivity(threshold=threshold if math.isfinite(threshold) else None, layers=curves)
