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
from autoprune.kernels.triton.units import units

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
    assert re.search(r"^51 passed in", done.stdout, re.MULTILINE), done.stdout[-500:]


# On sm_80 float16 and bfloat16 are one instruction with another type; sm_90 is the device the tables are made for.
_TARGETS = [(90, torch.bfloat16), (90, torch.float16), (90, torch.float32), (80, torch.bfloat16), (80, torch.float32)]
_SMALL_SHARED = 48 << 10


@pytest.fixture(scope="module")
def report() -> dict[Job, tuple[Resources, ...]]:
    """Everything that may be launched, forward and backward, compiled once."""
    jobs = [(unit, arch) for arch, dtype in _TARGETS for unit in units(dtype)]
    return resource_report(jobs, processes=os.cpu_count() or 1)


@pytest.mark.parametrize(("arch", "dtype"), _TARGETS, ids=str)
def test_every_configuration_compiles_to_good_machine_code(
    report: dict[Job, tuple[Resources, ...]], arch: int, dtype: torch.dtype
) -> None:
    own = {unit: report[unit, arch][0] for unit in units(dtype) if unit.tiled}
    assert {unit.config for unit in own} == {config.text for config in all_configs(dtype)}
    problems = {unit: found.problem(dtype) for unit, found in own.items()}
    assert {unit: problem for unit, problem in problems.items() if problem} == {}
    assert {found.arch for found in own.values()} == {arch}
    half = dtype != torch.float32
    assert all(found.warpgroup_mma == (half and arch == 90) for found in own.values())
    # Two programs of 8 warps fit a multiprocessor's registers: one's epilogue hides behind the other's loop.
    wide = [found.registers for unit, found in own.items() if "128x128" in unit.config and "-w8-" in unit.config]
    assert not half or arch == 80 or max(wide) <= 128


@pytest.mark.parametrize(("arch", "dtype"), _TARGETS, ids=str)
def test_kernels_without_matrix_instructions_neither_spill_nor_exceed_the_device(
    report: dict[Job, tuple[Resources, ...]], arch: int, dtype: torch.dtype
) -> None:
    # The second kernel of a weight gradient adds up its parts.
    found = [
        resources
        for unit in units(dtype)
        for number, resources in enumerate(report[unit, arch])
        if number > 0 or not unit.tiled
    ]
    assert len(found) == len(units(dtype)) - sum(unit.kind == "forward" for unit in units(dtype))
    assert [resources.problem(dtype, tiled=False) for resources in found] == [None] * len(found)
    assert all(resources.shared_bytes <= _SMALL_SHARED for resources in found)


_DISASSEMBLED = """
from dataclasses import asdict, replace
import torch
from autoprune.kernels.triton import compile_only as co
from autoprune.kernels.triton.configs import Config
from autoprune.kernels.triton.launching import compiling
from autoprune.kernels.triton.units import Unit, _run_ell
for arch in (80, 90):
    for unit in (Unit("forward", "forward-128x64x64-w8-s4", "bfloat16"), Unit("spmm-forward", "64x16-w2", "bfloat16")):
        (kernel,) = co.compiled_kernels(unit, arch)
        assert co.resources(kernel, arch) == co.disassembled(kernel, arch), unit
        assert co.resources(kernel, arch).warpgroup_mma == (arch == 90 and unit.tiled)
with co.fake_device(80), compiling() as kernels:
    _run_ell(Config("dweight", 128, 128, 64, 4, 3), torch.bfloat16)
quick, slow = (read(kernels[0], 80) for read in (co.resources, co.disassembled))
assert slow.spill_bytes > 0 and quick.problem(torch.bfloat16) is not None, (quick, slow)
"""


def test_what_is_read_from_assembly_is_what_the_machine_code_holds(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _DISASSEMBLED],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
