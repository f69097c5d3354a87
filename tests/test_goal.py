"""Goals as a user writes them, and the searches for a front and for a kept accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_problem

from autoprune.core.errors import BudgetError, RunError, UnknownName
from autoprune.core.front import PREDICTED_ONLY, Front, FrontPoint
from autoprune.core.goal import parse_goal
from autoprune.core.policy import Accuracy, Policy
from autoprune.core.rundir import RunDir
from autoprune.envs.problem import Problem, Quality
from autoprune.search.base import SEARCHERS
from autoprune.search.config import SearchConfig
from autoprune.search.front import knee, non_dominated, search_front
from autoprune.search.guarantee import search_cheapest
from autoprune.search.propose import Grant, propose, searched_budget
from autoprune.search.study import Study, Trial


def test_goals_have_one_canonical_text() -> None:
    assert parse_goal("latency=50%").text == "latency=50%"
    assert parse_goal("", "accuracy = -0.50 %").text == "accuracy=-0.5%"
    assert parse_goal("size=1MB", "accuracy=−1%").text == "size=1MB,accuracy=-1%"
    front = parse_goal("", None, "latency, accuracy,size")
    assert (front.kind, front.objectives, front.text) == ("front", ("latency", "size"), "accuracy+latency+size")
    assert parse_goal("", "accuracy=0%").drop == 0.0


@pytest.mark.parametrize(
    ("constraint", "objective", "words"),
    [
        ("accuracy=-0.5", None, "add the unit: 'accuracy=-0.5%'"),
        ("accuracy=-0.5pp", None, "unit 'pp' is unknown; write 'accuracy=-0.5%'"),
        ("accuracy=0.5%", None, "0 or negative; write 'accuracy=-0.5%'"),
        ("accuracy=+2%", None, "0 or negative"),
        ("accuracy=-100%", None, "allow everything"),
        ("accuracy", None, "write the loss against dense"),
        ("accuracy=much", None, "write the loss against dense"),
        ("acuracy=-1%", None, "Did you mean 'accuracy'"),
        (None, "accuracy", "at least one of latency"),
        (None, "latency,size", "needs accuracy"),
        (None, "accuracy,latency,latency", "latency is given twice"),
        (None, "accuracy,latancy", "Did you mean 'latency'"),
        ("accuracy=-1%", "accuracy,latency", "got both"),
        (None, None, "nothing is asked for"),
    ],
)
def test_a_goal_that_cannot_be_meant_is_refused_in_one_line(
    constraint: str | None, objective: str | None, words: str
) -> None:
    with pytest.raises(BudgetError, match=words) as error:
        parse_goal("", constraint, objective)
    assert "\n" not in str(error.value)


@given(st.text(max_size=20))
def test_any_text_is_a_constraint_or_a_clear_error(text: str) -> None:
    try:
        goal = parse_goal("latency=50%", f"accuracy={text}")
    except BudgetError:
        return
    assert 0.0 <= goal.drop < 1.0


def test_what_is_searched_is_bounded_by_dense_where_no_budget_says_so() -> None:
    assert searched_budget(parse_goal("latency=50%,size=1MB")).text == "latency=50%,size=1MB"
    assert searched_budget(parse_goal("size=1MB", "accuracy=-1%")).text == "latency=100%,size=1MB"
    assert searched_budget(parse_goal("latency=60%", None, "accuracy,size,latency")).text == "size=100%,latency=60%"


def test_a_problem_under_other_limits_shares_its_evaluations() -> None:
    problem = make_problem(layers=4, budget=0.8)
    tighter = problem.limited(0.5 * problem.limits_D)
    cheap = tuple(int(costs[:, 0].argmin()) for costs in problem.costs_LCD)
    quality = problem.evaluate(cheap)
    calls = problem._evaluate.calls  # type: ignore[attr-defined]
    assert tighter.evaluate(cheap) == quality
    assert problem._evaluate.calls == calls  # type: ignore[attr-defined]
    assert tighter.fingerprint == problem.fingerprint
    assert tighter.limits_D[0] == 0.5 * problem.limits_D[0]
    assert problem.feasible((0,) * 4) is False


@pytest.mark.parametrize("agent", ["nsga2", "tpe", "auto", "cmaes", "knapsack"])
@pytest.mark.parametrize("macs", [None, 0.9])
def test_a_front_holds_no_dominated_policy_and_spans_the_costs(agent: str, macs: float | None) -> None:
    problem = make_problem(layers=5, budget=1.0, macs=macs)
    study = Study(problem)
    told: list[tuple[int, int]] = []
    count = 40 if macs is None else 20
    search_front(SEARCHERS.get(agent)(), problem, study, count, 0, lambda done, total: told.append((done, total)))
    assert 0 < len(study.trials) <= count
    assert told[-1][0] <= told[-1][1] == count
    front = non_dominated(study.trials)
    points = np.array([[*trial.costs.values(), trial.quality.error] for trial in front])
    for place, point in enumerate(points):
        others = np.delete(points, place, axis=0)
        assert not (others <= point).all(axis=1).any()
    everything = [[*trial.costs.values(), trial.quality.error] for trial in study.trials]
    assert all((points <= np.array(row)).all(axis=1).any() for row in everything)
    if macs is None:
        assert len(front) >= 5
        assert points[0, 0] < 0.5 * points[-1, 0]


@pytest.mark.parametrize("agent", ["nsga2", "spdy"])
def test_a_front_resumes_to_the_same_policies(agent: str, tmp_path: Path) -> None:
    def run(problem: Problem, path: Path | None) -> list[Trial]:
        study = Study(problem, path)
        search_front(SEARCHERS.get(agent)(), problem, study, 24, 5)
        study.close()
        return [(trial.assignment, trial.quality.error) for trial in study.trials]

    whole = run(make_problem(layers=4, budget=1.0), None)
    problem = make_problem(layers=4, budget=1.0)
    score, left = problem._evaluate, [9]

    def killed(assignment: tuple[int, ...]) -> Quality:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return score(assignment)

    problem._evaluate = killed
    path = tmp_path / "study.db"
    with pytest.raises(KeyboardInterrupt):
        run(problem, path)
    assert run(make_problem(layers=4, budget=1.0), path) == whole


def _cheapest(problem: Problem, agent: str, drop: float, path: Path | None = None) -> tuple[list[Trial], bool]:
    study = Study(problem, path)
    found = search_cheapest(SEARCHERS.get(agent)(), problem, study, 60, 0, drop)
    study.close()
    return found.trials, found.kept


@pytest.mark.parametrize("agent", ["auto", "knapsack", "random"])
def test_the_cheapest_policy_keeps_the_accuracy_and_costs_less_than_dense(agent: str) -> None:
    problem = make_problem(layers=8, budget=1.0, seed=2)
    dense = problem.evaluate((0,) * 8).accuracy
    trials, kept = _cheapest(problem, agent, 0.02)
    assert kept
    costs = [trial.costs["latency"] for trial in trials]
    assert costs == sorted(costs)
    assert costs[0] < 0.95 * problem.costs((0,) * 8)[0]
    assert all(trial.quality.accuracy >= dense - 0.02 - 1e-9 for trial in trials)


def test_a_better_agent_finds_a_cheaper_policy_of_the_same_accuracy() -> None:
    cost = {}
    for agent in ("auto", "random"):
        found = [_cheapest(make_problem(layers=8, budget=1.0, seed=seed), agent, 0.05)[0][0] for seed in range(3)]
        cost[agent] = np.mean([trial.costs["latency"] for trial in found])
    assert cost["auto"] < cost["random"]


def test_an_accuracy_that_nothing_keeps_gives_the_most_accurate_policy() -> None:
    problem = make_problem(layers=6, budget=0.3, seed=1)
    trials, kept = _cheapest(problem, "auto", 0.0)
    assert not kept
    assert trials[0].feasible
    assert trials[0].quality.accuracy == max(trial.quality.accuracy for trial in trials)


def test_an_interrupted_hunt_for_the_cheapest_ends_the_same(tmp_path: Path) -> None:
    whole = _cheapest(make_problem(layers=5, budget=1.0), "evolution", 0.02)
    problem = make_problem(layers=5, budget=1.0)
    score, left = problem._evaluate, [25]

    def killed(assignment: tuple[int, ...]) -> Quality:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return score(assignment)

    problem._evaluate = killed
    path = tmp_path / "study.db"
    with pytest.raises(KeyboardInterrupt):
        _cheapest(problem, "evolution", 0.02, path)
    again = _cheapest(make_problem(layers=5, budget=1.0), "evolution", 0.02, path)
    assert [trial.assignment for trial in again[0]] == [trial.assignment for trial in whole[0]]


def test_each_goal_proposes_what_baselines_can_be_held_against() -> None:
    for budget, constraint, objective in (("latency=50%", None, None), ("", "accuracy=-2%", None),
                                          ("", None, "accuracy,latency")):
        problem = make_problem(layers=6, budget=0.5 if budget else 1.0)
        study = Study(problem)
        goal = parse_goal(budget, constraint, objective)
        proposed = propose(SEARCHERS.get("tpe")(), goal, study, Grant(24, 0))
        assert proposed.finalists
        best = proposed.finalists[0]
        assert proposed.problem.feasible(best.assignment)
        if budget:
            assert proposed.problem is problem
        else:
            assert proposed.problem.limits_D[0] == pytest.approx(best.costs["latency"])


def test_the_knee_lies_below_the_line_between_the_ends() -> None:
    problem = make_problem(layers=6, budget=1.0)
    study = Study(problem)
    search_front(SEARCHERS.get("nsga2")(), problem, study, 40, 0)
    front = non_dominated(study.trials)
    at = front.index(knee(front))
    assert 0 < at < len(front) - 1


@pytest.fixture
def front(policy: Policy) -> Front:
    point = FrontPoint(
        trial=7, proposer="nsga2", error=0.03, accuracy=0.91, costs={"latency": 100.0}, predicted=policy.file.predicted,
        choices=dict(policy.file.choices),
    )
    return Front(objectives=["accuracy", "latency"], points=[point, point.model_copy(update={"trial": 9})])


def test_a_front_survives_its_file_and_damage_is_told(front: Front, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(RunError, match="not finished"):
        Front.load(run)
    front.save(run.front)
    assert Front.load(run) == front
    run.front.write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        Front.load(run)


def test_an_exported_point_is_a_policy_marked_as_predicted(front: Front, policy: Policy, tmp_path: Path) -> None:
    chosen = policy.file.model_copy(update={"accuracy": Accuracy(dense=0.94, tuned=0.93, test=0.92)})
    front.policy(2, chosen).save(tmp_path / "policy.json")
    again = Policy.load(tmp_path / "policy.json")
    assert again.choices == policy.choices
    assert again.file.measured is None
    assert again.file.accuracy == Accuracy(dense=0.94, pruned=0.91)
    assert again.file.context["status"] == PREDICTED_ONLY
    assert again.file.context["trial"] == 9
    with pytest.raises(UnknownName, match="points 1 to 2"):
        front.policy(3, chosen)


def test_the_goal_is_part_of_a_runs_name_and_configuration() -> None:
    plain = SearchConfig(budget="latency=50%")
    assert plain.name == "resnet20-latency=50%-auto-s0"
    kept = SearchConfig(constraint="accuracy=-0.5%", settings={"starts": 4})
    assert kept.name == "resnet20-accuracy=-0.5%-auto-s0"
    assert kept.resolved()["settings"] == {"starts": 4}
