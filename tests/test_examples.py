"""Every example runs, at a tiny size, to the policy's sparsity."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "examples"
SIZE = ["--epochs", "4", "--images", "64", "--batch", "16"]


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *SIZE, *arguments])
    monkeypatch.syspath_prepend(str(FOLDER))
    with torch.random.fork_rng():
        runpy.run_path(str(FOLDER / name), run_name="__main__")


def pruned(text: str) -> bool:
    """Whether the last report is of final masks: patterns of 4 in 9 on half of the kernels."""
    return "masks final: True" in text and ("sparsity 0.77" in text or "sparsity 0.78" in text)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mixed_precision.py", []),
        ("compiled.py", ["--backend", "eager"]),
        ("with_accelerate.py", []),
    ],
)
def test_an_example_reaches_the_policy(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, *arguments, monkeypatch=monkeypatch)
    assert pruned(capsys.readouterr().out)


def test_the_masked_average_is_as_sparse_as_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("average.py", monkeypatch=monkeypatch)
    report, average = capsys.readouterr().out.split("average:")
    assert pruned(report)
    assert "sparsity 0.77" in average or "sparsity 0.78" in average


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_plain_example_stopped_in_the_era_ends_as_an_unbroken_one(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = str(tmp_path / "whole.pt"), str(tmp_path / "broken.pt")
    run("plain.py", "--optimizer", optimizer, "--checkpoint", whole, monkeypatch=monkeypatch)
    assert pruned(capsys.readouterr().out)
    run("plain.py", "--optimizer", optimizer, "--checkpoint", broken, "--stop", "6", monkeypatch=monkeypatch)
    assert "masks final" not in capsys.readouterr().out
    run("plain.py", "--optimizer", optimizer, "--checkpoint", broken, monkeypatch=monkeypatch)
    wanted, got = (torch.load(path, weights_only=True)["model"] for path in (whole, broken))
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())


def test_a_trainer_that_goes_on_from_a_checkpoint_in_the_era_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")  # transformers itself takes the checkout's folder for another package, kernels
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for more in (["--out", str(whole)], ["--out", str(broken), "--resume", str(whole / "checkpoint-8")]):
        done = subprocess.run(
            [sys.executable, str(FOLDER / "with_trainer.py"), *SIZE, *more],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert pruned(done.stdout), done.stderr
    wanted, got = (load_file(folder / "checkpoint-16" / "model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())
