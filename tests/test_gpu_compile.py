"""What compiling ahead promises: it warms exactly what rows launch, and tells how many programs fit side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoprune.kernels.triton.configs import all_configs
from autoprune.kernels.triton.units import units
from autoprune.lut import gpu_compile
from autoprune.lut.gpu_compile import Needs, compile_all, resident, usable

ROOT = Path(__file__).parent.parent
CONFIGS = [config for config in all_configs(torch.bfloat16) if config.kind == "forward"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache after the workers compiled everything for sm_90."""
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setattr(gpu_compile, "_known", {})
        found = compile_all(units(torch.bfloat16), 90, workers=os.cpu_count() or 1)
        assert set(found) == set(units(torch.bfloat16))
        for config in CONFIGS:
            needs = gpu_compile._known[config.text, "torch.bfloat16"]
            assert 0 < needs.registers <= 255
            assert 0 < needs.shared_bytes <= needs.shared_limit
            assert usable(config, torch.bfloat16)
            assert 1 <= resident(config, torch.bfloat16) <= 8
        assert {needs.problem for needs in found.values()} == {""}
    return folder


def _launched(arch: int, cache: Path, *few: str) -> dict[str, list[str]]:
    """Measure rows on a fake device; return which kernels were compiled for them, which found, and the rows."""
    command = [sys.executable, str(ROOT / "tests" / "launched.py"), str(arch), str(cache), *few]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


_KERNELS = {"ell_forward", "ell_dweight", "ell_reduce", "pad_map", "take", "spmm_forward", "spmm_dweight"}


def test_rows_find_every_kernel_they_launch_compiled(cache: Path) -> None:
    found = _launched(90, cache)
    assert found["compiled"] == []
    assert set(found["cached"]) == _KERNELS
    rows = {f"{direction} {kernel}" for direction in ("forward", "training") for kernel in ("dense", "ell", "spmm")}
    assert {f"{row.split()[0]} {row.split()[-1]}" for row in found["rows"]} >= rows


def test_a_cache_of_another_device_is_of_no_use(cache: Path) -> None:
    assert set(_launched(80, cache, "few")["compiled"]) == {"ell_forward", "pad_map"}


def test_the_next_process_reads_the_report_and_starts_no_workers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(gpu_compile, "_known", {})
    monkeypatch.setattr(gpu_compile, "ProcessPoolExecutor", lambda **_: pytest.fail("a worker was started"))
    assert set(compile_all(units(torch.bfloat16), 90, workers=4)) == set(units(torch.bfloat16))
    assert (CONFIGS[0].text, "torch.bfloat16") in gpu_compile._known


def test_configuration_is_dropped_by_its_report_and_counted_by_its_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    small, wide = min(CONFIGS, key=lambda c: c.bm * c.bn), max(CONFIGS, key=lambda c: c.bm * c.bn)
    known = {
        (small.text, str(torch.bfloat16)): Needs(64, 50 << 10, 227 << 10),
        (wide.text, str(torch.bfloat16)): Needs(255, 200 << 10, 227 << 10, "8 bytes of spills"),
    }
    monkeypatch.setattr(gpu_compile, "_known", known)
    assert resident(small, torch.bfloat16) == min(4, 65536 // (64 * 32 * small.warps))
    assert resident(wide, torch.bfloat16) == 1
    assert usable(small, torch.bfloat16)
    assert not usable(wide, torch.bfloat16)
