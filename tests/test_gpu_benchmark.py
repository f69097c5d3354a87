"""The script for a machine with a GPU runs as far as a machine without one can take it."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_dry_run_does_every_part_and_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    for part in gpu.BUDGETS:
        argv = ["--inside", "--dry", "--parts", part, "--out", str(tmp_path / "out"), "--work", str(tmp_path)]
        assert gpu.main(argv) == 0, part
    assert not (tmp_path / "out" / "gpu-failures.txt").exists()
    folder = tmp_path / "out" / "dry"
    with (folder / "gpu.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cases = {row["case"] for row in rows}
    assert {"correctness", "tables", "ResNet-50 3x3 32@8", "ResNet-20 forward", "ResNet-20 training step"} <= cases
    kernels = {row["choice"].split()[0] for row in rows if row["case"] == "correctness"}
    assert kernels == {"dense", "ell", "spmm"}
    assert {"ell gradients", "spmm gradients"} <= {" ".join(row["choice"].split()[:2]) for row in rows}
    summary = gpu.write_summary(folder).read_text(encoding="utf-8")
    assert "ResNet-50 3x3 512@7, 9× | 4× | 5.9× | – | not measured" in summary
    assert "| resnet20@1x12x12 batch 2 | " in summary
    with zipfile.ZipFile(folder / "gpu-tables.zip") as file:
        assert file.namelist() == ["resnet20-1x12x12-b2-t1.json"]
    assert all(path.stat().st_size < 16 << 20 for path in folder.iterdir())


def test_one_failing_part_costs_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--work", str(tmp_path)]
    command += ["--parts", "layers", "compile", "--budget", "layers=300", "compile=300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # Without a GPU and without --dry every part fails, each on its own account.
    assert done.returncode == 2
    assert "0 of 2 parts" in done.stdout
    failures = (tmp_path / "gpu-failures.txt").read_text()
    assert "layers: exit code 1" in failures
    assert "compile: exit code 1" in failures


def test_summary_judges_every_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    summary = importlib.import_module("gpu_summary")
    made = [
        ("ResNet-50 3x3 256@14", "4.5", "speed-up over best cuDNN", "2.6"),
        ("ResNet-50 3x3 256@14", "9.0", "speed-up over best cuDNN", "5.4"),
        ("ResNet-50 3x3 256@14", "9.0", "latency", "9.8"),
        ("ResNet-50 3x3 64@56", "2.25", "speed-up over best cuDNN", "1.3"),
        ("VGG-16 CIFAR training step", "4.5", "speed-up over fastest dense", "1.1"),
        ("VGG-16 CIFAR training step", "4.5", "speed-up over fastest dense", "1.35"),
    ]
    rows = [dict(zip(("case", "compression", "metric", "p50"), row, strict=True)) for row in made]
    found = {bar.what: bar for bar in summary.bars(rows)}
    assert len(found) == 4 * 3 + 2 * 2 + 2
    verdicts = {what: bar.verdict for what, bar in found.items() if bar.got is not None}
    assert verdicts == {
        "ResNet-50 3x3 256@14, 4.5×": "reached",
        "ResNet-50 3x3 256@14, 9×": "moonshot",
        "ResNet-50 3x3 64@56, 2.25×": "missed",
        "VGG-16 CIFAR training step, 4.5×": "reached",  # the better of two forms
    }
    assert "9.8 / – / – µs" in found["ResNet-50 3x3 256@14, 9×"].note


def test_parts_fit_their_time_and_take_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    assert sum(gpu.BUDGETS.values()) <= gpu.WHOLE_S < 9 * 60
    asked: dict[str, float] = {}
    monkeypatch.setattr(gpu, "_outside", lambda part, options, budget: asked.update({part: budget}) or part != "layers")
    argv = ["--parts", "layers", "tables", "--out", str(tmp_path), "--work", str(tmp_path), "--budget", "tables=470"]
    assert gpu.main(argv) == 1
    assert asked["layers"] == pytest.approx(gpu.BUDGETS["layers"])
    assert asked["tables"] == pytest.approx(470.0)
    assert "not measured" in (tmp_path / "gpu-summary.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        gpu.main([*argv, "--budget", "table=3"])
