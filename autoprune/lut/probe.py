"""A known amount of arithmetic: how fast this machine is right now, and how fast it can be at all."""

from __future__ import annotations

import threading
import time
from functools import cache

import numba
from llvmlite import binding, ir
from numba.core import types

from autoprune.kernels.cpu.emit import I32, fma, i64, kernel, loop, splat
from autoprune.kernels.cpu.shapes import LANES

# Independent sums hide the latency of an FMA; more than the registers hold would spill.
_SUMS = 12 if binding.get_host_cpu_features().get("avx512f") else 6
_PROBE_ROUNDS = 5_000
_PEAK_ROUNDS = 400_000


@kernel(1, types.int64)
def _fma_rounds(b: ir.IRBuilder, rounds: ir.Value) -> ir.Value:
    """Run ``rounds`` times one FMA on each sum and return bits of the total, so that nothing is left out."""
    factor, term = (splat(b, ir.Constant(ir.FloatType(), value)) for value in (0.5, 1.0))
    # Different starts keep the compiler from seeing that one sum would do.
    starts = [splat(b, ir.Constant(ir.FloatType(), float(index))) for index in range(_SUMS)]
    sums = loop(b, rounds, starts, lambda _, now: [fma(b, value, factor, term) for value in now])
    total = sums[0]
    for value in sums[1:]:
        total = b.fadd(total, value)
    return b.zext(b.extract_element(b.bitcast(total, ir.VectorType(I32, LANES)), ir.Constant(I32, 0)), i64(0).type)


@numba.njit(nogil=True)
def _run(rounds: int) -> int:
    return _fma_rounds(rounds)  # type: ignore[no-any-return]


def probe_ns() -> int:
    """Return the nanoseconds that a fixed short run of FMAs takes now; its best is the undisturbed machine."""
    start = time.perf_counter_ns()
    _run(_PROBE_ROUNDS)
    return time.perf_counter_ns() - start


@cache
def peak_gflops(threads: int = 1) -> float:
    """Return the measured peak of float32 arithmetic in GFLOP/s: the best of many short runs on ``threads`` threads.

    A multiply-accumulate counts as two. Nothing in memory is touched, so no layer can run faster than this.
    """
    best = float("inf")
    for _ in range(8):
        workers = [threading.Thread(target=_run, args=(_PEAK_ROUNDS,)) for _ in range(threads - 1)]
        start = time.perf_counter_ns()
        for worker in workers:
            worker.start()
        _run(_PEAK_ROUNDS)
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter_ns() - start)
    return 2.0 * LANES * _SUMS * _PEAK_ROUNDS * threads / best


