"""The main job on real parts: a small space, few images, real kernels and measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import autoprune
from autoprune.cli.main import run as cli
from autoprune.core.errors import DeviceError, InfeasibleBudget, RunError, TableMismatch, UnknownName
from autoprune.core.front import Front
from autoprune.core.goal import Goal
from autoprune.core.policy import Policy
from autoprune.core.progress import Silent
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir
from autoprune.core.sensitivity import Sensitivity
from autoprune.kernels.deployed import DeployedModel
from autoprune.report.summary import verdict
from autoprune.search import pipeline
from autoprune.search.aim import AimFiles, Guard, closer, find_margin, off_target
from autoprune.search.base import Searcher
from autoprune.search.context import Context
from autoprune.search.deploy import Deployer
from autoprune.search.finals import Candidate
from autoprune.search.propose import Grant, Proposed
from autoprune.search.study import Study
from autoprune.search_spaces.trace import trace
from autoprune.tasks.data import DataSet
from autoprune.tasks.task import Task, load_task

SPACE = """name: small
rules:
  - match: {name: "layer3.*", window: 3x3}
    choices:
      - {kind: dense}
      - {kind: block, keep: [0.5, 0.25, 0.125]}
      - {kind: fine, keep: [0.25]}
  - match: {name: "layer2.*", window: 3x3}
    choices:
      - {kind: dense}
      - {kind: block, keep: [0.5, 0.25]}
"""
BUDGET = "latency=80%"


@pytest.fixture(scope="module", autouse=True)
def still_machine() -> Iterator[None]:
    """A machine that takes as long for the same networks each time they are timed, so that equal searches end alike."""
    real, known = Deployer.compare_us, {}

    def compare_us(self: Deployer, networks: Mapping[str, DeployedModel]) -> tuple[dict[str, float], float]:
        key = tuple((name, network.decisions) for name, network in sorted(networks.items()))
        if key not in known:
            known[key] = real(self, networks)
        medians, dense_us = known[key]
        return dict(medians), dense_us

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deployer, "compare_us", compare_us)
        yield


@pytest.fixture(scope="module")
def task() -> Task:
    full = load_task("resnet20", "fashion-mnist")
    data: DataSet = replace(
        full.data,
        train=full.data.train.take(512),
        validation=full.data.validation.take(500),
        test=full.data.test.take(500),
    )
    return replace(full, data=data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    (path / "space.yaml").write_text(SPACE, encoding="utf-8")
    return path


def _search(task: Task, folder: Path, run: str, progress: Silent | None = None, **settings: object) -> Result:
    values: dict[str, object] = {"budget": BUDGET, "agent": "tpe", "evaluations": 8, **settings}
    return autoprune.search(
        task.model, task, space=str(folder / "space.yaml"), runs_dir=folder, run=run, progress=progress, **values
    )


@pytest.fixture(scope="module")
def result(task: Task, folder: Path) -> Result:
    return _search(task, folder, "whole")


def test_a_search_ends_with_a_measured_policy_and_every_file_of_its_run(
    result: Result, task: Task, folder: Path
) -> None:
    run = RunDir(folder / "whole")
    policy = Policy.load(run.policy)
    assert policy.file.measured is not None
    assert policy.file.measured.latency_us > 0
    assert result.met == (policy.file.measured.latency_ratio <= 0.8 * 1.02)
    assert result.row("chosen").choices == policy.file.choices
    assert {"dense", "chosen", "uniform", "random", "knapsack"} == {row.name for row in result.rows}
    for part in (run.config, run.study, run.table, run.references, run.result, run.weights):
        assert part.exists(), part


def test_the_written_weights_are_zero_where_the_policy_prunes(result: Result, folder: Path) -> None:
    run = RunDir(folder / "whole")
    weights = load_file(run.weights)
    layers = {row.name: row for row in result.layers}
    pruned = [name for name, row in layers.items() if row.choice != "dense"]
    assert pruned
    for name in pruned:
        weight = weights[f"{name}.weight"]
        assert float((weight != 0).double().mean()) == pytest.approx(layers[name].density, abs=0.01)


def test_test_accuracy_is_reported_for_the_chosen_policy_only(result: Result) -> None:
    assert result.row("chosen").accuracy.test is not None
    assert all(row.accuracy.test is None for row in result.rows if row.name != "chosen")


def test_a_finished_run_is_shown_and_not_searched_again(result: Result, task: Task, folder: Path) -> None:
    again = _search(task, folder, "whole")
    assert again == result


class _Killed(BaseException):
    """As sudden as a signal: nothing in the program catches it."""


class _KillDuring(Silent):
    """Raises in the middle of one stage."""

    def __init__(self, stage: str, step: int) -> None:
        self._wanted, self._left, self._inside = stage, step, False

    def stage(self, name: str, total: int | None = None) -> None:
        self._inside = name == self._wanted

    def advance(self, n: int = 1) -> None:
        if self._inside:
            self._left -= n
            if self._left <= 0:
                raise _Killed


@pytest.mark.parametrize(("stage", "step"), [("layer database", 3), ("search", 12), ("fine-tune", 14)])
def test_a_killed_search_goes_on_to_the_same_policy_and_loses_no_trial(
    result: Result, task: Task, folder: Path, stage: str, step: int
) -> None:
    name = f"killed-in-{stage.replace(' ', '-')}"
    for found in folder.glob(".cache/**/aim-*.json"):
        found.unlink()  # what the whole search found out is not known to this one either
    with pytest.raises(_Killed):
        _search(task, folder, name, _KillDuring(stage, step))
    before = _trial_count(folder / name)
    resumed = _search(task, folder, name)
    assert resumed.row("chosen").choices == result.row("chosen").choices
    assert [(t.proposer, t.error) for t in resumed.trials] == [(t.proposer, t.error) for t in result.trials]
    assert len(resumed.trials) >= before
    assert resumed.row("chosen").accuracy.tuned == result.row("chosen").accuracy.tuned


def _trial_count(run: Path) -> int:
    import optuna

    path = run / "study.db"
    if not path.exists():
        return 0
    study = optuna.load_study(study_name="autoprune", storage=f"sqlite:///{path}")
    return len(study.get_trials())


def test_a_run_of_another_configuration_is_refused(result: Result, task: Task, folder: Path) -> None:
    with pytest.raises(RunError, match="another configuration"):
        _search(task, folder, "whole", seed=1)


def test_an_infeasible_budget_names_the_least_and_the_layer(result: Result, task: Task, folder: Path) -> None:
    with pytest.raises(InfeasibleBudget, match=r"the least this space reaches is [\d,]+us \(held up by layer"):
        _search(task, folder, "infeasible", budget="latency=45%")


def test_a_table_of_another_context_is_refused(result: Result, task: Task, folder: Path) -> None:
    with pytest.raises(TableMismatch, match="batch"):
        _search(task, folder, "other-table", table=folder / "whole" / "table.json", batch=2)


def test_unknown_agents_and_devices_are_refused_before_anything_is_made(task: Task, folder: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'ddpg'"):
        _search(task, folder, "typo", agent="ddgp")
    with pytest.raises(DeviceError):
        _search(task, folder, "typo", device="cuda")
    assert not (folder / "typo").exists()


def test_budgets_of_weights_are_kept_exactly(result: Result, task: Task, folder: Path) -> None:
    found = _search(task, folder, "params", budget="params=40%", agent="knapsack", evaluations=2)
    assert found.met
    assert found.row("chosen").measured.params_ratio <= 0.4005


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One finalist and one baseline: deploying and fine-tuning the others is not what these tests are about."""
    monkeypatch.setattr("autoprune.search.pipeline.BASELINES", ("random",))
    monkeypatch.setattr("autoprune.search.propose.FINALISTS", 1)
    monkeypatch.setattr("autoprune.search.pipeline.ATTEMPTS", 2)


