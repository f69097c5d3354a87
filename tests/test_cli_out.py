"""``autoprune apply`` and ``autoprune export`` as a user gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import autoprune
from autoprune.cli.main import run as cli
from autoprune.core.choices import Fine
from autoprune.core.policy import Policy
from autoprune.kernels.convert import is_masked
from autoprune.search_spaces.trace import trace
from autoprune.tasks.models import build_model
from autoprune.tasks.task import load_task


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = load_task("resnet20", "fashion-mnist")
    layers = trace(task.model, task.example)
    choices = {"layer1.0.conv1": Fine(keep=0.25), "layer3.0.conv2": Fine(keep=0.125)}
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    Policy.make(choices, layers, model="resnet20", budget="latency=50%").save(path)
    return path


@pytest.mark.parametrize("form", ["masked", "compact", "packed"])
def test_applied_network_loads_from_the_users_factory(
    form: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert cli(["apply", "--policy", str(policy), "--out", str(out), "--form", form, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["form"] == form
    assert record["difference"] <= 1e-5
    assert record["size"]["file_bytes"] == (out / "weights.safetensors").stat().st_size
    network = autoprune.load(out, model=lambda: build_model("resnet20", 1, 10))
    task = load_task("resnet20", "fashion-mnist")
    spec = next(layer for layer in trace(task.model, task.example) if layer.name == "layer3.0.conv2")
    assert is_masked(network.get_submodule("layer3.0.conv2").weight, spec, Fine(keep=0.125))
    part = task.data.test.take(500)
    found = network(task.data.normalize(part.images)).argmax(1)
    assert float((found == part.labels).double().mean()) > 0.8
    # Without a factory the recorded name builds it.
    assert torch.equal(autoprune.load(out)(task.example), network(task.example))


def test_apply_tells_sizes_in_words(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["apply", "--policy", str(policy), "--out", str(tmp_path), "--form", "compact"]) == 0
    out = capsys.readouterr().out
    assert "parameters        " in out
    assert "no filter is all zero" in out or "channels removed" in out
    assert str(tmp_path) in out
    assert cli(["apply", "--policy", str(policy), "--out", str(tmp_path), "--form", "packed"]) == 0


@pytest.mark.parametrize(("flag", "name"), [("--onnx", "net.onnx"), ("--torch-export", "net.pt2")])
def test_exported_file_is_checked_timed_and_its_zeros_are_told(
    flag: str, name: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    argv = ["export", "--policy", str(policy), flag, str(path), "--seconds", "0.3"]
    assert cli([*argv, "--csv", str(tmp_path / "rows.csv")]) == 0
    out = capsys.readouterr().out
    assert "2 sparse layers (first: layer1.0.conv1, fine(keep=0.25)) are dense with zeros" in out
    assert "× dense at batch 1, 1 threads" in out
    assert path.stat().st_size > 1_000_000
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["apply", "--out", "o"], "--policy and --run: got neither"),
        (["apply", "--policy", "P", "--out", "o", "--form", "compct"], "no form 'compct'. Did you mean 'compact'?"),
        (["apply", "--policy", "P", "--out", "full"], "--out full: the folder is not empty"),
        (["apply", "--policy", "P", "--out", "file"], "--out file: a file stands there"),
        (["apply", "--policy", "absent.json", "--out", "o"], "absent.json: cannot be read"),
        (["apply", "--policy", "P", "--weights", "file", "--out", "o"], "cannot be read as safetensors"),
        (["export", "--policy", "P"], "--onnx and --torch-export: got neither"),
        (["export", "--policy", "P", "--onnx", "a.onnx", "--torch-export", "a.pt2"], "got both"),
        (["export", "--policy", "P", "--onnx", "a.onnx", "--form", "packed"], "ONNX cannot hold --form packed"),
        (["export", "--policy", "P", "--torch-export", "a.pt2", "--form", "packed"], "torch.export cannot hold"),
        (["export", "--policy", "P", "--torch-export", "a.bin"], "give a name that ends in .pt2"),
        (["export", "--policy", "P", "--onnx", "absent/a.onnx"], "the folder absent is absent"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(
    argv: list[str],
    part: str,
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in ("file", "full/file"):
        (tmp_path / name).write_text("something")
    before = sorted(tmp_path.rglob("*"))
    assert cli([str(policy) if word == "P" else word for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("autoprune: ")]
    assert len(lines) == 1
    assert part in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
