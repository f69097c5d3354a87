"""What tables promise that were measured elsewhere, and budgets of memory: predictions, exact bytes, time limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import SPACE

import autoprune
from autoprune.cli.main import run as cli
from autoprune.core.budget import parse_budget
from autoprune.core.choices import Block, Choice, Dense, Fine
from autoprune.core.duration import DurationError, parse_seconds
from autoprune.core.errors import InfeasibleBudget, MissingLatency, TableMismatch
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.core.rundir import RunDir
from autoprune.envs.problem import Problem, Quality
from autoprune.kernels.convert import PlannedModel, convert
from autoprune.lut import embedded
from autoprune.lut.build import Pace, build_table, by_share, spread
from autoprune.lut.deploy import masked_copy
from autoprune.lut.left_out import left_out
from autoprune.lut.memory import map_bytes, peak_bytes
from autoprune.lut.row import Row, Unmeasured
from autoprune.lut.table import LatencyTable, current_context
from autoprune.report.html import render
from autoprune.report.summary import verdict
from autoprune.search.memory import Memory, best_bounded, memory_constraint, workspace_bounds
from autoprune.search.tables import Job, Request, build_tables
from autoprune.search_spaces.space import load_space
from autoprune.search_spaces.trace import trace
from autoprune.tasks.networks import untrained
from autoprune.tasks.task import Task, load_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables")
    (path / "space.yaml").write_text(SPACE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def foreign(folder: Path) -> LatencyTable:
    """A table of ResNet-20 measured on one thread; searches below are for two."""
    job = Job("resnet20", 1, folder / "box-resnet20-b1.json")
    request = Request(space=str(folder / "space.yaml"), networks=6)
    (table,) = build_tables([job], request, lambda name: lambda done, total: None, lambda text: None)
    return table


@pytest.fixture(scope="module")
def task() -> Task:
    full = load_task("resnet20", "fashion-mnist")
    splits = {name: getattr(full.data, name).take(300) for name in ("train", "validation", "test")}
    return replace(full, data=replace(full.data, **splits))


def test_table_knows_its_network_and_dense_executions(foreign: LatencyTable, folder: Path) -> None:
    assert foreign.whole is not None
    assert foreign.whole.model == "resnet20"
    assert set(foreign.whole.dense_us) == {"plan", "torch-folded", "torch-channels-last"}
    assert foreign.whole.activation_bytes is not None
    assert foreign.whole.activation_bytes > 28 * 28 * 16 * 4
    assert LatencyTable.load(folder / "box-resnet20-b1.json") == foreign


def test_table_measured_elsewhere_predicts_and_nothing_is_deployed(
    foreign: LatencyTable, folder: Path, task: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "embedded", lambda: {"box-resnet20-b1": folder / "box-resnet20-b1.json"})
    monkeypatch.setattr("autoprune.search.deploy.interleaved_us", lambda *_: pytest.fail("something was timed"))
    # Of the dense network as predicted, so that something must be pruned however the dense executions were timed.
    limit_us = 0.8 * foreign.network_us(trace(task.model, task.example), {})
    result = autoprune.search(
        task.model, task, budget=f"latency={limit_us:.3f}us", agent="knapsack", evaluations=3,
        space=str(folder / "space.yaml"), table="box", threads=2, runs_dir=folder / "runs", run="far",
    )
    assert foreign.whole is not None
    assert result.references == foreign.whole.dense_us
    chosen = result.row("chosen")
    assert chosen is not None
    assert all(row.measured is None for row in result.rows)
    dense_us = min(foreign.whole.dense_us.values())
    assert chosen.predicted.dense_latency_us == dense_us
    assert chosen.predicted.latency_ratio is not None
    assert result.met
    assert (chosen.predicted.latency_us or 0.0) <= limit_us * 1.02
    assert result.predicted_for == foreign.context.place
    assert "(1 threads)" in result.predicted_for
    policy = Policy.load(RunDir(folder / "runs" / "far").policy)
    assert policy.file.measured is None
    assert policy.file.context["threads"] == 1
    assert all(layer.measured_us is None for layer in result.layers)
    assert any(layer.choice != "dense" and "measured alone on" in layer.why for layer in result.layers)
    assert "as predicted for" in verdict(result)
    assert "is predicted to run in" in verdict(result)
    page = render(result, policy.file)
    assert "no network was deployed to verify it" in page
    assert "(pred.)" in page


def test_tables_are_found_by_name_network_and_batch(
    foreign: LatencyTable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = trace(*untrained("resnet20", "fashion-mnist"))
    with pytest.raises(TableMismatch, match="no table is embedded in this version"):
        embedded.find_table("box", layers, 1)
    file = folder / "box-resnet20-b1.json"
    monkeypatch.setattr(embedded, "embedded", lambda: {"box-resnet20-b1": file})
    assert embedded.find_table("box", layers, 1) == file
    assert embedded.find_table("other.json", layers, 1) == Path("other.json")
    with pytest.raises(TableMismatch, match="none of box-resnet20-b1 is for this network at batch 32"):
        embedded.find_table("box", layers, 32)
    with pytest.raises(TableMismatch, match="embedded tables: box-resnet20-b1"):
        embedded.find_table("h200", layers, 1)
    assert embedded.place_name("NVIDIA H200") == "h200"
    assert embedded.place_name("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


def test_embedded_folder_may_be_absent() -> None:
    assert all(path.suffix == ".json" for path in embedded.embedded().values())


# Memory.


@pytest.mark.parametrize("seed", range(4))
def test_predicted_memory_is_that_of_the_deployed_plan(foreign: LatencyTable, folder: Path, seed: int) -> None:
    model, example = untrained("resnet20", "fashion-mnist")
    layers = trace(model, example)
    space = load_space(str(folder / "space.yaml"), layers).choices
    generator = np.random.default_rng(seed)
    choices = {name: found[generator.integers(len(found))] for name, found in space.items()} if seed else {}
    deployed = convert(masked_copy(model, choices), choices, example)
    assert isinstance(deployed, PlannedModel)
    program = deployed.plan.program(1)
    real = program.weight_bytes + program.workspace_bytes
    maps = map_bytes(model, example, foreign.context)
    assert foreign.whole is not None
    assert maps == foreign.whole.activation_bytes
    assert peak_bytes(foreign, layers, choices, maps) == pytest.approx(real, rel=0.002)


def test_rows_of_an_older_table_refuse_a_memory_budget(foreign: LatencyTable) -> None:
    key, row = next(iter(foreign.rows.items()))
    old = foreign.with_rows({key: row.model_copy(update={"workspace_bytes": None})})
    model, example = untrained("resnet20", "fashion-mnist")
    with pytest.raises(MissingLatency, match="holds no workspace"):
        peak_bytes(old, trace(model, example), {}, 0)


LAYERS = tuple(
    LayerSpec(name, "conv", (16, 16, 3, 3), padding=(1, 1), input_hw=(size, size), output_hw=(size, size))
    for name, size in (("a", 8), ("b", 9), ("c", 10))
)
OPTIONS: dict[LayerSpec, tuple[Choice, ...]] = {
    layer: (Dense(), Block(keep=0.5), Fine(keep=0.2)) for layer in LAYERS[:2]
}
# Choice → packed weights, workspace and error: the finest weights are smallest, and need a workspace.
FIGURES = {"dense": (100, 0, 0.0), Block(keep=0.5).text: (60, 0, 0.5), Fine(keep=0.2).text: (20, 30, 0.6)}


def _memory_table() -> LatencyTable:
    rows = {
        (layer.signature, text): Row(
            p10=1.0, p50=1.0, p90=1.0, weight_bytes=weight, kernel="k", workspace_bytes=workspace
        )
        for layer in LAYERS
        for text, (weight, workspace, _) in FIGURES.items()
    }
    return LatencyTable(current_context(), rows)


def _memory_problem(budget: str, bound: int) -> Problem:
    limit = parse_budget(budget).limit("memory")
    assert limit is not None
    constraint, _ = memory_constraint(limit, LAYERS, OPTIONS, _memory_table(), Memory(1000, bound))
    errors = tuple(np.array([FIGURES[c.text][2] for c in choices]) for choices in OPTIONS.values())
    choices = {layer.name: found for layer, found in OPTIONS.items()}
    return Problem(list(OPTIONS), choices, [constraint], errors, lambda assignment: Quality(0.0, 1.0, 0.0))


@pytest.mark.parametrize("limit", [1300, 1261, 1260, 1230, 1221, 1220, 1200, 1171, 1170])
def test_memory_budget_admits_exactly_what_fits(limit: int) -> None:
    table = _memory_table()
    bounds = workspace_bounds(LAYERS, OPTIONS, table)
    assert bounds == [30, 0]
    texts = list(FIGURES)
    posed = {}
    for bound in bounds:
        try:
            posed[bound] = _memory_problem(f"memory={limit}B", bound)
        except InfeasibleBudget:
            continue
    for first in range(3):
        for second in range(3):
            chosen = {"a": OPTIONS[LAYERS[0]][first], "b": OPTIONS[LAYERS[1]][second]}
            fits = peak_bytes(table, LAYERS, chosen, 1000) <= limit
            assert fits == any(problem.feasible((first, second)) for problem in posed.values()), (texts[first], second)


def test_bound_of_the_least_error_is_searched() -> None:
    tight = best_bounded([30, 0], lambda bound: _memory_problem("memory=1220B", bound))
    assert [choice.text for choice in tight.named((1, 1)).values()] == [Block(keep=0.5).text] * 2
    assert tight.feasible((1, 1))
    assert not tight.feasible((2, 2))
    tighter = best_bounded([30, 0], lambda bound: _memory_problem("memory=1170B", bound))
    assert tighter.feasible((2, 2))
    with pytest.raises(InfeasibleBudget, match="memory"):
        best_bounded([30, 0], lambda bound: _memory_problem("memory=1169B", bound))


def test_memory_is_a_budget_of_the_command_line() -> None:
    budget = parse_budget("memory=50%,size=1MB")
    limit = budget.limit("memory")
    assert limit is not None
    assert (limit.relative, limit.value) == (True, 0.5)
    assert parse_budget("memory=2MB").limits[0].value == 2e6


def test_search_keeps_a_memory_budget(foreign: LatencyTable, folder: Path, task: Task) -> None:
    assert foreign.whole is not None
    maps = foreign.whole.activation_bytes
    assert maps is not None
    layers = trace(task.model, task.example)
    space = load_space(str(folder / "space.yaml"), layers).choices
    smallest: dict[str, Choice] = {}
    for layer in layers:
        dense_us = foreign.layer_us(layer, Dense())
        usable = [choice for choice in space[layer.name] if foreign.layer_us(layer, choice) < dense_us]
        sizes = {choice: foreign.row(layer, choice).weight_bytes for choice in [Dense(), *usable]}
        smallest[layer.name] = min(sizes, key=lambda choice, sizes=sizes: sizes[choice])
    limit = (peak_bytes(foreign, layers, {}, maps) + peak_bytes(foreign, layers, smallest, maps)) // 2
    result = autoprune.search(
        task.model, task, budget=f"memory={limit}B", agent="knapsack", evaluations=2, runs_dir=folder / "runs",
        run="small", space=str(folder / "space.yaml"), table=str(folder / "box-resnet20-b1.json"), threads=2,
    )
    chosen = result.row("chosen")
    assert chosen is not None
    policy = Policy.load(RunDir(folder / "runs" / "small").policy)
    assert peak_bytes(foreign, layers, policy.choices, maps) <= limit
    assert chosen.choices != {name: "dense" for name in chosen.choices}


# Time limits.


class Bench:
    """Rows that take a second each; the second shape is the larger part of the network."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def estimate_us(self, layer: LayerSpec) -> float:
        return {"a": 1.0, "b": 5.0, "c": 2.0}[layer.name]

    def prepare(self, wanted: object) -> None:
        pass

    def measure(self, layer: LayerSpec, choices: Sequence[Choice], dense: Row | None) -> dict[tuple[str, str], Row]:
        self.now += len(choices)
        self.asked.append((layer.name, tuple(choice.kind for choice in choices)))
        assert dense is not None or Dense() in choices
        row = Row(p10=1.0, p50=1.0, p90=1.0, weight_bytes=1, kernel="k")
        return {(layer.signature, choice.text): row for choice in choices}


