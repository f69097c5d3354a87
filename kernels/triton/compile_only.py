"""Compiles kernels for a GPU that is not there and reads what they need from what was compiled.

Run in a process without ``TRITON_INTERPRET``. A fake driver answers for the device, launches stop after the code
generator (``launching.compiling``); ``cuobjdump`` and ``nvdisasm`` come with Triton. Registers, stack and spills are
read from the machine code's header. Which instructions there are is read from the assembly before the last step, which
maps them one to one and is read in a tenth of a disassembly's time; ``disassembled`` reads the machine code itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from autoprune.core.errors import DeviceError
from autoprune.kernels.triton.launching import compiling
from autoprune.kernels.triton.units import Unit, run_unit

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
Job = tuple[Unit, int]
"""What is compiled, and for which architecture, 80 or 90."""

# Assembly: an asynchronous copy with its size in bytes. Machine code: the same with its size in bits.
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\s+\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)")
_WIDE_COPY = re.compile(r"LDGSTS\.\S*\b128\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: Per thread.
        stack_bytes: Per thread; also where spilled registers lie.
        spill_bytes: Per thread, of memory that is a thread's own.
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

    def problem(self, dtype: torch.dtype, *, tiled: bool = True) -> str | None:
        """Return why a kernel must not be offered, or None.

        Args:
            dtype: Of its inputs.
            tiled: Whether it multiplies tiles: it must feed its matrix instructions by wide asynchronous copies.
        """
        if self.stack_bytes or self.spill_bytes:
            return f"{self.stack_bytes} bytes of stack, {self.spill_bytes} of spills"
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            return f"{self.shared_bytes} bytes of shared memory"
        if self.copies != self.wide_copies or (tiled and self.copies == 0):
            return f"{self.copies - self.wide_copies} of {self.copies} asynchronous copies are narrow"
        if not tiled:
            return None
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


def resource_report(
    jobs: Sequence[Job], *, processes: int = 2, cache_dir: str | None = None
) -> dict[Job, tuple[Resources, ...]]:
    """Compile units in processes of their own and return what each one's kernels need, in the order given.

    Args:
        jobs: Arguments of ``compile_unit``.
        processes: Compilers at work at once.
        cache_dir: Triton's cache; one of its own, removed at the end, when None.
    """
    with (
        tempfile.TemporaryDirectory() as own,
        ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (cache_dir or own,)) as pool,
    ):
        return dict(zip(jobs, pool.map(compile_unit, *zip(*jobs, strict=True)), strict=True))


def _start_worker(cache_dir: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    os.environ.pop("TRITON_INTERPRET", None)


def compile_unit(unit: Unit, arch: int) -> tuple[Resources, ...]:
    """Compile what the launches of a unit need and return what each of its kernels needs, the unit's own first.

    Args:
        unit: One configuration of a kernel.
        arch: 80 or 90.
    """
    return tuple(resources(kernel, arch) for kernel in compiled_kernels(unit, arch))


def compiled_kernels(unit: Unit, arch: int) -> list[Any]:
    """Return the kernels that the launches of a unit need, compiled for an architecture into Triton's cache."""
    with fake_device(arch), compiling() as kernels:
        run_unit(unit)
    return kernels


def resources(compiled: Any, arch: int) -> Resources:
    """Return what a compiled kernel needs, its instructions read from the assembly."""
    copies = [int(size, 0) for size in _COPY.findall(compiled.asm["ptx"])]
    return _resources(compiled, arch, "wgmma.mma_async" in compiled.asm["ptx"], len(copies), copies.count(16))


def disassembled(compiled: Any, arch: int) -> Resources:
    """Return the same, its instructions and its spills read from the machine code."""
    with _cubin(compiled) as file:
        code = _tool("nvdisasm", "-c", file)
    copies = re.findall(r"LDGSTS\S*", code)
    wide = sum(_WIDE_COPY.match(copy) is not None for copy in copies)
    found = _resources(compiled, arch, "HGMMA" in code, len(copies), wide)
    spills = 4 * len(re.findall(r"\b(?:STL|LDL)\b", code))
    return replace(found, spill_bytes=max(spills, found.spill_bytes))


def _resources(compiled: Any, arch: int, warpgroup_mma: bool, copies: int, wide_copies: int) -> Resources:
    with _cubin(compiled) as file:
        usage = _USAGE.search(_tool("cuobjdump", "--dump-resource-usage", file))
    if usage is None:
        raise DeviceError("compile-only: cuobjdump printed no resource usage; its format has changed.")
    registers, stack, _, local = (int(number) for number in usage.groups())
    return Resources(
        registers=registers,
        stack_bytes=stack,
        spill_bytes=local,
        shared_bytes=int(compiled.metadata.shared),
        warpgroup_mma=warpgroup_mma,
        copies=copies,
        wide_copies=wide_copies,
        arch=arch,
    )


@contextmanager
def _cubin(compiled: Any) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        yield file


def _tool(name: str, *arguments: str | Path) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DeviceError(f"compile-only: {name} failed: {(done.stderr.splitlines() or ['no message'])[0]}")
    return done.stdout
