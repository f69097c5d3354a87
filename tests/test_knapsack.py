"""The exact solver against brute force."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_problem

from autoprune.core.errors import InfeasibleBudget
from autoprune.search.dp_tables import bucket_table, reduced
from autoprune.search.knapsack import KnapsackSearcher, pareto, solve, solve_front, solve_problem
from autoprune.search.moves import Moves, useful_choices
from autoprune.search.study import Study

# Whole numbers: their sums are exact, so that the comparison with brute force needs no tolerance.
_VALUES = st.integers(0, 30).map(float)
_LAYER = st.lists(st.tuples(_VALUES, _VALUES), min_size=1, max_size=4)
_PROBLEMS = st.tuples(st.lists(_LAYER, min_size=1, max_size=5), st.floats(0.0, 1.0))


def tables(layers: list[list[tuple[float, float]]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [np.array([e for e, _ in layer]) for layer in layers], [np.array([c for _, c in layer]) for layer in layers]


def totals(errors: list[np.ndarray], costs: list[np.ndarray], picks: np.ndarray) -> tuple[float, float]:
    error = sum(float(row[pick]) for row, pick in zip(errors, picks, strict=True))
    return error, sum(float(row[pick]) for row, pick in zip(costs, picks, strict=True))


def brute_force(errors: list[np.ndarray], costs: list[np.ndarray], budget: float) -> float:
    every = itertools.product(*(range(len(row)) for row in errors))
    scored = (totals(errors, costs, np.array(picks)) for picks in every)
    return min(error for error, cost in scored if cost <= budget)


def between(costs: list[np.ndarray], share: float) -> float:
    low, high = sum(row.min() for row in costs), sum(row.max() for row in costs)
    return float(np.floor(low + share * (high - low)))


@given(_PROBLEMS)
def test_knapsack_never_exceeds_budget_and_small_spaces_are_exact(
    problem: tuple[list[list[tuple[float, float]]], float],
) -> None:
    errors, costs = tables(problem[0])
    budget = between(costs, problem[1])
    error, cost = totals(errors, costs, solve(errors, costs, budget))
    assert cost <= budget
    assert error == brute_force(errors, costs, budget)


@given(_PROBLEMS, st.integers(5, 200))
def test_bucketed_knapsack_keeps_the_budget_and_the_rounding_bound(
    problem: tuple[list[list[tuple[float, float]]], float], buckets: int
) -> None:
    errors, costs = tables(problem[0])
    budget = between(costs, problem[1])
    layers = [reduced(e, c) for e, c in zip(errors, costs, strict=True)]
    floor = sum(table.floor for table in layers)
    table = bucket_table(layers, budget - floor, buckets)
    (picks,) = table.solutions(np.array([budget - floor]))
    error, cost = totals(errors, costs, np.array([t.index[p] for t, p in zip(layers, picks, strict=True)]))
    assert cost <= budget + 1e-9
    bound = budget - len(errors) * (budget - floor) / buckets
    if bound >= floor:
        assert error <= brute_force(errors, costs, bound) + 1e-9


def random_tables(layers: int, choices: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    costs = [np.sort(rng.random(choices)) * 10 for _ in range(layers)]
    return [(10 - cost) ** 2 * rng.random() for cost in costs], costs


def test_one_table_yields_the_whole_pareto_curve() -> None:
    errors, costs = random_tables(12, 8)
    budgets = [between(costs, share) for share in (0.1, 0.3, 0.5, 0.8)]
    curve = pareto(errors, costs, budgets)
    assert curve.shape == (4, 12)
    found = [totals(errors, costs, picks) for picks in curve]
    assert [error for error, _ in found] == sorted((error for error, _ in found), reverse=True)
    for budget, (error, cost) in zip(budgets, found, strict=True):
        assert cost <= budget
        assert error == pytest.approx(totals(errors, costs, solve(errors, costs, budget))[0], rel=0.02)


@given(_PROBLEMS)
def test_the_front_of_a_small_space_is_exact(problem: tuple[list[list[tuple[float, float]]], float]) -> None:
    errors, costs = tables(problem[0])
    front = solve_front(errors, costs)
    every = [totals(errors, costs, np.array(p)) for p in itertools.product(*(range(len(row)) for row in errors))]
    best = {(e, c) for e, c in every if not any((x <= e and y <= c) and (x, y) != (e, c) for x, y in every)}
    assert {(float(e), float(c)) for e, c in zip(front.error_P, front.cost_P, strict=True)} == best
    for picks, error, cost in zip(front.picks_PL, front.error_P, front.cost_P, strict=True):
        assert totals(errors, costs, picks) == (error, cost)


def test_the_front_of_a_large_space_is_what_single_budgets_give() -> None:
    errors, costs = random_tables(30, 12, seed=3)
    front = solve_front(errors, costs, buckets=4_000)
    assert len(front.cost_P) > 500
    assert (np.diff(front.cost_P) > 0).all()
    assert (np.diff(front.error_P) < 0).all()
    assert front.error_P[-1] == pytest.approx(sum(float(row.min()) for row in errors))
    for share in (0.2, 0.5, 0.8):
        budget = between(costs, share)
        at = int(np.searchsorted(front.cost_P, budget, side="right")) - 1
        alone = totals(errors, costs, solve(errors, costs, budget, buckets=4_000))[0]
        assert front.error_P[at] == pytest.approx(alone, rel=0.02)
    assert solve_front(errors, costs, between(costs, 0.4)).cost_P[-1] <= between(costs, 0.4)
    with pytest.raises(InfeasibleBudget):
        solve_front(errors, costs, 0.0)


def test_a_budget_below_the_cheapest_choices_is_infeasible() -> None:
    with pytest.raises(InfeasibleBudget, match="least cost that can be reached is 3"):
        solve([[0.0, 1.0], [0.0, 1.0]], [[5.0, 1.0], [5.0, 2.0]], 2.9)
    assert solve([[0.0, 1.0], [0.0, 1.0]], [[5.0, 1.0], [5.0, 2.0]], 3.0).tolist() == [1, 1]


def test_an_unbounded_budget_takes_the_least_error() -> None:
    errors, costs = random_tables(30, 10)
    assert solve(errors, costs, 1e9).tolist() == [int(row.argmin()) for row in errors]


def test_a_broken_choice_is_taken_only_when_nothing_else_fits() -> None:
    errors, costs = [[0.0, 3.0, np.inf], [0.0, np.nan]], [[9.0, 5.0, 1.0], [4.0, 1.0]]
    assert solve(errors, costs, 10.0).tolist() == [1, 0]
    assert solve(errors, costs, 8.0).tolist() in ([1, 1], [2, 0])
    assert solve(errors, costs, 2.0).tolist() == [2, 1]


def test_fifty_layers_take_at_most_50_ms_of_a_core() -> None:
    errors, costs = random_tables(50, 16)
    budget = between(costs, 0.5)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        solve(errors, costs, budget, buckets=10_000)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.05


def test_a_whole_search_takes_at_most_a_second_of_a_core() -> None:
    problem = make_problem(layers=50)
    start = time.process_time()
    KnapsackSearcher().search(problem, Study(problem), 1, 0)
    assert time.process_time() - start <= 1.0


@pytest.mark.parametrize("seed", range(3))
def test_two_constraints_are_both_kept_and_close_to_the_best(seed: int) -> None:
    problem = make_problem(layers=5, seed=seed, budget=0.5, macs=0.35)
    ladders = useful_choices(problem)
    found = solve_problem(problem)
    assert problem.feasible(found)
    every = itertools.product(*(ladder.tolist() for ladder in ladders))
    cost_LC = [costs[:, :] for costs in problem.costs_LCD]
    best = np.inf
    for picks in itertools.islice(every, 400_000):
        error = sum(problem.errors_LC[layer][pick] for layer, pick in enumerate(picks))
        if error < best:
            used = sum(cost_LC[layer][pick] for layer, pick in enumerate(picks))
            best = error if (used <= problem.limits_D).all() else best
    assert problem.additive_error(found) <= 1.1 * best


@pytest.mark.parametrize("macs", [None, 0.3])
def test_moves_stay_within_the_budget_and_fill_never_worsens(macs: float | None) -> None:
    problem = make_problem(layers=8, seed=1, macs=macs)
    moves = Moves(problem)
    rng = np.random.default_rng(0)
    for _ in range(30):
        start = tuple(int(rng.integers(size)) for size in problem.sizes)
        repaired = moves.repair(start)
        assert problem.feasible(repaired)
        filled = moves.fill(repaired)
        assert problem.feasible(filled)
        assert problem.additive_error(filled) <= problem.additive_error(repaired) + 1e-12
        near = moves.neighbours(np.array(filled))
        assert all(problem.feasible(row) for row in near.tolist())
        assert ((near != np.array(filled)).sum(axis=1) <= 2).all()


def test_dominated_choices_are_left_out_of_ladders() -> None:
    problem = make_problem(layers=4, seed=2)
    for ladder, error, cost in zip(useful_choices(problem), problem.errors_LC, problem.costs_LCD, strict=True):
        assert (np.diff(cost[ladder, 0]) > 0).all()
        assert (np.diff(error[ladder]) < 0).all()
        outside = set(range(len(error))) - set(ladder.tolist())
        for index in outside:
            assert any(error[i] <= error[index] and cost[i, 0] <= cost[index, 0] for i in ladder)