WANTED: dict[LayerSpec, tuple[Choice, ...]] = {
    layer: (Dense(), Block(keep=0.5), Fine(keep=0.5), Fine(keep=0.1)) for layer in LAYERS
}


def _limited(limit_s: float | None, rows: dict[tuple[str, str], Row] | None = None) -> tuple[LatencyTable, Bench]:
    bench = Bench()
    pace = Pace(limit_s, lambda: bench.now)
    return build_table(WANTED, current_context(), rows=rows, pace=pace, bench=bench), bench


def test_within_a_limit_dense_rows_come_first_then_the_largest_shares() -> None:
    table, bench = _limited(8.0)
    assert [name for name, _ in bench.asked] == ["b", "c", "a", "b", "c"]
    assert [kinds for _, kinds in bench.asked[:3]] == [("dense",)] * 3
    assert len(bench.asked[3][1]) == 3
    assert len(bench.asked[4][1]) == 2  # what still fits, spanning the layer's choices
    assert len(table.rows) == 8
    assert {why.reason for why in table.unmeasured.values()} == {"limit"}
    assert len(table.unmeasured) == 4
    table.require(WANTED)  # what was left out is said, so that a search does without it
    assert table.measured(LAYERS[0], WANTED[LAYERS[0]]) == (Dense(),)
    (line,) = left_out(table)
    assert line.startswith("4 choices were not measured within the time given")


