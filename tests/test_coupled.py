"""Costs that layers share: true sums, budgets kept, the solver against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.errors import InfeasibleBudget
from autoprune.core.layers import LayerSpec
from autoprune.envs.coupled import CoupledProblem, Factor
from autoprune.envs.problem import Constraint, Quality
from autoprune.search import coupled
from autoprune.search.base import SEARCHERS
from autoprune.search.knapsack import solve_problem
from autoprune.search.moves import Moves
from autoprune.search.study import Study

WIDTHS = (32, 24, 16, 8)
CHAIN = ((0,), (0, 1), (1, 2), (2, 3), (3,))
RESIDUAL = ((1,), (0, 1), (0,), (1, 2), (1, 2), (1, 3), (2, 3), (3,))
CONCAT = ((0,), (1,), (0, 1, 2), (0, 1, 2, 3), (3,))


def choices_of() -> tuple[Choice, ...]:
    return (Dense(), *(Channels(width / 32) for width in WIDTHS[1:]))


def factor(units: tuple[int, ...], rng: np.random.Generator, constraints: int) -> Factor:
    """One layer that reads its first groups and writes the last; costs wander about the product of widths."""
    read, written = units[:-1] or units, units[-1]
    whole = (32 * len(read), 32, 1)
    losses = []
    for unit in units:
        lost = [((32 - w) * (unit in read), (32 - w) * (unit == written), 0) for w in WIDTHS]
        losses.append(lost)
    costs = {}
    for lost in itertools.product(*losses):
        key = tuple(int(w - sum(part)) for w, part in zip(whole, zip(*lost, strict=True), strict=True))
        costs[key] = [key[0] * key[1] / 100.0 * rng.uniform(0.8, 1.2) for _ in range(constraints)]
    return Factor.make(units, whole, losses, costs)  # type: ignore[arg-type]


def make(
    graph: tuple[tuple[int, ...], ...], seed: int, budget: float = 0.5, constraints: int = 1
) -> CoupledProblem:
    rng = np.random.default_rng(seed)
    count = max(max(units) for units in graph) + 1
    layers = [LayerSpec(f"layer{i}", "conv", (32, 32, 3, 3), input_hw=(8, 8), output_hw=(8, 8)) for i in range(count)]
    factors = [factor(units, rng, constraints) for units in graph]
    errors = [np.append(0.0, np.sort(rng.exponential(0.1, 3))) for _ in layers]
    zeros = tuple(np.zeros(4) for _ in layers)
    dense_D = sum(f.costs(np.zeros((1, len(f.units)), dtype=np.int64))[0] for f in factors)
    kinds = ("latency", "size")[:constraints]
    limits = [Constraint(kind, zeros, budget * float(cost)) for kind, cost in zip(kinds, dense_D, strict=True)]

    def evaluate(assignment: tuple[int, ...]) -> Quality:
        error = sum(errors[i][a] for i, a in enumerate(assignment))
        return Quality(float(error) ** 1.1, 1.0 - float(error), 0.0)

    named = {layer.name: choices_of() for layer in layers}
    return CoupledProblem(layers, named, limits, factors, errors, evaluate, followers={"layer0": ("twin",)})


def everything(problem: CoupledProblem) -> np.ndarray:
    return np.array(list(itertools.product(*(range(size) for size in problem.sizes))))


@pytest.mark.parametrize("graph", [CHAIN, RESIDUAL, CONCAT])
def test_the_cost_of_a_policy_is_the_sum_of_its_layers_in_their_shapes(graph: tuple[tuple[int, ...], ...]) -> None:
    problem = make(graph, 1)
    for row in everything(problem)[::7]:
        slow = sum(f.costs(row[None, list(f.units)])[0, 0] for f in problem.factors)
        assert problem.costs(row.tolist())[0] == pytest.approx(slow)
        assert problem.costs_of(row[None])[0, 0] == pytest.approx(slow)
        after = problem.after_moves(row)
        for layer, choice in ((0, 1), (len(row) - 1, 3)):
            moved = row.copy()
            moved[layer] = choice
            assert after[layer, choice, 0] == pytest.approx(problem.costs(moved.tolist())[0])


@given(st.sampled_from([CHAIN, RESIDUAL, CONCAT]), st.integers(0, 10_000), st.floats(0.15, 0.9))
def test_solver_finds_what_brute_force_finds_and_never_exceeds_the_budget(
    graph: tuple[tuple[int, ...], ...], seed: int, budget: float
) -> None:
    problem = make(graph, seed, budget)
    rows, buckets = everything(problem), 10_000
    costs = problem.costs_of(rows)[:, 0]
    errors = np.array([problem.additive_error(row) for row in rows])
    found = solve_problem(problem, buckets=buckets)
    assert problem.feasible(found)
    assert costs.min() <= problem.costs(found)[0] <= problem.limits_D[0] * (1 + 1e-9)
    limit = problem.limits_D[0]
    rounded = limit - len(problem.layers) * limit / buckets
    if (costs <= rounded).any():
        assert problem.additive_error(found) <= errors[costs <= rounded].min() + 1e-12


@given(st.sampled_from([CHAIN, RESIDUAL, CONCAT]), st.integers(0, 10_000), st.floats(0.2, 0.9))
def test_where_too_many_widths_are_open_the_descent_still_keeps_the_budget(
    graph: tuple[tuple[int, ...], ...], seed: int, budget: float
) -> None:
    problem = make(graph, seed, budget)
    problem._plan = "wide"
    found = solve_problem(problem)
    assert problem.feasible(found)
    rows = everything(problem)
    errors = np.array([problem.additive_error(row) for row in rows])
    kept = problem.costs_of(rows)[:, 0] <= problem.limits_D[0]
    # No exactness is claimed; far off it would be useless.
    assert problem.additive_error(found) <= 2.0 * errors[kept].min() + 0.05 * errors.max() + 1e-12


@given(st.sampled_from([CHAIN, RESIDUAL]), st.integers(0, 1_000), st.floats(0.2, 0.8))
def test_following_allowed_choices_never_runs_into_a_dead_end(
    graph: tuple[tuple[int, ...], ...], seed: int, budget: float
) -> None:
    problem = make(graph, seed, budget, constraints=2)
    rng = np.random.default_rng(seed)
    prefix: list[int] = []
    while len(prefix) < len(problem.layers):
        allowed = problem.allowed(prefix)
        assert allowed
        prefix.append(int(rng.choice(allowed)))
    assert problem.feasible(prefix)
    wanted = tuple(rng.integers(0, 4, len(prefix)).tolist())
    assert problem.feasible(problem.decode_down(wanted))
    assert problem.feasible(Moves(problem).repair(wanted))
    assert problem.feasible(solve_problem(problem, buckets=500))


def test_tables_that_would_not_fit_give_way_to_the_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coupled.elimination(make(CONCAT, 0)) is not None
    exact = solve_problem(make(CONCAT, 0))
    monkeypatch.setattr(coupled, "_CELLS", 4**3 * 500)
    problem = make(CONCAT, 0)
    assert coupled.elimination(problem) is None
    found = solve_problem(problem)
    assert problem.feasible(found)
    assert problem.additive_error(found) >= problem.additive_error(exact) - 1e-12


def test_an_impossible_budget_is_said_with_what_can_be_reached() -> None:
    with pytest.raises(InfeasibleBudget, match=r"latency .*; the least this space reaches is .* \(held up by layer"):
        make(RESIDUAL, 0, 0.01)


def test_writers_of_a_group_follow_their_leader() -> None:
    problem = make(CHAIN, 0)
    assert problem.named((2, 0, 0, 0))["twin"] == problem.named((2, 0, 0, 0))["layer0"] == Channels(0.5)
    assert "twin" not in problem.named((0, 1, 0, 0))


@pytest.mark.parametrize("name", sorted(set(SEARCHERS) - {"netadapt", "gp"}))
def test_every_searcher_keeps_a_coupled_budget(name: str) -> None:
    problem = make(RESIDUAL, 3, 0.4)
    study = Study(problem)
    best = SEARCHERS.get(name)().search(problem, study, 10, 0)
    assert best.feasible
    assert all(trial.feasible for trial in study.trials)
    assert all(problem.costs(trial.assignment)[0] <= problem.limits_D[0] * (1 + 1e-9) for trial in study.trials)
