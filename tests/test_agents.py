"""What each agent promises beyond the contract of all searchers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import optuna
import pytest
from synthetic import make_problem
from torch import nn

from autoprune.core.errors import UnknownName
from autoprune.core.sensitivity import Sensitivity
from autoprune.envs.problem import Assignment, Problem
from autoprune.search.base import SEARCHERS, parse_settings
from autoprune.search.genes import Choices, Coefficients
from autoprune.search.knapsack import solve_problem
from autoprune.search.moves import useful_choices
from autoprune.search.netadapt import Member, NetAdaptSearcher, load, reductions
from autoprune.search.sensitivity import least_threshold, sensitivity_of
from autoprune.search.settings import AgentError
from autoprune.search.spdy import SPDYSearcher
from autoprune.search.study import Study


def search(name: str, problem: Problem, evaluations: int, **settings: object) -> Study:
    study = Study(problem)
    SEARCHERS.get(name)(settings).search(problem, study, evaluations, seed=1)
    return study


@pytest.mark.parametrize("name", ["evolution", "spdy", "tpe", "nsga2", "cmaes"])
def test_searching_from_the_exact_solution_beats_it_where_errors_do_not_add(name: str) -> None:
    ratios = []
    for seed in range(2):
        problem = make_problem(layers=10, seed=seed)
        study = search(name, problem, 40)
        assert study.trials[0].assignment == solve_problem(problem) or name != "evolution"
        exact = problem.evaluate(solve_problem(problem)).error
        ratios.append(study.best(1)[0].quality.error / exact)
    assert max(ratios) <= 1.0 + 1e-9
    assert np.mean(ratios) < 0.97


@pytest.mark.parametrize("start", ["knapsack", "random"])
def test_annealing_never_ends_worse_than_its_start(start: str) -> None:
    problem = make_problem(layers=8, seed=2)
    study = search("annealing", problem, 30, start=start)
    assert study.best(1)[0].quality.error < study.trials[0].quality.error


def test_spdy_takes_the_papers_prior_too() -> None:
    problem = make_problem(layers=8, seed=1)
    study = search("spdy", problem, 20, prior="quadratic")
    assert len(study.trials) == 20
    assert study.best(1)[0].quality.error < study.trials[0].quality.error
    with pytest.raises(AgentError, match="prior='cubic': must be 'measured' or 'quadratic'"):
        SPDYSearcher({"prior": "cubic"})


@pytest.mark.parametrize("name", ["tpe", "nsga2", "cmaes", "gp"])
def test_samplers_search_choices_directly_too(name: str) -> None:
    problem = make_problem(layers=5, seed=3)
    study = search(name, problem, 12 if name != "gp" else 5, space="choices")
    assert all(trial.feasible for trial in study.trials)
    assert len(study.trials) == (12 if name != "gp" else 5)


def test_genes_tell_the_sampler_what_was_asked_and_what_was_executed() -> None:
    problem = make_problem(layers=5, budget=0.4)
    choices = Choices(problem)
    ladders = zip(problem.layers, useful_choices(problem), strict=True)
    dearest = {layer.name: len(ladder) - 1 for layer, ladder in ladders}
    decoded = choices.decode(dearest)
    assert (decoded.excess_D > 0).all()
    assert problem.feasible(decoded.assignment)
    assert choices.decode(decoded.executed).assignment == decoded.assignment
    coefficients = Coefficients(problem, 1.5, shares=True)
    exact = {**dict.fromkeys((layer.name for layer in problem.layers), 0.0), "budget latency": 1.0}
    assert problem.additive_error(coefficients.decode(exact).assignment) == pytest.approx(
        problem.additive_error(solve_problem(problem)), rel=0.02
    )
    half = coefficients.decode({**exact, "budget latency": 0.5})
    least, limit = float(problem.cheapest().sum()), float(problem.limits_D[0])
    assert problem.costs(half.assignment)[0] <= least + 0.5 * (limit - least) + 1e-9


def test_a_gaussian_process_sees_a_bounded_history(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Counting(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            seen.append(len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))))

    monkeypatch.setattr(
        "autoprune.search.samplers.GPSearcher.sampler", lambda self, genes, count, seed: Counting(seed=seed)
    )
    study = search("gp", make_problem(layers=8), 30, history=12)
    assert len(study.trials) == 30
    assert max(seen) == 12
    assert seen.count(12) >= 18


def test_the_sensitivity_threshold_is_the_least_that_meets_the_budget() -> None:
    problem = make_problem(layers=6, seed=4, budget=0.5)
    threshold, assignment = least_threshold(problem)
    assert problem.feasible(assignment)
    assert max(problem.errors_LC[layer][index] for layer, index in enumerate(assignment)) <= threshold
    errors = sorted({float(value) for row in problem.errors_LC for value in row})
    below = errors[errors.index(threshold) - 1]
    cheapest = [
        min(float(cost) for cost, error in zip(costs[:, 0], row, strict=True) if error <= below)
        for costs, row in zip(problem.costs_LCD, problem.errors_LC, strict=True)
    ]
    assert sum(cheapest) > problem.limits_D[0]


def test_sensitivity_curves_survive_their_file(tmp_path: Path) -> None:
    problem = make_problem(layers=4)
    curves = sensitivity_of(problem)
    curves.save(tmp_path / "sensitivity.json")
    again = Sensitivity.load(tmp_path / "sensitivity.json")
    assert again == curves
    assert [len(curve.points) for curve in again.layers] == list(problem.sizes)
    assert again.threshold == least_threshold(problem)[0]
    assert Sensitivity.load(tmp_path / "none.json") is None


def test_netadapts_reductions_shrink_and_arrive() -> None:
    plan = reductions(2.0, 0.025, 0.96, 80)
    assert plan[0] == pytest.approx(0.05)
    assert [b / a for a, b in itertools.pairwise(plan)] == pytest.approx([0.96] * (len(plan) - 1))
    assert sum(plan) >= 1.0 - 1e-9
    assert sum(plan[:-1]) < 1.0
    # A quarter of dense lies beyond the sum of the published reductions: they grow.
    assert sum(reductions(4.0, 0.025, 0.96, 80)) == pytest.approx(3.0)
    assert sum(reductions(4.0, 0.025, 0.96, 10)) == pytest.approx(3.0)
    assert reductions(4.0, 0.025, 0.96, 0) == []


def test_netadapt_goes_down_step_by_step_and_stops_within_the_budget() -> None:
    problem = make_problem(layers=6, budget=0.6)
    study = search("netadapt", problem, 400)
    loads = [load(problem, trial.assignment) for trial in study.trials]
    assert loads[0] > 1.5
    assert min(loads) > 0.9
    iterations = len(reductions(load(problem, (0,) * 6), 0.025, 0.96, 80))
    assert len(loads) <= iterations * len(problem.layers) + 1
    assert study.best(1)[0].quality.error < 3.0 * problem.evaluate(solve_problem(problem)).error


class _Bench:
    """Stands in for the workshop: its networks only count how often they were trained."""

    def __init__(self, problem: Problem, kept: list[Member] | None = None) -> None:
        self.problem, self.kept, self.trained, self.loaded = problem, kept or [], 0, []

    def dense_accuracy(self) -> float:
        return 0.94

    def members(self) -> list[Member]:
        return list(self.kept)

    def load(self, number: int) -> nn.Module:
        self.loaded.append(number)
        return nn.Identity()

    def adapted(self, parent, policies, changed, steps):  # type: ignore[no-untyped-def]
        self.trained += len(policies)
        texts = [[choice.text for choice in choices] for choices in self.problem.choices]
        rows = [
            tuple(row.index(policy[layer.name].text) for layer, row in zip(self.problem.layers, texts, strict=True))
            for policy in policies
        ]
        return [nn.Identity() for _ in rows], [0.94 - self.problem.additive_error(row) for row in rows]

    def keep(self, members: list[Member], model: nn.Module) -> None:
        self.kept = list(members)


def test_netadapt_keeps_every_network_and_resumes_from_the_last() -> None:
    def run(bench: _Bench) -> tuple[Assignment, ...]:
        searcher = NetAdaptSearcher()
        searcher.attach(bench)  # type: ignore[arg-type]
        study = Study(bench.problem)
        searcher.search(bench.problem, study, 60, seed=0)
        return tuple(trial.assignment for trial in study.trials)

    whole = _Bench(make_problem(layers=6, budget=0.6))
    path = run(whole)
    assert len(whole.kept) > 5
    assert all(row.accuracies[row.winner] == max(row.accuracies) for row in whole.kept)
    resumed = _Bench(make_problem(layers=6, budget=0.6), whole.kept[:4])
    assert run(resumed) == path
    assert resumed.kept == whole.kept
    assert resumed.loaded == [4]
    assert resumed.trained == whole.trained - sum(len(row.candidates) for row in whole.kept[:4])
    json.dumps([row.candidates for row in whole.kept])


def test_settings_of_agents_are_read_and_refused_like_trainers() -> None:
    assert parse_settings("tpe", ["space=choices", "warm_starts=4"]) == {"space": "choices", "warm_starts": 4}
    with pytest.raises(UnknownName, match=r"no setting of agent 'tpe' 'warm_start'\. Did you mean 'warm_starts'"):
        parse_settings("tpe", ["warm_start=4"])
    with pytest.raises(AgentError, match="warm_starts='four': must be a whole number"):
        parse_settings("tpe", ["warm_starts=four"])
    with pytest.raises(AgentError, match="warm_starts=0: must be 1 or more"):
        parse_settings("tpe", ["warm_starts=0"])
    with pytest.raises(AgentError, match="agent 'random' has no settings, so no 'x'"):
        parse_settings("random", ["x=1"])
    with pytest.raises(UnknownName, match="no agent 'ddgp'"):
        parse_settings("ddgp", [])
    for name in SEARCHERS:
        assert SEARCHERS.get(name)({}).name == name