def test_next_build_measures_what_the_limit_left_out() -> None:
    table, _ = _limited(8.0)
    whole, bench = _limited(None, dict(table.rows))
    assert sum(len(kinds) for _, kinds in bench.asked) == 4
    assert not whole.unmeasured
    assert len(whole.rows) == 12


def test_a_limit_that_is_over_still_gives_every_dense_row() -> None:
    table, _ = _limited(0.001)
    assert {choice for _, choice in table.rows} == {"dense"}


def test_order_is_by_share_and_any_beginning_spans_the_choices() -> None:
    assert [layer.name for layer, _ in by_share(WANTED, Bench())] == ["b", "c", "a"]
    choices = [Fine(keep=keep) for keep in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)]
    order = spread(choices)
    assert order[:3] == [choices[0], choices[6], choices[3]]
    assert sorted(order) == sorted(choices)
    assert spread(choices[:1]) == choices[:1]
    assert spread([]) == []


def test_ruled_out_rows_are_remembered_in_the_file(tmp_path: Path) -> None:
    table, _ = _limited(None)
    key = (LAYERS[0].signature, Fine(keep=0.01).text)
    ruled = table.without({key: Unmeasured(reason="floor", bound_us=3.0)})
    ruled.save(tmp_path / "t.json")
    again = LatencyTable.load(tmp_path / "t.json")
    assert again == ruled
    assert again.hash != table.hash
    assert "cannot beat the dense layer even at their floor" in left_out(again)[0]
    assert "Fine" not in left_out(again)[0]
    assert not again.with_rows({key: next(iter(table.rows.values()))}).unmeasured


