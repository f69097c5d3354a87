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
    with zipfile.ZipFile(folder / "gpu-tables.zip") as file:
        assert file.namelist() == ["resnet20-1x12x12-b2-t1.json"]
    assert all(path.stat().st_size < 16 << 20 for path in folder.iterdir())


def test_one_failing_part_costs_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--work", str(tmp_path)]
    command += ["--parts", "layers", "training"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # Without a GPU and without --dry every part fails, each on its own account.
    assert done.returncode == 2
    assert "0 of 2 parts" in done.stdout
    failures = (tmp_path / "gpu-failures.txt").read_text()
    assert "layers: exit code 1" in failures
    assert "training: exit code 1" in failures
