"""Comparing agents: figures, words, report, command, and a run on a real network that can be killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_task import quick_measurements, small_task

from autoprune.cli.main import run as cli
from autoprune.core.comparison import Cell, Comparison, RankedPolicy
from autoprune.core.errors import BudgetError, InfeasibleBudget, RunError, UnknownName
from autoprune.core.progress import Progress, Silent
from autoprune.core.rundir import RunDir
from autoprune.report.compare import mean_curve, render_comparison, write_comparison_report
from autoprune.report.standing import lines, sentences, standing_record
from autoprune.search.compare import CompareConfig, run_comparison
from autoprune.search.standing import Figure, score_correlation, standings, winner_by_error, within_one_deviation
from autoprune.tasks.task import Task

BUDGET = "params=60%"
SPACE = """name: small
rules:
  - match: {position: first}
    choices: [{kind: dense}]
  - match: {op: conv}
    choices:
      - {kind: fine, keep: [0.5, 0.3, 0.2, 0.1, 0.05]}
"""


def policy(name: str, error: float, tuned: float | None) -> RankedPolicy:
    return RankedPolicy(choices={"a": name}, error=error, accuracy=1.0 - error, tuned=tuned)


def cell(agent: str, seed: int, errors: list[float], tuned: float | None = 0.9) -> Cell:
    curve: list[float | None] = [min(errors[: place + 1]) for place in range(len(errors))]
    top = [policy(f"{agent}{seed}{place}", error, tuned) for place, error in enumerate(sorted(errors))]
    return Cell(agent=agent, budget=BUDGET, seed=seed, curve=curve, seconds=3.0, scoring_seconds=2.0, top=top)


@pytest.fixture
def comparison() -> Comparison:
    """Figures made up: ``good`` leads, ``near`` is within its deviation, ``far`` is not."""
    cells = [
        cell("far", 0, [0.9, 0.5], 0.85), cell("far", 1, [0.5, 0.52], 0.84),
        cell("good", 0, [0.4, 0.1], 0.92), cell("good", 1, [0.3, 0.2], 0.91),
        cell("near", 0, [0.2, 0.17], 0.915), cell("near", 1, [0.19, 0.18], 0.905),
    ]  # fmt: skip
    return Comparison(
        model="small", data="fashion-mnist", space="own", agents=["far", "good", "near"], budgets=[BUDGET], seeds=2,
        evaluations=2, finetuned=True, dense_accuracy=0.93, cells=cells, context={"cpu": "<made up>"}, run="one",
    )  # fmt: skip


def test_means_deviations_and_order_are_those_of_the_cells(comparison: Comparison) -> None:
    rows = standings(comparison, BUDGET)
    assert [row.agent for row in rows] == ["good", "near", "far"]
    assert rows[0].error.mean == pytest.approx(0.15)
    assert rows[0].error.std == pytest.approx(0.0707, abs=1e-4)
    assert rows[0].tuned is not None
    assert rows[0].tuned.mean == pytest.approx(0.915)
    assert rows[0].overhead.mean == pytest.approx(0.5)


def test_one_standard_deviation_decides_who_is_level(comparison: Comparison) -> None:
    found = winner_by_error(standings(comparison, BUDGET))
    assert found is not None
    assert (found.agent, found.level) == ("good", ("near",))
    assert found.next is not None
    assert found.next[0] == "far"
    assert within_one_deviation(Figure(0.1, 0.0), Figure(0.2, 0.1))
    assert not within_one_deviation(Figure(0.1, 0.05), Figure(0.2, 0.09))


def test_the_winner_is_said_plainly(comparison: Comparison) -> None:
    said = " ".join(sentences(comparison, BUDGET))
    assert "good finds the least error, 0.1500 ± 0.0707 nats; within one standard deviation: near; next is far" in said
    assert "good leads with 91.50 ± 0.71 %" in said
    one = comparison.model_copy(update={"seeds": 1, "cells": [c for c in comparison.cells if c.seed == 0]})
    assert "one seed, so that no spread is known" in sentences(one, BUDGET)[0]


def test_a_low_correlation_is_said(comparison: Comparison) -> None:
    value = score_correlation(comparison, BUDGET)
    assert value is not None
    assert value[1] == 12
    assert value[0] > 0.5
    worse = [c.model_copy(update={"top": [p.model_copy(update={"tuned": p.error}) for p in c.top]})
             for c in comparison.cells]
    reversed_order = comparison.model_copy(update={"cells": worse})
    assert score_correlation(reversed_order, BUDGET) == (pytest.approx(-1.0), 12)
    assert any("which is low" in sentence for sentence in sentences(reversed_order, BUDGET))


def test_agents_that_stop_early_and_find_nothing_are_told(comparison: Comparison) -> None:
    short = cell("good", 0, [0.1])
    nothing = Cell(agent="far", budget=BUDGET, seed=0, curve=[None], seconds=1.0, scoring_seconds=1.0, top=[])
    few = comparison.model_copy(update={"cells": [short, nothing]})
    assert [row.agent for row in standings(few, BUDGET)] == ["good"]
    assert sentences(few, BUDGET)[-1].endswith("good.")
    none = comparison.model_copy(update={"cells": [nothing]})
    assert sentences(none, BUDGET) == [f"{BUDGET}: no agent found a feasible policy."]


def test_curves_are_means_from_where_every_seed_has_a_policy() -> None:
    cells = [cell("a", 0, [0.4, 0.2, 0.1]), cell("a", 1, [0.6, 0.5])]
    cells[1] = cells[1].model_copy(update={"curve": [None, 0.5]})
    assert mean_curve(cells) == [(2, pytest.approx(0.35)), (3, pytest.approx(0.3))]


def test_the_report_is_one_file_with_every_agent_and_no_address(comparison: Comparison, tmp_path: Path) -> None:
    comparison.save(RunDir(tmp_path).comparison)
    text = write_comparison_report(RunDir(tmp_path)).read_text(encoding="utf-8")
    for agent in comparison.agents:
        assert f">{agent}</td>" in text
    assert 'id="curve0-data"' in text
    assert 'id="tuned0-data"' in text
    assert "<made up>" not in text
    assert 'src="http' not in text
    untuned = comparison.model_copy(update={"finetuned": False})
    assert 'id="tuned0' not in render_comparison(untuned)


def test_a_damaged_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not finished"):
        Comparison.load(tmp_path / "comparison.json")
    (tmp_path / "comparison.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        Comparison.load(tmp_path / "comparison.json")


def test_every_flag_reaches_the_comparison(
    monkeypatch: pytest.MonkeyPatch, comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[CompareConfig] = []

    def run(config: CompareConfig, progress: Progress) -> Comparison:
        asked.append(config)
        comparison.save(RunDir.open(config.runs_dir, config.name, config.identity).comparison)
        return comparison

    monkeypatch.setattr("autoprune.search.compare.run_comparison", run)
    argv = ["compare", "--agents", "good, far", "--budgets", "latency=50%,latency=25%+size=1MB", "--seeds", "5"]
    argv += ["--evaluations", "7", "--no-fine-tune", "--model", "m", "--data", "d", "--space", "s", "--batch", "2"]
    argv += ["--threads", "3", "--run", "mine", "--images", "50", "--runs-dir", str(tmp_path)]
    assert cli(argv) == 0
    assert asked[0] == CompareConfig(
        budgets=("latency=50%", "latency=25%,size=1MB"), agents=("good", "far"), seeds=5, evaluations=7, finetune=False,
        model="m", data="d", space="s", batch=2, threads=3, run="mine", runs_dir=tmp_path, images=50,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "good finds the least error" in out
    assert lines(comparison, BUDGET)[0][1] in out
    assert cli([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["standings"] == json.loads(json.dumps(standing_record(comparison)["standings"]))
    assert Path(record["paths"]["report"]).exists()


def test_bad_input_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    good = CompareConfig(budgets=(BUDGET,), runs_dir=tmp_path / "runs")
    with pytest.raises(UnknownName, match="Did you mean 'ddpg'"):
        run_comparison(replace(good, agents=("ddgp",)), Silent())
    with pytest.raises(BudgetError):
        run_comparison(replace(good, budgets=("latency=50",)), Silent())
    with pytest.raises(RunError, match="at least"):
        run_comparison(replace(good, seeds=0), Silent())
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


class _Killed(BaseException):
    """As sudden as a signal."""


class _KillAfter(Silent):
    """Raises when some cells of the comparison are done."""

    def __init__(self, cells: int) -> None:
        self._left, self._inside = cells, False

    def stage(self, name: str, total: int | None = None) -> None:
        self._inside = name == "comparison"

    def advance(self, n: int = 1) -> None:
        self._left -= self._inside
        if self._inside and self._left < 0:
            raise _Killed


def test_a_killed_comparison_goes_on_to_the_same_and_can_be_widened(task: Task, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE, encoding="utf-8")
    config = CompareConfig(
        budgets=(BUDGET,), agents=("knapsack", "random"), seeds=2, evaluations=4, space=str(space), run="one",
        runs_dir=tmp_path / "runs",
    )  # fmt: skip
    with quick_measurements():
        with pytest.raises(_Killed):
            run_comparison(config, _KillAfter(4), task)
        kept = {path: path.stat().st_mtime_ns for path in (config.runs_dir / "one" / "cells").iterdir()}
        assert len(kept) == 3
        told: list[Cell] = []
        found = run_comparison(config, Silent(), task, done=told.append)
        finished = {path: time for path, time in kept.items() if "-s0" in path.name}
        assert len(finished) == 2
        assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
        steps = [(one.agent, one.seed, one.top[0].tuned is not None) for one in told]
        assert steps == [("random", 1, False), ("knapsack", 1, True), ("random", 1, True)]
        elsewhere = run_comparison(replace(config, run="three"), Silent(), task, known=found.cells, done=told.append)
        assert elsewhere.cells == found.cells
        assert len(told) == 3
        assert not (config.runs_dir / "three" / "cells").exists()
        fresh = run_comparison(replace(config, run="two"), Silent(), task)
        wider = run_comparison(replace(config, agents=("uniform", "random"), seeds=1), Silent(), task)
        scored = run_comparison(replace(config, run="four", seeds=1, finetune=False), Silent(), task)
        trained = run_comparison(replace(config, run="four", seeds=1), Silent(), task)
        with pytest.raises(InfeasibleBudget):
            run_comparison(replace(config, budgets=("params=0.1%",)), Silent(), task)
        with pytest.raises(RunError, match="another configuration"):
            run_comparison(replace(config, evaluations=5), Silent(), task)
    assert [_result(cell) for cell in found.cells] == [_result(cell) for cell in fresh.cells]
    assert [(c.agent, c.seed) for c in wider.cells] == [("uniform", 0), ("random", 0)]
    assert wider.cells[1] == found.at(BUDGET, "random")[0]
    for more in ("images", "evaluations"):
        other = replace(config, **{more: 3})  # type: ignore[arg-type]
        assert other.identity != config.identity
    assert all(p.tuned is None for cell in scored.cells for p in cell.top)
    assert [_result(cell) for cell in trained.cells] == [_result(cell) for cell in found.cells if cell.seed == 0]
    for one in found.cells:
        assert 0 < len(one.curve) <= 4
        assert one.curve == sorted(one.curve, reverse=True)  # type: ignore[type-var]
        assert one.seconds >= one.scoring_seconds > 0.0
        assert all(policy.tuned is not None for policy in one.top)
    assert Comparison.load(RunDir(config.runs_dir / "two").comparison) == fresh


def _result(cell: Cell) -> tuple[object, ...]:
    return cell.agent, cell.seed, cell.curve, [(p.choices, p.error, p.tuned) for p in cell.top]