@pytest.mark.parametrize(("text", "seconds"), [("8m", 480.0), ("90s", 90.0), ("1.5h", 5400.0), (".5 m", 30.0)])
def test_durations_carry_their_unit(text: str, seconds: float) -> None:
    assert parse_seconds("--limit", text) == seconds
    with pytest.raises(DurationError, match="write a time above 0"):
        parse_seconds("--limit", text.rstrip("msh "))


ONE = """name: one
rules:
  - match: {name: layer3.2.conv2}
    choices: [{kind: dense}, {kind: block, keep: [0.25]}]
"""


def test_several_tables_are_built_in_one_call_within_a_limit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = folder / "one.yaml"
    space.write_text(ONE)
    argv = ["lut", "build", "--models", "resnet20@1x12x12", "--batches", "1,2", "--limit", "2m"]
    assert cli([*argv, "--space", str(space), "--out", str(folder / "many")]) == 0
    files = [folder / "many" / f"resnet20-1x12x12-b{batch}-t1.json" for batch in (1, 2)]
    assert sorted((folder / "many").iterdir()) == files
    assert capsys.readouterr().out.count("end to end = ") == 2
    for batch, path in enumerate(files, 1):
        table = LatencyTable.load(path)
        assert table.context.batch == batch
        assert table.calibration is not None
        assert len(table.calibration.points) == 30
    assert cli([*argv, "--space", str(space), "--out", str(folder / "many")]) == 2
    assert "--resume keeps its rows" in capsys.readouterr().err


def test_networks_share_the_rows_of_a_batch(folder: Path) -> None:
    space = folder / "one.yaml"
    space.write_text(ONE)
    jobs = [Job(f"resnet{depth}@1x12x12", 1, folder / f"{depth}.json") for depth in (20, 32)]
    request = Request(space=str(space), networks=4)
    tables = build_tables(jobs, request, lambda name: lambda done, total: None, lambda text: None)
    shared = set(tables[0].rows) & set(tables[1].rows)
    assert len(shared) >= 7
    assert all(tables[0].rows[key] == tables[1].rows[key] for key in shared)


def test_networks_by_name_have_the_size_asked_for() -> None:
    before = torch.random.get_rng_state()
    for name, shape in (
        ("resnet20", (1, 1, 28, 28)), ("vgg16@3x32x32", (1, 3, 32, 32)), ("torchvision:resnet18", (1, 3, 224, 224)),
    ):
        model, example = untrained(name, "fashion-mnist")
        assert example.shape == shape
        assert not model.training
    assert torch.equal(before, torch.random.get_rng_state())