@pytest.mark.usefixtures("few")
def test_a_kept_accuracy_is_found_confirmed_and_said(result: Result, task: Task, folder: Path) -> None:
    found = _search(task, folder, "kept", budget="", constraint="accuracy=-3%", agent="evolution", evaluations=14)
    chosen, dense = found.row("chosen"), found.row("dense")
    assert (found.goal, found.budget) == ("constraint", "accuracy=-3%")
    assert found.met == (chosen.accuracy.tuned >= dense.accuracy.dense - 0.03)
    assert found.met
    assert chosen.measured.latency_ratio < 1.0
    assert "The constraint is met" in verdict(found)
    assert Policy.load(RunDir(folder / "kept").policy).file.budget == "accuracy=-3%"
    # The baselines had to be no slower than the cheapest finalist.
    finalists = [row.predicted.latency_us for row in found.rows if row.proposer == "evolution"]
    assert found.row("random").predicted.latency_us <= max(finalists) * 1.001


@pytest.mark.usefixtures("few")
def test_an_accuracy_missed_on_validation_data_is_asked_for_more_strictly(
    result: Result, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def propose(searcher: Searcher, goal: Goal, study: Study, grant: Grant, extra: float) -> Proposed:
        asked.append(extra)
        found = study.problem.limited(0.8 * study.problem.limits_D)
        return Proposed([searcher.search(found, study, 1)], found)

    monkeypatch.setattr("autoprune.search.pipeline.propose", propose)
    # Validation data take back half of what the evaluation images promised, at the first attempt.
    monkeypatch.setattr(Goal, "shortfall", lambda self, accuracy, dense: 0.5 if len(asked) == 1 else 0.0)
    found = _search(task, folder, "strict", budget="", constraint="accuracy=-1%", agent="knapsack", evaluations=1)
    assert asked == [0.0, 0.5]
    assert Guard(RunDir(folder / "strict").guard).load() == 0.5
    assert not list((folder / "strict").glob("tuned-*"))
    assert found.met


@pytest.mark.usefixtures("few")
def test_a_policy_that_is_late_after_its_fine_tune_is_searched_again_with_a_lower_aim(
    result: Result, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, verify = pipeline._choose, pipeline._verify
    begun: list[float] = []
    aims: list[float] = []

    def margin(context: Context) -> float:
        return float(json.loads(context.run.aim.read_text())["margin"]) if context.run.aim.exists() else 1.0

    def begin(context: Context, *rest: Any) -> Any:
        begun.append(margin(context))
        return choose(context, *rest)

    def late_once(context: Context, *rest: Any) -> tuple[list[Candidate], Candidate]:
        aims.append(margin(context))
        rows, chosen = verify(context, *rest)
        ratio = 0.8 * (1.1 if len(aims) == 1 else 1.0)
        return rows, replace(chosen, measured=chosen.measured.model_copy(update={"latency_ratio": ratio}))

    monkeypatch.setattr("autoprune.search.pipeline._choose", begin)
    monkeypatch.setattr("autoprune.search.pipeline._verify", late_once)
    found = _search(task, folder, "late", agent="knapsack", evaluations=1)
    assert len(begun) == len(aims) == 2
    assert begun[1] == pytest.approx(closer(aims[0], 1.1))
    assert found.met
    assert not list((folder / "late").glob("tuned-*"))


@pytest.mark.usefixtures("few")
def test_one_run_gives_a_front_and_any_point_of_it_is_a_policy(
    result: Result, task: Task, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _search(task, folder, "front", budget="", objective="accuracy,latency,params", agent="nsga2",
                    evaluations=12)
    assert found.goal == "front"
    assert found.met
    front = Front.load(RunDir(folder / "front"))
    assert front.objectives == ["accuracy", "latency", "params"]
    assert len(front.points) >= 3
    assert cli(["pareto", "front", "--runs-dir", str(folder), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [point["trial"] for point in listed["points"]] == [point.trial for point in front.points]
    out = folder / "point.json"
    assert cli(["pareto", "front", "--runs-dir", str(folder), "--export", "2", "--out", str(out)]) == 0
    assert "predicted only" in capsys.readouterr().out
    policy = Policy.load(out)
    policy.check_model(trace(task.model, task.example))
    assert policy.file.choices == front.points[1].choices
    assert policy.file.measured is None


@pytest.mark.usefixtures("few")
def test_netadapt_keeps_its_family_of_networks_in_the_run(result: Result, task: Task, folder: Path) -> None:
    settings = {"steps": 2, "initial": 0.2}
    name, progress = "adapted", _KillDuring("search", 6)
    asked = {"agent": "netadapt", "evaluations": 12, "settings": settings, "budget": "params=60%"}
    with pytest.raises(_Killed):
        _search(task, folder, name, progress, **asked)
    found = _search(task, folder, name, **asked)
    run = RunDir(folder / name)
    members = json.loads(run.family_record.read_text(encoding="utf-8"))
    assert len(members) >= 2
    for number in range(1, len(members) + 1):
        weights = load_file(run.family(number))
        assert {key.partition(".")[0] for key in weights} >= {"layer3", "fc"}
    assert not run.family(len(members) + 1).exists()
    assert found.row("chosen").proposer == "netadapt"
    assert Sensitivity.load(run.sensitivity).layers


def test_the_aim_settles_where_the_measurement_meets_the_budget() -> None:
    probes: list[float] = []

    def probe(margin: float) -> float:
        probes.append(margin)
        return 1.07 * margin

    margin = find_margin(probe)
    assert 0.975 <= 1.07 * margin <= 0.998
    assert len(probes) <= 3
    assert closer(1.0, 10.0) == pytest.approx(0.7)


def test_a_policy_is_off_target_when_it_misses_or_leaves_much_unused() -> None:
    assert off_target(1.0, 1.03)
    assert not off_target(1.0, 1.01)
    assert off_target(0.9, 0.9)
    assert not off_target(1.3, 0.5), "the aim cannot be raised further"
    assert not off_target(1.0, 0.0), "there is no latency budget"


def test_the_aim_is_kept_for_the_next_search_and_found_again_when_damaged(tmp_path: Path) -> None:
    first = AimFiles(tmp_path / "run.json", tmp_path / "kept.json")
    assert first.load(fresh=False) is None
    first.save(0.93)
    second = AimFiles(tmp_path / "other.json", tmp_path / "kept.json")
    assert second.load(fresh=False) == 0.93
    assert second.load(fresh=True) is None
    (tmp_path / "kept.json").write_text("{", encoding="utf-8")
    assert second.load(fresh=False) is None


def test_an_infeasible_lower_aim_keeps_the_last_feasible_one() -> None:
    def probe(margin: float) -> float:
        if margin < 0.99:
            raise InfeasibleBudget("too low")
        return 1.2

    assert find_margin(probe) < 0.99
    with pytest.raises(InfeasibleBudget):
        find_margin(lambda margin: _raise())


def _raise() -> float:
    raise InfeasibleBudget("nothing fits")
