"""The command line of training, benchmarks and latency tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune.cli.main import run as cli
from autoprune.core.choices import Block, Choice
from autoprune.core.errors import MeasurementError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.core.progress import Progress
from autoprune.core.rundir import RunDir, write_text
from autoprune.kernels.dispatch import Decision
from autoprune.lut.bench import BenchResult
from autoprune.lut.build import Pace
from autoprune.lut.measure import Spread
from autoprune.lut.table import Calibration, Context, LatencyTable, Point, current_context
from autoprune.lut.table import Row as LatencyRow
from autoprune.search.config import SearchConfig
from autoprune.search_spaces.trace import trace
from autoprune.tasks.task import load_task
from autoprune.trainers.recipe import Recipe, native_precision
from autoprune.trainers.run import TrainedAccuracy, TrainRequest, TrainResult


def test_every_flag_reaches_the_training(
    monkeypatch: pytest.MonkeyPatch, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[TrainRequest] = []
    trained = TrainResult(
        model="resnet20",
        data="mnist",
        trainer="campfire",
        epochs=3,
        seed=4,
        accuracy=TrainedAccuracy(validation=0.9, test=0.89),
        seconds={"train": 61.0},
    )

    def train_policy(request: TrainRequest, folder: RunDir, progress: Progress) -> TrainResult:
        asked.append(request)
        assert folder.path == tmp_path / "made-up-campfire-e3-s4"
        return trained

    monkeypatch.setattr("autoprune.trainers.run.train_policy", train_policy)
    flags = ["--trainer", "campfire", "--epochs", "3", "--seed", "4", "--data", "mnist", "--data-dir", "d"]
    flags += ["--set", "era_start=1", "--set", "exponent=2.5"]
    flags += ["--init", "w.safetensors", "--batch", "8", "--threads", "2", "--no-dense-control", "--embedded"]
    argv = ["train", "--policy", str(run.policy), *flags, "--runs-dir", str(tmp_path)]
    assert cli(argv) == 0
    out = capsys.readouterr().out
    assert "90.00 %" in out
    assert "1 min 01 s" in out
    assert cli([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record.pop("paths")["weights"] == str(tmp_path / "made-up-campfire-e3-s4" / "weights.safetensors")
    assert record.pop("run") == "made-up-campfire-e3-s4"
    assert record == trained.model_dump(mode="json")
    policy = Policy.load(run.policy)
    expected = TrainRequest(
        model="resnet20",
        data="mnist",
        policy=policy,
        trainer="campfire",
        settings={"era_start": 1, "exponent": 2.5},
        recipe=Recipe(epochs=3, precision=native_precision()),
        seed=4,
        init=Path("w.safetensors"),
        data_dir=Path("d"),
        embedded=True,
        control=False,
        batch=8,
        threads=2,
    )
    assert asked == [expected, expected]


def test_training_without_a_policy_is_dense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train_policy(request: TrainRequest, folder: RunDir, progress: Progress) -> TrainResult:
        assert request.policy is None
        raise MeasurementError(f"{request.model} in {folder.path.name}")

    monkeypatch.setattr("autoprune.trainers.run.train_policy", train_policy)
    assert cli(["train", "--model", "vgg11", "--runs-dir", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["vgg11-dense-e12-s0"]


@pytest.fixture
def benched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, int, float]]:
    """Replace the measurement of a benchmark; returns the images, threads and seconds it was given."""
    asked: list[tuple[torch.Tensor, int, float]] = []

    def bench(model: nn.Module, policy: Policy, batch: torch.Tensor, threads: int, seconds: float) -> BenchResult:
        asked.append((batch, threads, seconds))
        references = {"plan": Spread(90.0, 100.0, 110.0), "onnxruntime": Spread(190.0, 200.0, 210.0)}
        absent = {"torch-compile": "no compiler"}
        decisions = (
            Decision("conv1", "dense", "dense", "dense by policy"),
            Decision("layer1.0.conv1", "block(keep=0.25,filters=16)", "block", "4.0 us against 9.0 us dense"),
        )
        size = int(batch.shape[0])
        return BenchResult(Spread(40.0, 50.0, 60.0), references, absent, {}, 90, 10, size, threads, decisions)

    monkeypatch.setattr("autoprune.lut.bench.bench", bench)
    return asked


@pytest.fixture
def pruned(tmp_path: Path) -> RunDir:
    """A run ``pruned`` of batch 4 with a policy for ResNet-20 and its weights."""
    task = load_task("resnet20", "fashion-mnist")
    config = SearchConfig(budget="latency=50%", batch=4)
    folder = RunDir.open(tmp_path / "runs", "pruned", config.resolved())
    layers = trace(task.model, task.example)
    policy = Policy.make({"layer1.0.conv1": Block(keep=0.25)}, layers, model="resnet20", budget="latency=50%")
    policy.save(folder.policy)
    save_file(task.model.state_dict(), folder.weights)
    return folder


def test_bench_prints_and_appends_its_rows(
    benched: list[tuple[torch.Tensor, int, float]], pruned: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "rows.csv"
    argv = ["bench", "--policy", str(pruned.policy), "--batch", "3", "--threads", "2", "--seconds", "1.5"]
    assert cli([*argv, "--csv", str(csv)]) == 0
    ((images, threads, seconds),) = benched
    assert (tuple(images.shape), threads, seconds) == ((3, 1, 28, 28), 2, 1.5)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["deployed", "40.0", "50.0", "60.0", "0.50"] in lines
    assert ["onnxruntime", "190", "200", "210", "2.00"] in lines
    assert "torch-compile: no compiler" in out
    assert "4.0 us against 9.0 us dense" in " ".join(out.split())
    assert "conv1 dense dense" not in " ".join(out.split())
    assert "80 of 90 samples kept" in out
    assert len(csv.read_text().splitlines()) == 4


def test_bench_of_a_run_takes_its_policy_weights_and_settings(
    benched: list[tuple[torch.Tensor, int, float]], pruned: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "--run", "pruned", "--runs-dir", str(pruned.path.parent), "--json"]
    assert cli(argv) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["policy"], record["weights"]) == (str(pruned.policy), str(pruned.weights))
    assert record["deployed"] == {"p20": 40.0, "p50": 50.0, "p80": 60.0}
    assert set(record["references"]) == {"plan", "onnxruntime"}
    assert (record["fastest_reference"], record["ratio"]) == ("plan", 0.5)
    assert [(layer["layer"], layer["kernel"]) for layer in record["layers"]] == [
        ("conv1", "dense"),
        ("layer1.0.conv1", "block"),
    ]
    assert (record["context"]["batch"], record["context"]["threads"]) == (4, 1)
    assert cli([*argv, "--batch", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["context"]["batch"] == 2


def test_seed_of_a_benchmark_draws_its_images(
    benched: list[tuple[torch.Tensor, int, float]], pruned: RunDir
) -> None:
    argv = ["bench", "--run", "pruned", "--runs-dir", str(pruned.path.parent)]
    for seed in ("0", "0", "1"):
        assert cli([*argv, "--seed", seed]) == 0
    first, same, other = (images for images, _, _ in benched)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the measurements of a table; returns how many new rows each build was asked for."""
    asked: list[int] = []

    def build_table(
        wanted: Mapping[LayerSpec, Sequence[Choice]],
        context: Context,
        *,
        rows: Mapping[tuple[str, str], LatencyRow],
        progress: Callable[[int, int], None],
        checkpoint: Callable[[LatencyTable], None],
        pace: Pace,
        bench: None,
    ) -> LatencyTable:
        assert pace.limit_s is None
        row = LatencyRow(p10=9.0, p50=10.0, p90=12.0, weight_bytes=64, kernel="made-up")
        new = {(layer.signature, choice.text): row for layer, choices in wanted.items() for choice in choices}
        asked.append(len(set(new) - set(rows)))
        table = LatencyTable(context, {**new, **rows})
        checkpoint(table)
        progress(len(new), len(new))
        return table

    def calibrate(
        table: LatencyTable, layers: object, deploy: object, space: object, seed: int, count: int, timer: None
    ) -> LatencyTable:
        assert count == 30
        points = tuple(Point(rows_us=us, measured_us=us) for us in (1.0, 2.0))
        made = Calibration(slope=1.1, intercept_us=5.0, mape=0.02, kendall_tau=0.9, points=points)
        return table.with_calibration(made)

    monkeypatch.setattr("autoprune.lut.build.build_table", build_table)
    monkeypatch.setattr("autoprune.lut.calibrate.calibrate", calibrate)
    return asked


