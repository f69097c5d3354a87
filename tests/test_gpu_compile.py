"""What compiling ahead promises: resource reports from worker processes, and how many programs fit side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoprune.kernels.triton.configs import all_configs
from autoprune.lut import gpu_compile
from autoprune.lut.gpu_compile import Needs, compile_all, resident, usable

CONFIGS = [config for config in all_configs(torch.bfloat16) if config.kind == "forward"]


def test_worker_processes_compile_for_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_compile, "_known", {})
    config = CONFIGS[0]
    found = compile_all([config], torch.bfloat16, 90, workers=4)
    needs = found[config.text]
    assert needs.problem == ""
    assert 0 < needs.registers <= 255
    assert 0 < needs.shared_bytes <= needs.shared_limit
    assert usable(config, torch.bfloat16)
    assert resident(config, torch.bfloat16) >= 1
    assert any(tmp_path.iterdir())  # where the timing process finds it


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
