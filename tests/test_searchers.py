"""What every searcher promises; a new one joins by one line in the fixture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import make_problem

from autoprune.core.choices import Block
from autoprune.core.errors import RunError, UnknownName
from autoprune.envs.problem import Assignment, Problem, Quality
from autoprune.search.base import SEARCHERS
from autoprune.search.interaction import InteractionModel
from autoprune.search.random_search import random_assignment
from autoprune.search.study import Study
from autoprune.search.uniform import uniform_assignments

_EVALUATIONS = {
    "annealing": 14,
    "auto": 16,
    "cmaes": 14,
    "ddpg": 10,
    "evolution": 16,
    "gp": 5,
    "knapsack": 1,
    "netadapt": 30,
    "nsga2": 14,
    "random": 12,
    "sensitivity": 5,
    "spdy": 14,
    "tpe": 14,
    "uniform": 8,
}
# These have only so much to propose.
_MAY_STOP_EARLY = ("uniform", "ddpg", "sensitivity", "netadapt")


@pytest.fixture(params=sorted(_EVALUATIONS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(name: str, problem: Problem, seed: int = 0, path: Path | None = None) -> list[Assignment]:
    study = Study(problem, path)
    SEARCHERS.get(name)().search(problem, study, _EVALUATIONS[name], seed)
    study.close()
    return [trial.assignment for trial in study.trials]


def test_every_registered_searcher_is_tested() -> None:
    assert set(SEARCHERS) == set(_EVALUATIONS)
    with pytest.raises(UnknownName, match=r"no agent 'ddgp'.* Did you mean 'ddpg'"):
        SEARCHERS.get("ddgp")


class TestSearcher:
    """The contract."""

    @pytest.mark.parametrize("macs", [None, 0.4])
    def test_keeps_every_budget_and_its_evaluations(self, name: str, macs: float | None) -> None:
        problem = make_problem(layers=5, budget=0.45, macs=macs)
        study = Study(problem)
        told: list[tuple[int, int]] = []
        count = _EVALUATIONS[name]
        best = SEARCHERS.get(name)().search(problem, study, count, 0, lambda done, total: told.append((done, total)))
        assert all(trial.proposer == name for trial in study.trials)
        # NetAdapt's way down to the budget lies above it.
        assert best.feasible if name == "netadapt" else all(trial.feasible for trial in study.trials)
        assert len({trial.assignment for trial in study.trials}) == len(study.trials) == problem.evaluations
        assert told == [(done, count) for done in range(1, len(study.trials) + 1)]
        assert len(study.trials) == count or (name in _MAY_STOP_EARLY and 0 < len(study.trials) <= count)
        assert best == study.best(1, name)[0]

    def test_same_seed_same_policies(self, name: str) -> None:
        first, second = (run(name, make_problem(layers=5), seed=3) for _ in range(2))
        assert first == second

    def test_interrupted_and_resumed_equals_uninterrupted(self, name: str, tmp_path: Path) -> None:
        whole = run(name, make_problem(layers=5))
        problem = make_problem(layers=5)
        score, left = problem._evaluate, [max(1, len(whole) // 2)]

        def killed(assignment: Assignment) -> Quality:
            # An evaluator draws random numbers of its own; a replay from the record does not draw them.
            np.random.random(7)
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return score(assignment)

        problem._evaluate = killed
        path = tmp_path / "study.db"
        if len(whole) > 1:
            with pytest.raises(KeyboardInterrupt):
                run(name, problem, path=path)
            kept = Study(make_problem(layers=5), path)
            assert [trial.assignment for trial in kept.trials] == whole[: len(whole) // 2]
            kept.close()
        again = make_problem(layers=5)
        assert run(name, again, path=path) == whole
        assert again.evaluations == len(whole) - (len(whole) // 2 if len(whole) > 1 else 0)

    def test_what_another_searcher_scored_changes_nothing_but_the_work(self, name: str) -> None:
        alone = run(name, make_problem(layers=5))
        problem = make_problem(layers=5)
        study = Study(problem)
        for assignment in alone:
            study.evaluate(assignment, "other")
        SEARCHERS.get(name)().search(problem, study, _EVALUATIONS[name], 0)
        assert [trial.assignment for trial in study.trials if trial.proposer == name] == alone
        assert problem.evaluations == len(alone)

    def test_one_evaluation_is_enough_to_answer(self, name: str) -> None:
        problem = make_problem(layers=3)
        study = Study(problem)
        best = SEARCHERS.get(name)().search(problem, study, 1, 0)
        assert len(study.trials) == 1
        assert best.feasible

    def test_ends_on_a_space_of_few_policies(self, name: str) -> None:
        problem = make_problem(layers=1, budget=0.2)
        study = Study(problem)
        best = SEARCHERS.get(name)().search(problem, study, 20 if name in ("ddpg", "gp") else 200, 0)
        assert best.feasible
        assert len(study.trials) <= problem.sizes[0]

    def test_says_nothing(self, name: str, capfd: pytest.CaptureFixture[str]) -> None:
        run(name, make_problem(layers=3))
        assert capfd.readouterr() == ("", "")

    def test_zero_evaluations_are_refused(self, name: str) -> None:
        problem = make_problem(layers=3)
        with pytest.raises(RunError, match="at least 1"):
            SEARCHERS.get(name)().search(problem, Study(problem), 0)


def test_uniform_gives_every_layer_one_scheme_at_one_density() -> None:
    problem = make_problem(layers=6)
    for assignment in uniform_assignments(problem):
        named = problem.named(assignment)
        sparse = {
            (choice.kind, round(choice.density(layer), 6))
            for layer, choice in zip(problem.layers, named.values(), strict=True)
            if choice.kind != "dense"
        }
        assert len(sparse) == 1
        assert problem.feasible(assignment)


def test_uniform_takes_the_densest_level_that_fits() -> None:
    problem = make_problem(layers=6, budget=0.5)
    found = {problem.choices[5][assignment[5]]: assignment for assignment in uniform_assignments(problem)}
    (level,) = (choice for choice in found if isinstance(choice, Block) and choice.filters == 16)
    denser = Block(min(keep for keep in (0.75, 0.625, 0.5, 0.4, 0.333, 0.25) if keep > level.keep), 16)
    assert problem.feasible(found[level])
    assert not problem.feasible([choices.index(denser) for choices in problem.choices])


def test_random_policies_come_close_to_the_budget_and_differ() -> None:
    problem = make_problem(layers=8)
    rng = np.random.default_rng(0)
    drawn = {random_assignment(problem, rng) for _ in range(40)}
    assert len(drawn) == 40
    used = [problem.costs(assignment)[0] / problem.limits_D[0] for assignment in drawn]
    assert max(used) <= 1.0 + 1e-9
    assert np.mean(used) > 0.95


def test_interactions_are_learnt_from_evaluations() -> None:
    problem = make_problem(layers=6, seed=4)
    rng = np.random.default_rng(0)
    drawn = np.array([random_assignment(problem, rng) for _ in range(140)])
    errors = np.array([problem.evaluate(row).error for row in drawn])
    model = InteractionModel(problem.errors_LC)
    model.fit(drawn[:100], errors[:100])
    predicted = np.mean([model.predict(model.draw(rng), drawn[100:]) for _ in range(20)], axis=0)
    truth = np.log(errors[100:])
    additive = np.log([problem.additive_error(row) for row in drawn[100:]])
    left = np.std(truth - predicted)
    assert left < 0.5 * np.std(truth - additive)


@pytest.mark.parametrize("kind", ["vector", "context"])
def test_auto_beats_the_exact_solver_and_random_where_errors_do_not_add(kind: str) -> None:
    ratios = []
    for seed in range(3):
        problem = make_problem(layers=10, seed=seed, kind=kind)
        best = {}
        for name in ("knapsack", "random", "auto"):
            study = Study(problem)
            best[name] = SEARCHERS.get(name)().search(problem, study, 40, seed).quality.error
        assert best["auto"] <= best["knapsack"]
        assert best["auto"] < best["random"]
        ratios.append(best["auto"] / best["knapsack"])
    assert np.mean(ratios) < 0.98