def test_table_is_built_calibrated_and_shown(
    measured: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    assert cli(["lut", "build", "--out", str(out), "--batch", "2", "--threads", "1"]) == 0
    built = capsys.readouterr()
    assert built.err.startswith("table resnet20 b2: started, ")
    assert LatencyTable.load(out, current_context(2, 1)).calibration is not None
    assert cli(["lut", "build", "--out", str(out), "--batch", "2", "--resume"]) == 0
    assert measured[0] > 0
    assert measured[1] == 0
    assert cli(["lut", "build", "--out", str(out), "--batch", "1", "--resume"]) == 2
    assert "measured with batch 2, wanted 1" in capsys.readouterr().err
    assert cli(["lut", "show", str(out), "--batch", "2", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "end to end = 1.100 × sum of rows + 5.0 µs; 2.0 % mean error" in shown
    assert "conv-k16-c1-3x3-in28x28-s1x1-p1x1" in shown
    assert shown in built.out
    assert "…" not in shown


def test_table_of_a_run_and_table_of_none_have_their_places(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(["lut", "build", "--run", "mine", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["path"] == "runs/mine/table.json"
    assert len(built["rows"]) == measured[0]
    assert built["calibration"]["slope"] == 1.1
    assert cli(["lut", "show", "--run", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == built
    assert cli(["lut", "build", "--batch", "2", "--threads", "2"]) == 0
    assert {str(path) for path in Path("runs").rglob("*.json")} == {
        "runs/mine/table.json",
        "runs/tables/resnet20-b2-t2.json",
    }


def test_table_of_another_run_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    write_text(table, "kept")
    assert cli(["lut", "build", "--out", str(table)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert table.read_text() == "kept"
