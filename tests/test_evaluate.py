"""FGSM in pixel space, and the command that judges weights by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.cli.main import run as cli
from autoprune.core.rundir import RunDir
from autoprune.tasks.attack import attacked_accuracy, fgsm
from autoprune.tasks.data import DataSet, Split
from autoprune.tasks.models import MODELS


class Pair(nn.Module):
    """Two scores that are a pixel's value and its opposite."""

    def __init__(self, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[2.0], [-2.0]]))
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


@pytest.fixture
def data() -> DataSet:
    """Grey images of one pixel; brighter than the mean is class 0."""
    images = torch.tensor([0, 100, 115, 140, 155, 255], dtype=torch.uint8).reshape(-1, 1, 1, 1)
    split = Split(images, torch.tensor([1, 1, 1, 0, 0, 0]))
    return DataSet("fashion-mnist", 2, 0.5, 0.25, split, split, split, full=False)


def test_fgsm_moves_every_pixel_against_its_label_and_stays_in_range(data: DataSet) -> None:
    pixels = data.test.images.float() / 255.0
    moved = fgsm(Pair(), pixels, data.test.labels, 0.1, data)
    assert moved.flatten().tolist() == pytest.approx([0.1, 0.492, 0.551, 0.449, 0.508, 0.9], abs=1e-3)
    assert fgsm(Pair(), pixels, 1 - data.test.labels, 0.1, data).amin() == 0.0
    # The step is in pixels, whatever the normalisation: ε = 0.1 is not 0.1 standard deviations.
    torch.testing.assert_close((moved - pixels).abs(), torch.full_like(pixels, 0.1))


def test_accuracy_falls_with_the_strength(data: DataSet) -> None:
    found = attacked_accuracy(Pair(), data.test, data, (0.0, 0.04, 0.1, 0.15), batch=4)
    assert found == pytest.approx({0.0: 1.0, 0.04: 1.0, 0.1: 4 / 6, 0.15: 2 / 6})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, data: DataSet, tmp_path: Path) -> Path:
    monkeypatch.setitem(MODELS._items, "pair", Pair)
    monkeypatch.setattr("autoprune.tasks.task.load_data", lambda name, data_dir: data)
    folder = RunDir.open(tmp_path, "done", {"model": "pair", "data": "fashion-mnist"})
    save_file(Pair().state_dict(), folder.weights)
    RunDir.open(tmp_path, "begun", {"model": "pair", "data": "fashion-mnist"})
    return tmp_path


def test_evaluate_prints_clean_and_attacked_accuracy(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--run", "done", "--runs-dir", str(runs), "--attack", "fgsm", "--epsilon", "0.1, 0.15"]
    assert cli(["evaluate", *flags, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["accuracy"] == 1.0
    assert record["attacked"] == pytest.approx({"0.1": 4 / 6, "0.15": 2 / 6})
    assert (record["images"], record["split"], record["model"]) == (6, "test", "pair")
    assert cli(["evaluate", *flags, "--split", "validation", "--images", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 validation images" in out
    assert "fgsm 0.15" in out


def test_evaluate_without_an_attack_is_the_clean_accuracy(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = str(RunDir(runs / "done").weights)
    assert cli(["evaluate", "--weights", weights, "--model", "pair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attacked"] == {}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attack", "fgsmm"], "Did you mean 'fgsm'"),
        (["--attack", "fgsm", "--epsilon", "0.1,x"], "--epsilon 'x'"),
        (["--attack", "fgsm", "--epsilon", "1.5"], "--epsilon '1.5'"),
        (["--epsilon", "0.1"], "add --attack fgsm"),
        (["--split", "tests"], "Did you mean 'test'"),
        (["--model", "resnet20"], "the run is of 'pair'"),
        (["--weights", "w"], "--run and --weights: got both"),
    ],
)
def test_bad_requests_are_refused_by_one_line(
    flags: list[str], words: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["evaluate", "--run", "done", "--runs-dir", str(runs), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_run_without_weights_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["evaluate", "--run", "begun", "--runs-dir", str(runs)]) == 2
    assert "has no weights yet" in capsys.readouterr().err
