"""The record of evaluated policies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from synthetic import make_problem

from autoprune.core.errors import RunError
from autoprune.envs.problem import Problem, Quality
from autoprune.search.study import Study


def filled(problem: Problem, path: Path | None, count: int = 5) -> Study:
    study = Study(problem, path)
    rng = np.random.default_rng(0)
    for number in range(count):
        study.evaluate([int(rng.integers(size)) for size in problem.sizes], "tpe" if number % 2 else "random")
    return study


def test_a_reopened_study_answers_from_its_record(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    first = filled(make_problem(layers=4), path)
    first.close()
    problem = make_problem(layers=4)
    second = Study(problem, path)
    assert second.trials == first.trials
    for trial in first.trials:
        assert second.evaluate(trial.assignment, trial.proposer) == trial.quality
    assert problem.evaluations == 0
    assert len(second.trials) == len(first.trials)
    second.close()


def test_the_file_may_lie_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "net-latency=50%25 {x}?a=b#ü"
    folder.mkdir()
    study = filled(make_problem(layers=2), folder / "study.db", 2)
    assert [entry.name for entry in folder.iterdir()] == ["study.db"]
    assert Study(make_problem(layers=2), folder / "study.db").trials == study.trials


def test_each_policy_is_one_finished_trial_that_optuna_understands(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    problem = make_problem(layers=4)
    study = filled(problem, path)
    study.close()
    loaded = optuna.load_study(study_name=None, storage=f"sqlite:///{path}")
    assert [trial.state for trial in loaded.trials] == [optuna.trial.TrialState.COMPLETE] * 5
    for mine, stored in zip(study.trials, loaded.trials, strict=True):
        assert stored.params == {name: choice.text for name, choice in problem.named(mine.assignment).items()}
        assert stored.value == mine.quality.error
        assert stored.user_attrs["proposer"] == mine.proposer
        assert stored.user_attrs["accuracy"] == mine.quality.accuracy
        assert stored.user_attrs["costs"] == mine.costs
        assert stored.user_attrs["seconds"] == mine.quality.seconds
        assert (stored.constraints["latency"] <= 0) == mine.feasible


def test_what_another_proposer_scored_is_recorded_for_this_one_without_scoring() -> None:
    problem = make_problem(layers=4)
    study = Study(problem)
    first = study.evaluate((0, 0, 0, 0), "tpe")
    again = study.evaluate((0, 0, 0, 0), "random")
    assert (again.error, again.accuracy, again.seconds) == (first.error, first.accuracy, 0.0)
    assert problem.evaluations == 1
    assert [trial.proposer for trial in study.trials] == ["tpe", "random"]
    study.evaluate((0, 0, 0, 0), "random")
    assert len(study.trials) == 2


def test_best_are_feasible_different_and_sorted() -> None:
    problem = make_problem(layers=4, budget=0.6)
    study = filled(problem, None, 60)
    cheap = tuple(int(costs[:, 0].argmin()) for costs in problem.costs_LCD)
    study.evaluate(cheap, "tpe")
    study.evaluate(cheap, "random")
    best = study.best(10)
    assert best
    assert all(trial.feasible and problem.feasible(trial.assignment) for trial in best)
    assert len({trial.assignment for trial in best}) == len(best)
    assert [t.quality.error for t in best] == sorted(t.quality.error for t in best)
    assert {trial.proposer for trial in study.best(10, "random")} == {"random"}


def test_the_same_space_under_another_budget_keeps_its_scores(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    filled(make_problem(layers=4, budget=0.9), path, 20).close()
    problem = make_problem(layers=4, budget=0.5)
    study = Study(problem, path)
    assert len(study.trials) == 20
    assert all(trial.feasible == problem.feasible(trial.assignment) for trial in study.trials)
    study.close()


def test_a_study_of_another_space_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    filled(make_problem(layers=4), path).close()
    with pytest.raises(RunError, match="holds another search \\(space"):
        Study(make_problem(layers=5), path)
    with pytest.raises(RunError, match="holds another search \\(identity"):
        Study(make_problem(layers=4), path, identity="other weights")


@pytest.mark.parametrize("content", [b"no database, but long enough for a header" * 40, b"SQLite format 3\0short"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"study .*study\.db: cannot be used") as error:
        Study(make_problem(layers=4), path)
    assert "\n" not in str(error.value)


def test_a_damaged_trial_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    filled(make_problem(layers=4), path).close()
    loaded = optuna.load_study(study_name=None, storage=f"sqlite:///{path}")
    loaded.add_trial(optuna.create_trial(value=0.1, user_attrs={"proposer": "tpe"}))
    with pytest.raises(RunError, match="trial 5 is damaged"):
        Study(make_problem(layers=4), path)


def test_an_infinite_error_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    problem = make_problem(layers=4)
    problem._evaluate = lambda assignment: Quality(float("nan"), 0.1, 0.5)
    study = Study(problem, path)
    study.evaluate((0, 0, 0, 0), "tpe")
    study.close()
    again = Study(make_problem(layers=4), path)
    assert again.trials[0].quality == Quality(float("inf"), 0.1, 0.5)
    again.close()


def test_a_score_that_fails_leaves_no_trial(tmp_path: Path) -> None:
    problem = make_problem(layers=4)

    def broken(assignment: tuple[int, ...]) -> Quality:
        raise KeyboardInterrupt

    problem._evaluate = broken
    study = Study(problem, tmp_path / "study.db")
    with pytest.raises(KeyboardInterrupt):
        study.evaluate((0, 0, 0, 0), "tpe")
    study.close()
    again = Study(make_problem(layers=4), tmp_path / "study.db")
    assert again.trials == ()
    again.close()
