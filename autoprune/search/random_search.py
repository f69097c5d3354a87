"""Random feasible policies: the baseline that every searcher must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoprune.envs.problem import Assignment, Problem
from autoprune.search.base import Account, Searcher

# Proposals in a row that are all known already: the space is as good as exhausted.
_PATIENCE = 200


class RandomSearcher(Searcher):
    """Draws policies from the whole feasible space, each brought close to the budget.

    Knows the costs, not the errors: a choice that is dearer than dense is never drawn.
    """

    name = "random"

    def propose(self, account: Account, seed: int) -> None:
        rng = np.random.default_rng(seed)
        known = 0
        while known < _PATIENCE:
            before = account.left
            account.evaluate(random_assignment(account.problem, rng))
            known = known + 1 if account.left == before else 0


def random_assignment(
    problem: Problem, rng: np.random.Generator, rows: Sequence[Sequence[int]] | None = None
) -> Assignment:
    """Return a random feasible assignment that uses most of the first constraint's budget.

    Random choices everywhere; then random layers step down to a random cheaper choice until the budget is met, and
    random layers step up to a random dearer one that fits.

    Args:
        problem: What is searched.
        rng: Draws.
        rows: Choices to draw from, per layer; by default all that are no dearer than dense.
    """
    layers = range(len(problem.layers))
    candidates = [_no_dearer_than_dense(problem, layer) if rows is None else rows[layer] for layer in layers]
    current = [int(rng.choice(options)) for options in candidates]
    for _ in range(50 * len(current)):
        if problem.feasible(current):
            break
        layer = int(rng.integers(len(current)))
        _step(problem, current, layer, candidates[layer], rng, up=False)
    return filled_up(problem, problem.decode_down(current), rng, candidates)


def filled_up(
    problem: Problem, assignment: Assignment, rng: np.random.Generator, rows: Sequence[Sequence[int]]
) -> Assignment:
    """Return a feasible assignment with random layers stepped up to a random dearer choice of theirs that fits."""
    current = list(assignment)
    for layer in np.concatenate([rng.permutation(len(current)) for _ in range(3)]):
        _step(problem, current, int(layer), rows[layer], rng, up=True)
    return tuple(current)


def _no_dearer_than_dense(problem: Problem, layer: int) -> list[int]:
    costs_CD = problem.costs_LCD[layer]
    return [int(index) for index in np.flatnonzero((costs_CD <= costs_CD[0]).any(axis=1))]


def _step(
    problem: Problem, current: list[int], layer: int, options: Sequence[int], rng: np.random.Generator, *, up: bool
) -> None:
    costs_C = problem.costs_LCD[layer][:, 0]
    here = costs_C[current[layer]]
    ways = [index for index in options if (costs_C[index] > here if up else costs_C[index] < here)]
    if up:
        ways = [index for index in ways if problem.feasible([*current[:layer], index, *current[layer + 1 :]])]
    if ways:
        current[layer] = int(rng.choice(ways))
