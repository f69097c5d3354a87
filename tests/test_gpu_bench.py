"""What benchmarks of a GPU promise: one procedure for deployed and dense, and rows that say where they are from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import resnet

from autoprune.cli.main import run as cli
from autoprune.core.choices import Choice, Pattern
from autoprune.kernels.convert import deploy_on
from autoprune.lut.bench import Labels, rows
from autoprune.lut.context import Context
from autoprune.lut.deploy import masked_copy
from autoprune.lut.gpu_bench import bench_graphs, deploy
from autoprune.lut.gpu_timer import HostBackend, samples_us

CONTEXT = Context(
    device="cpu", gpu="none", cpu="a host", batch=2, cache="network", driver="1.2", versions=(("torch", "x"),)
)
CHOICES: dict[str, Choice] = {"layer2.0.conv2": Pattern(count=8, kernels=0.5, share=(16, 8))}


def test_deployed_and_dense_executions_are_timed_by_one_procedure() -> None:
    model, x = resnet(), torch.randn(2, 1, 12, 12)
    deployed = deploy(masked_copy(model, CHOICES), CHOICES, x, CONTEXT, None)
    result = bench_graphs(model, deployed, x, CONTEXT, HostBackend(1 << 16))
    assert set(result.references) == {"plan", "torch-channels-last", "torch-folded"}
    assert result.absent == {}
    assert result.context == CONTEXT
    assert result.deployed.p20 <= result.deployed.p50 <= result.deployed.p80
    assert {d.layer: d.kernel for d in result.decisions}["layer2.0.conv2"] == "ell"
    found = rows(result, Labels("case", "policy", 2.0, "2026-01-01", "cmd"))
    assert [row.choice for row in found] == ["policy", *(f"dense:{name}" for name in result.references)]
    assert {(row.device, row.dtype, row.versions) for row in found} == {
        ("a host (1 threads)", "float32", "driver=1.2 torch=x")
    }
    assert all(row.baseline_p50 == pytest.approx(result.references[result.best].p50, abs=1e-3) for row in found)


def test_an_execution_that_fails_is_absent_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = resnet(), torch.randn(2, 1, 12, 12)
    deployed = deploy_on(torch.device("cpu"), model, {}, x, None, torch.float32)

    def refuse(model: object) -> object:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("autoprune.lut.gpu_bench.fold_batchnorm", refuse)
    result = bench_graphs(model, deployed, x, CONTEXT, HostBackend(1 << 16))
    assert set(result.references) == {"plan"}
    assert result.absent["torch-folded"] == "RuntimeError: no kernel image"


def test_samples_are_one_number_a_replay() -> None:
    samples = samples_us(lambda: sum(range(1000)), HostBackend(1 << 10), launches=3, replays=6)
    assert samples.shape == (6,)
    assert 0.0 < samples.min() <= samples.max() < 1e6


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bench", "--policy", "p.json", "--device", "cuda"], "--device cuda: PyTorch finds no NVIDIA GPU"),
        (["bench", "--policy", "p.json", "--table", "t.json"], "give it with --device cuda"),
        (["lut", "build", "--device", "cuda"], "--device cuda: PyTorch finds no NVIDIA GPU"),
        (["search", "--device", "cuda", "--budget", "latency=50%"], "--device cuda: PyTorch finds no NVIDIA GPU"),
        (["train", "--device", "cuda"], "--device cuda"),
        (["search", "--table", "h200", "--budget", "latency=50%"], "no table is embedded in this version"),
    ],
)
def test_a_machine_without_a_gpu_says_so_in_one_line(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert cli(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("autoprune: ")
    assert words in said
    assert not list(tmp_path.rglob("*.json"))
