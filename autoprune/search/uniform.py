"""The uniform baseline: one scheme at one density for every layer."""

from __future__ import annotations

from autoprune.envs.problem import Assignment, Problem, scheme
from autoprune.search.base import Account, Searcher
from autoprune.search.moves import Moves


def uniform_assignments(problem: Problem) -> list[Assignment]:
    """Return for each scheme the densest uniform policy that meets the budget, by rising additive error.

    A layer that the scheme does not fit, or does not make cheaper, stays dense. When no scheme meets the budget
    uniformly, the sparsest uniform policies are brought down to it.
    """
    names = sorted({scheme(choice) for choices in problem.choices for choice in choices[1:]})
    ladders = {name: _ladder(problem, name) for name in names}
    fitting = [next((rung for rung in ladder if problem.feasible(rung)), None) for ladder in ladders.values()]
    found = [assignment for assignment in fitting if assignment is not None]
    if not found:
        moves = Moves(problem)
        found = [moves.repair(ladder[-1]) for ladder in ladders.values()]
    return sorted(dict.fromkeys(found), key=lambda assignment: (problem.additive_error(assignment), assignment))


def _ladder(problem: Problem, name: str) -> list[Assignment]:
    """Return the scheme's uniform policies by falling density."""
    densities = sorted(
        {
            round(choice.density(layer), 6)
            for layer, choices in zip(problem.layers, problem.choices, strict=True)
            for choice in choices[1:]
            if scheme(choice) == name
        },
        reverse=True,
    )
    return [tuple(_nearest(problem, layer, name, d) for layer in range(len(problem.layers))) for d in densities]


def _nearest(problem: Problem, layer: int, name: str, density: float) -> int:
    spec, choices, costs_CD = problem.layers[layer], problem.choices[layer], problem.costs_LCD[layer]
    members = [index for index, choice in enumerate(choices) if index > 0 and scheme(choice) == name]
    cheaper = [index for index in members if (costs_CD[index] < costs_CD[0]).any()]
    if not cheaper:
        return 0
    return min(cheaper, key=lambda index: (abs(choices[index].density(spec) - density), index))


class UniformSearcher(Searcher):
    """Evaluates one policy per scheme, the most promising ones first."""

    name = "uniform"

    def propose(self, account: Account, seed: int) -> None:
        for assignment in uniform_assignments(account.problem):
            account.evaluate(assignment)
