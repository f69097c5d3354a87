"""The Block-ELL kernels without a GPU: right in the interpreter, and good machine code for sm_80 and sm_90.

Both need processes of their own: the interpreter is chosen when Triton is imported, the compiler's driver is faked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoprune.core.errors import DeviceError
from autoprune.kernels.triton.compile_only import SHARED_LIMIT, Job, Resources, fake_device, resource_report
from autoprune.kernels.triton.configs import all_configs

_ROOT = Path(__file__).parent.parent
_CASES = _ROOT / "tests" / "interpreted" / "ell_cases.py"


def test_kernels_are_right_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(_CASES)],
        cwd=_ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^49 passed in", done.stdout, re.MULTILINE), done.stdout[-500:]


# On sm_80 float16 and bfloat16 are one instruction with another type; sm_90 is the device the tables are made for.
_TARGETS = [(90, torch.bfloat16), (90, torch.float16), (90, torch.float32), (80, torch.bfloat16), (80, torch.float32)]


@pytest.fixture(scope="module")
def report() -> dict[Job, Resources]:
    """Every configuration that may be chosen, with and without a residual, compiled once."""
    return resource_report([job for arch, dtype in _TARGETS for job in _jobs(arch, dtype)])


def _jobs(arch: int, dtype: torch.dtype) -> list[Job]:
    configs = all_configs(dtype)
    plain = [(config, dtype, arch, False) for config in configs if config.kind == "forward"]
    return [(config, dtype, arch, True) for config in configs] + plain


@pytest.mark.parametrize(("arch", "dtype"), _TARGETS, ids=str)
def test_every_configuration_compiles_to_good_machine_code(
    report: dict[Job, Resources], arch: int, dtype: torch.dtype
) -> None:
    found = {job: report[job] for job in _jobs(arch, dtype)}
    problems = {job: resources.problem(dtype) for job, resources in found.items()}
    assert {job: problem for job, problem in problems.items() if problem} == {}
    assert {resources.arch for resources in found.values()} == {arch}
    half = dtype != torch.float32
    assert all(resources.warpgroup_mma == (half and arch == 90) for resources in found.values())
    # Two programs of 8 warps fit a multiprocessor's registers: one's epilogue hides behind the other's loop.
    wide = [resources.registers for (c, *_), resources in found.items() if c.warps == 8 and c.bm == c.bn == 128]
    assert not half or arch == 80 or max(wide) <= 128


_PLAIN = """
import torch
from autoprune.kernels.triton import compile_only, copies, ell_backward
from autoprune.kernels.triton.configs import COMPILER
half, index, single = torch.bfloat16, torch.int32, torch.float32
for arch in (80, 90):
    with compile_only.fake_device(arch):
        made = [
            copies.pad_map.warmup(half, half, *[9] * 9, BP=32, BC=block, grid=(1,), **COMPILER)
            for block in (8, 16, 32, 64, 128)
        ]
        made += [copies.take.warmup(t, index, t, 9, 9, BLOCK=1024, grid=(1,), **COMPILER) for t in (half, single)]
        made += [ell_backward.ell_reduce.warmup(single, index, half, 9, 9, BN=64, BLOCK=1024, grid=(1,), **COMPILER)]
        for kernel in made:
            found = compile_only.resources(kernel, arch)
            print(found.arch, found.stack_bytes, found.spill_bytes, found.copies - found.wide_copies)
"""


def test_kernels_without_configurations_compile_too(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PLAIN],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == ["80 0 0 0"] * 8 + ["90 0 0 0"] * 8


def _found(**changes: int | bool) -> Resources:
    numbers = {"registers": 128, "stack_bytes": 0, "spill_bytes": 0, "shared_bytes": 98304, "copies": 24}
    return Resources(**{**numbers, "warpgroup_mma": True, "wide_copies": 24, "arch": 90, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"spill_bytes": 16}, "16 of spills"),
        ({"shared_bytes": SHARED_LIMIT[90] + 1}, "shared memory"),
        ({"arch": 80, "shared_bytes": SHARED_LIMIT[80] + 1}, "shared memory"),
        ({"wide_copies": 20}, "4 of 24 asynchronous copies are narrow"),
        ({"copies": 0, "wide_copies": 0}, "0 of 0"),
        ({"warpgroup_mma": False}, "no warp-group matrix"),
    ],
)
def test_bad_machine_code_is_named(changes: dict[str, int | bool], problem: str) -> None:
    assert problem in (_found(**changes).problem(torch.bfloat16) or "")
    assert _found().problem(torch.bfloat16) is None
    assert _found(warpgroup_mma=False).problem(torch.float32) is None


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(DeviceError, match="known are sm_80, sm_90"), fake_device(75):
        pass


def test_operators_and_module_need_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from autoprune.kernels.triton import compile_only, layers\n"
        "layers.ELLConv2d.from_conv(torch.nn.Conv2d(8, 8, 3))(torch.randn(1, 8, 4, 4)).sum()\n"
        "print([name for name in sys.modules if name.startswith('autoprune.kernels.triton.ell')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
