"""Compiles kernels for a GPU that is not there and reads what they need from the machine code.

Run in a process without ``TRITON_INTERPRET``. A fake driver answers for the device; ``warmup`` stops after the code
generator; ``cuobjdump`` and ``nvdisasm`` come with Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from autoprune.core.errors import DeviceError
from autoprune.kernels.triton.configs import Config

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
_WIDE_COPY = re.compile(r"LDGSTS\.\S*\b128\b")
Job = tuple[Config, torch.dtype, int, bool]
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: Per thread.
        stack_bytes, spill_bytes: Per thread; spilled registers are read and written there.
        shared_bytes: Per program, dynamic part included.
        warpgroup_mma: Whether it uses Hopper's asynchronous matrix instruction (HGMMA).
        copies, wide_copies: Asynchronous copies (LDGSTS) in the code, and those of 128 bits.
        arch: 80 or 90.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    warpgroup_mma: bool
    copies: int
    wide_copies: int
    arch: int

    def problem(self, dtype: torch.dtype) -> str | None:
        """Return why a kernel must not be offered, or None."""
        if self.stack_bytes or self.spill_bytes:
            return f"{self.stack_bytes} bytes of stack, {self.spill_bytes} of spills"
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            return f"{self.shared_bytes} bytes of shared memory"
        if self.copies == 0 or self.copies != self.wide_copies:
            return f"{self.copies - self.wide_copies} of {self.copies} asynchronous copies are narrow"
        if self.arch >= 90 and dtype != torch.float32 and not self.warpgroup_mma:
            return "no warp-group matrix instruction"
        return None


class _Driver:
    """Answers what the compiler asks of a device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)
        self._index = arch  # kernels are cached by device: each architecture is one of its own

    def get_current_target(self) -> object:
        return self._target

    def get_current_device(self) -> int:
        return self._index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self._index)


@contextmanager
def fake_device(arch: int) -> Iterator[None]:
    """Make Triton compile for an architecture; the driver used before comes back at the end.

    Raises:
        DeviceError: The interpreter is active in this process, or the architecture has no limits here.
    """
    from triton import knobs
    from triton.runtime import driver as runtime

    if knobs.runtime.interpret:
        raise DeviceError("compile-only: got TRITON_INTERPRET in this process; unset it and start a new one.")
    if arch not in SHARED_LIMIT:
        raise DeviceError(f"compile-only: got sm_{arch}; known are {', '.join(f'sm_{a}' for a in SHARED_LIMIT)}.")
    config: Any = getattr(runtime, "driver", runtime)
    before = config._active
    config.set_active(_Driver(arch))
    try:
        yield
    finally:
        config._active = before


def resource_report(jobs: Sequence[Job], *, processes: int = 2, cache_dir: str | None = None) -> dict[Job, Resources]:
    """Compile configurations in processes of their own and return what each needs, in the order given.

    Args:
        jobs: Arguments of ``compile_config``.
        processes: Compilers at work at once.
        cache_dir: Triton's cache; one of its own, removed at the end, when None.
    """
    with (
        tempfile.TemporaryDirectory() as own,
        ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (cache_dir or own,)) as pool,
    ):
        return dict(zip(jobs, pool.map(compile_config, *zip(*jobs, strict=True)), strict=True))


def _start_worker(cache_dir: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    os.environ.pop("TRITON_INTERPRET", None)


def compile_config(config: Config, dtype: torch.dtype, arch: int, residual: bool = True) -> Resources:
    """Compile one configuration and return what it needs.

    Args:
        config: Of either kernel.
        dtype: Of inputs and weights.
        arch: 80 or 90.
        residual: Forward: whether it adds a residual; the only part of the epilogue that is compiled in or left out.
    """
    with fake_device(arch):
        return resources(_warm(config, dtype, residual), arch)


def _warm(config: Config, dtype: torch.dtype, residual: bool) -> Any:
    size = 1 << 10  # sizes are not specialised on
    tile = {"BM": config.bm, "BN": config.bn, "BK": config.bk}
    meta = {**tile, **config.options, "grid": (1,)}
    if config.kind == "forward":
        from autoprune.kernels.triton.ell import ell_forward

        tensors = (dtype, dtype, torch.int32, torch.float32, dtype if residual else None, dtype)
        return ell_forward.warmup(*tensors, *[size] * 21, 0.0, **meta)
    from autoprune.kernels.triton.ell_backward import ell_dweight

    return ell_dweight.warmup(dtype, dtype, torch.int32, torch.float32, *[size] * 16, **meta)


def resources(compiled: Any, arch: int) -> Resources:
    """Return what a kernel needs that ``warmup`` compiled for an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _USAGE.search(_tool("cuobjdump", "--dump-resource-usage", cubin))
        code = _tool("nvdisasm", "-c", cubin)
    if usage is None:
        raise DeviceError("compile-only: cuobjdump printed no resource usage; its format has changed.")
    registers, stack, _, local = (int(number) for number in usage.groups())
    spills = 4 * len(re.findall(r"\b(?:STL|LDL)\b", code))
    copies = re.findall(r"LDGSTS\S*", code)
    return Resources(
        registers=registers,
        stack_bytes=stack,
        spill_bytes=max(spills, local),
        shared_bytes=int(compiled.metadata.shared),
        warpgroup_mma="HGMMA" in code,
        copies=len(copies),
        wide_copies=sum(_WIDE_COPY.match(copy) is not None for copy in copies),
        arch=arch,
    )


def _tool(name: str, *arguments: str | Path) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DeviceError(f"compile-only: {name} failed: {(done.stderr.splitlines() or ['no message'])[0]}")
    return done.stdout
