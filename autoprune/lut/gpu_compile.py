"""Compiles in worker processes, before anything is timed, exactly what rows and networks launch; keeps what each needs.

A worker runs the launches themselves on small tensors and stops after the code generator, so what it leaves in
Triton's cache on disk is what the timing process looks for there. What a configuration needs of a multiprocessor
decides how many of its programs run side by side, which the tile model asks for; it is kept beside the compiled
kernels, so that the next process starts no workers at all.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autoprune.core.errors import AutopruneError
from autoprune.core.rundir import write_text
from autoprune.kernels.triton.configs import Config
from autoprune.kernels.triton.units import Unit, units

# Of one multiprocessor, sm_80 and newer: registers, threads; shared memory as in compile-only checks.
_REGISTERS, _THREADS = 65536, 2048
_WARP = 32
_KNOWN_ARCHITECTURES = (80, 90)


@dataclass(frozen=True, slots=True)
class Needs:
    """What one program of a compiled configuration takes, and why it must not be offered (empty: it may)."""

    registers: int
    shared_bytes: int
    shared_limit: int
    problem: str = ""


_known: dict[tuple[str, str], Needs] = {}


def resident(config: Config, dtype: torch.dtype) -> int:
    """Return how many programs of a configuration one multiprocessor holds; by its tile where it was not compiled."""
    needs = _known.get((config.text, str(dtype)))
    if needs is None:
        return 1 if config.bm * config.bn >= 128 * 128 else 2
    by_registers = _REGISTERS // max(1, needs.registers * _WARP * config.warps)
    by_shared = needs.shared_limit // max(1, needs.shared_bytes)
    return max(1, min(by_registers, by_shared, _THREADS // (_WARP * config.warps)))


def usable(config: Config, dtype: torch.dtype) -> bool:
    """Return whether the resource report lets a configuration be offered; one that was not compiled may be."""
    needs = _known.get((config.text, str(dtype)))
    return needs is None or not needs.problem


def compile_one(unit: Unit, arch: int) -> Needs:
    """Compile a unit into Triton's cache and return what its kernel needs; runs in a worker, without a GPU."""
    from autoprune.kernels.triton.compile_only import SHARED_LIMIT, compile_unit

    limit = SHARED_LIMIT[arch]
    try:
        found, *_ = compile_unit(unit, arch)
    except AutopruneError as error:
        return Needs(0, 0, limit, str(error))
    dtype: torch.dtype = getattr(torch, unit.dtype)
    return Needs(found.registers, found.shared_bytes, limit, found.problem(dtype, tiled=unit.tiled) or "")


def compile_all(wanted: Sequence[Unit], arch: int, workers: int) -> Mapping[Unit, Needs]:
    """Return what each unit needs; compiled side by side, or read from an earlier call's report in Triton's cache.

    Args:
        wanted: To compile.
        arch: 80 or 90.
        workers: Processes.
    """
    report = _report_file(wanted, arch)
    found = _read(report, wanted)
    if found is None:
        # Forked processes would share a CUDA context that does not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=max(1, min(workers, len(wanted))), mp_context=context) as pool:
            jobs = {unit: pool.submit(compile_one, unit, arch) for unit in wanted}
            found = {unit: job.result() for unit, job in jobs.items()}
        write_text(report, json.dumps([asdict(needs) for needs in found.values()]))
    _known.update({(unit.config, f"torch.{unit.dtype}"): needs for unit, needs in found.items() if unit.tiled})
    return found


def _report_file(wanted: Sequence[Unit], arch: int) -> Path:
    """Return where a report is kept: beside the kernels that it is of, so that both are lost together."""
    import triton
    from triton import knobs

    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__} {arch} {wanted}".encode())
    import autoprune.kernels.triton as kernels

    for source in sorted(Path(kernels.__path__[0]).glob("*.py")):
        digest.update(source.read_bytes())
    return Path(knobs.cache.dir) / f"autoprune-{digest.hexdigest()[:16]}.json"


def _read(report: Path, wanted: Sequence[Unit]) -> dict[Unit, Needs] | None:
    if not report.exists():
        return None
    try:
        return {unit: Needs(**needs) for unit, needs in zip(wanted, json.loads(report.read_text()), strict=True)}
    except (ValueError, TypeError):  # damaged: compiled again
        return None


def precompile(dtype: torch.dtype = torch.bfloat16) -> None:
    """Compile everything that layers of a dtype launch on the present GPU, if its architecture is known."""
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    if arch in _KNOWN_ARCHITECTURES and not any(dtype_of == str(dtype) for _, dtype_of in _known):
        compile_all(units(dtype), arch, os.cpu_count() or 1)
