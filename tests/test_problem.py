"""The gate: budgets, memo, counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import layer_choices, layer_specs, make_problem

from autoprune.core.errors import InfeasibleBudget
from autoprune.envs.problem import Assignment, Constraint, Problem, Quality
from autoprune.envs.reach import cheapest_suffixes, undominated

_LAYERS = layer_specs(3)
_CHOICES = {layer.name: layer_choices(layer)[:3] for layer in _LAYERS}


def tiny(latency: float = 12.0, second: list[list[float]] | None = None, limit: float = 0.0, **more: object) -> Problem:
    costs = [[10.0, 4.0, 2.0], [8.0, 3.0, 2.0], [6.0, 5.0, 1.0]]
    constraints = [Constraint("latency", tuple(np.array(row) for row in costs), latency)]
    if second is not None:
        constraints.append(Constraint("size", tuple(np.array(row) for row in second), limit))
    errors = [np.array([0.0, 0.1, 0.4])] * 3
    calls: list[Assignment] = []

    def evaluate(assignment: Assignment) -> Quality:
        calls.append(assignment)
        return Quality(float(sum(assignment)), 0.5, 0.0)

    problem = Problem(_LAYERS, _CHOICES, constraints, errors, evaluate, **more)  # type: ignore[arg-type]
    problem.calls = calls  # type: ignore[attr-defined]
    return problem


def test_cheapest_suffix_is_what_the_remaining_layers_can_be_brought_to() -> None:
    problem = tiny()
    assert problem.cheapest().tolist() == [2.0, 2.0, 1.0]
    assert problem.cheapest_suffix().tolist() == [5.0, 3.0, 1.0, 0.0]


def test_allowed_choices_are_exactly_those_with_a_completion() -> None:
    problem = tiny(12.0)
    assert problem.allowed(()) == [1, 2]
    assert problem.allowed((1,)) == [1, 2]
    assert problem.allowed((1, 1)) == [1, 2]
    assert problem.allowed((2, 0)) == [2]


def test_each_policy_is_scored_once_and_counted() -> None:
    problem = tiny()
    assert problem.evaluate((1, 1, 1)) == problem.evaluate([1, 1, 1])
    problem.evaluate((2, 1, 1))
    assert problem.evaluations == 2
    assert problem.calls == [(1, 1, 1), (2, 1, 1)]  # type: ignore[attr-defined]


def test_a_remembered_policy_is_not_scored_again() -> None:
    problem = tiny()
    problem.remember((1, 1, 1), Quality(0.25, 0.9, 3.0))
    assert problem.evaluate((1, 1, 1)).error == 0.25
    assert problem.evaluations == 0


def test_an_error_that_is_no_number_counts_as_the_worst() -> None:
    problem = tiny()
    problem._evaluate = lambda assignment: Quality(math.nan, 0.1, 0.0)
    assert problem.evaluate((1, 1, 1)).error == math.inf


def test_a_budget_equal_to_the_least_is_met() -> None:
    problem = tiny(5.0)
    assert problem.decode_down((0, 0, 0)) == (2, 2, 2)
    assert problem.feasible((2, 2, 2))
    assert not problem.feasible((2, 2, 1))


def test_an_infeasible_budget_names_the_least_and_the_layer_that_holds_it_up() -> None:
    with pytest.raises(InfeasibleBudget, match=r"latency 4.5us; the least .* is 5us \(held up by layer0\)"):
        tiny(4.5)
    with pytest.raises(InfeasibleBudget, match=r"latency 14 %; the least this space reaches is 15 %"):
        tiny(4.0, describe=lambda kind, cost: f"{cost + 10:g} %")


def test_limits_that_exclude_each_other_are_refused_together() -> None:
    opposed = [[1.0, 9.0, 9.0]] * 3
    with pytest.raises(InfeasibleBudget, match=r"latency 8us and size 20B cannot hold together"):
        tiny(8.0, opposed, 20.0)


def test_additive_error_and_names_follow_the_assignment() -> None:
    problem = tiny()
    assert problem.additive_error((0, 1, 2)) == pytest.approx(0.5)
    assert problem.named((0, 1, 2)) == {layer.name: _CHOICES[layer.name][i] for i, layer in enumerate(_LAYERS)}


@pytest.mark.parametrize("wrong", [(0, 0), (0, 0, 3), (0, 0, -1)])
def test_an_assignment_of_another_problem_is_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not index"):
        tiny().evaluate(wrong)


def test_tables_of_another_shape_are_refused() -> None:
    constraint = Constraint("latency", (np.ones(3),) * 3, 9.0)
    with pytest.raises(ValueError, match="rows of"):
        Problem(_LAYERS, _CHOICES, [constraint], (np.ones(2),) * 3, lambda a: Quality(0.0, 0.0, 0.0))


@given(st.integers(0, 10_000), st.floats(0.15, 1.0), st.one_of(st.none(), st.floats(0.15, 1.0)))
def test_following_allowed_choices_never_exceeds_a_budget(seed: int, share: float, macs: float | None) -> None:
    rng = np.random.default_rng(seed)
    try:
        problem = make_problem(layers=6, seed=seed % 7, budget=share, macs=macs)
    except InfeasibleBudget:
        return
    prefix: list[int] = []
    for _ in problem.layers:
        allowed = problem.allowed(prefix)
        assert allowed
        prefix.append(int(rng.choice(allowed)))
    assert problem.feasible(prefix)
    raw = tuple(int(rng.integers(size)) for size in problem.sizes)
    assert problem.feasible(problem.decode_down(raw))


@given(st.integers(0, 10_000))
def test_a_choice_is_refused_only_when_no_completion_exists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = [rng.integers(1, 9, 3).astype(float) for _ in range(3)]
    other = [rng.integers(1, 9, 3).astype(float) for _ in range(3)]
    limits = rng.integers(6, 20, 2).astype(float)
    sums = [
        (sum(c[i] for c, i in zip(costs, p, strict=True)), sum(o[i] for o, i in zip(other, p, strict=True)), p)
        for p in np.ndindex(3, 3, 3)
    ]
    possible = {p for first, second, p in sums if first <= limits[0] and second <= limits[1]}
    constraints = [Constraint("latency", tuple(costs), limits[0]), Constraint("size", tuple(other), limits[1])]
    arguments = (_LAYERS, _CHOICES, constraints, (np.zeros(3),) * 3, lambda a: Quality(0.0, 0.0, 0.0))
    if not possible:
        with pytest.raises(InfeasibleBudget):
            Problem(*arguments)
        return
    problem = Problem(*arguments)
    for prefix in [(), (0,), (1,), (2,), (0, 1), (1, 2), (2, 0)]:
        if any(p[: len(prefix)] == prefix for p in possible):
            assert set(problem.allowed(prefix)) == {p[len(prefix)] for p in possible if p[: len(prefix)] == prefix}


def test_a_thinned_front_holds_only_sums_that_exist() -> None:
    rng = np.random.default_rng(0)
    layers = [rng.random((40, 3)) for _ in range(6)]
    fronts = cheapest_suffixes(layers, np.ones(3))
    assert all(len(front) <= 600 for front in fronts)
    for row, front in enumerate(fronts[:-1]):
        sums = (layers[row][:, None, :] + fronts[row + 1][None, :, :]).reshape(-1, 3)
        distance = np.abs(front[:, None, :] - sums[None, :, :]).sum(axis=2).min(axis=1)
        assert (distance < 1e-12).all()


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_undominated_points_are_those_that_nothing_undercuts(parts: int) -> None:
    points = np.random.default_rng(parts).integers(0, 6, (60, parts)).astype(float)
    kept = {tuple(point) for point in undominated(points)}
    for point in {tuple(point) for point in points}:
        undercut = any(tuple(other) != point and (other <= np.array(point)).all() for other in points)
        assert (point in kept) == (not undercut)
