"""Compiles every kernel configuration in worker processes before anything is timed, and keeps what each one needs.

Triton keeps compiled kernels on disk, where the timing process finds them. What a configuration needs of a
multiprocessor decides how many of its programs run side by side, which the tile model asks for.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from autoprune.core.choices import Choice
from autoprune.core.errors import AutopruneError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.triton.configs import Config, all_configs

# Of one multiprocessor, sm_80 and newer: registers, threads; shared memory as in compile-only checks.
_REGISTERS, _THREADS = 65536, 2048
_WARP = 32


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


def compile_one(config: Config, dtype: torch.dtype, arch: int) -> Needs:
    """Compile a configuration into Triton's cache and return what it needs; runs in a worker, without a GPU."""
    from autoprune.kernels.triton.compile_only import SHARED_LIMIT, compile_config

    limit = SHARED_LIMIT[arch]
    try:
        found = compile_config(config, dtype, arch)
    except AutopruneError as error:
        return Needs(0, 0, limit, str(error))
    return Needs(found.registers, found.shared_bytes, limit, found.problem(dtype) or "")


def compile_all(configs: Iterable[Config], dtype: torch.dtype, arch: int, workers: int) -> Mapping[str, Needs]:
    """Return what each configuration needs, by its text; compiled side by side.

    Args:
        configs: To compile.
        dtype: Of maps and weights.
        arch: 80 or 90.
        workers: Processes.
    """
    wanted = list(configs)
    # Forked processes would share a CUDA context that does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=max(1, min(workers, len(wanted))), mp_context=context) as pool:
        jobs = {config.text: pool.submit(compile_one, config, dtype, arch) for config in wanted}
        found = {text: job.result() for text, job in jobs.items()}
    _known.update({(text, str(dtype)): needs for text, needs in found.items()})
    return found


def usable(config: Config, dtype: torch.dtype) -> bool:
    """Return whether the resource report lets a configuration be offered; one that was not compiled may be."""
    needs = _known.get((config.text, str(dtype)))
    return needs is None or not needs.problem


def precompile(wanted: Sequence[tuple[LayerSpec, Sequence[Choice]]]) -> None:
    """Compile all Block-ELL configurations of bfloat16 for the present GPU, if its architecture is known."""
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    dtype = torch.bfloat16
    absent = [config for config in all_configs(dtype) if (config.text, str(dtype)) not in _known]
    if absent and arch in (80, 90):
        compile_all(absent, dtype, arch, os.cpu_count() or 1)
