"""A known amount of work: how fast this machine is right now, and how fast its arithmetic can be at all."""

from __future__ import annotations

import threading
import time
from functools import cache

import numba
import torch
from llvmlite import binding, ir
from numba.core import types

from autoprune.core.choices import Fine
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.emit import I32, fma, i64, kernel, loop, splat
from autoprune.kernels.cpu.program import Program
from autoprune.kernels.cpu.shapes import LANES
from autoprune.sparsity.masks import make_mask

# Independent sums hide the latency of an FMA; more than the registers hold would spill.
_SUMS = 12 if binding.get_host_cpu_features().get("avx512f") else 6
_PEAK_ROUNDS = 400_000
_PROBED = LayerSpec("probe", "conv", (64, 64, 3, 3), padding=(1, 1), input_hw=(7, 7), output_hw=(7, 7))
_FIRST_RUNS = 2_000


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


def slowdown(threads: int = 1) -> float:
    """Return how many times longer a fixed short run takes now than at its best since this process began.

    The run is three layers of single weights, 40 µs on one core. What another machine's thread on the same core
    takes away shows there first: such a layer is a long stretch of code that runs once (measured: + 20 to 25 %, while
    a loop of FMAs loses 3 %). On several threads it also shows when two of them share a core, or one has to wait.
    """
    probe = _probe(threads)
    took_us = float(probe.program.time_us(2).min())  # the first brings the code back into cache
    probe.best_us = min(probe.best_us, took_us)
    return took_us / probe.best_us


class _Probe:
    """The program that is timed, and its best time so far."""

    def __init__(self, threads: int) -> None:
        weight = torch.randn(_PROBED.weight_shape, generator=torch.Generator().manual_seed(0))
        weight *= make_mask(weight, Fine(keep=0.25))
        self.program = Program(1, threads)
        ring = [self.program.buffer(_PROBED.channels, *_PROBED.input_hw, halo=1) for _ in range(3)]
        for source, target in ((0, 1), (1, 2), (2, 0)):
            self.program.conv(ring[source], ring[target], _PROBED, weight, None, "csr")
        self.program.finish()
        self.best_us = float(self.program.time_us(_FIRST_RUNS).min())


@cache
def _probe(threads: int) -> _Probe:
    return _Probe(threads)


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
