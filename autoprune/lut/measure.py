"""Timing that can be compared: everything interleaved in one process, disturbed samples left out.

A sample counts when a short run of known work on as many threads, right before and right after it, took at most 8 %
longer than its best, and, on one thread, no other process had the core meanwhile. On a virtual machine whose cores are
shared a quarter of the samples and more are disturbed, for 2 to 50 ms at a time.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from autoprune.core.errors import MeasurementError
from autoprune.kernels.dense import torch_threads
from autoprune.lut.probe import peak_gflops, slowdown

__all__ = [
    "Effort",
    "Measurement",
    "Spread",
    "interleaved_us",
    "isa_level",
    "machine",
    "measure",
    "peak_gflops",
    "sample_rounds",
]

# Undisturbed: at most this time of the probe over its best, and at most this wall time over own time.
_QUIET = 1.08
_ALONE = 1.02
_SAMPLE_US = 200.0
_PATIENCE_NS = 12_000_000  # how long to wait for a quiet machine before a sample
# GNU's OpenMP spins for 8 ms; the system counts another thread's time every 4 ms only.
_REST_S = 0.010
_SETTLE_NS = _LINGER_NS = 12_000_000
_SETTLED = 1.1
_MIN_SAMPLES = 5
_ENOUGH = 10
_LONGEST = 3  # times as long as asked, on a machine that is disturbed
_PACKAGES = ("torch", "numba", "onnxruntime")

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of samples, in their unit."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(samples: np.ndarray) -> Spread:
        """Return the percentiles of ``samples``, shape (n,)."""
        low, middle, high = np.percentile(samples, [20, 50, 80])
        return Spread(float(low), float(middle), float(high))


@dataclass(frozen=True, slots=True)
class Measurement:
    """Samples of each case and how many were left out.

    Attributes:
        samples: Case → microseconds a call, shape (kept,) float64.
        taken: Samples taken over all cases.
        dropped: Of these, the ones left out because the machine was disturbed.
        busy: Whether a case found no ten undisturbed moments in three times the time asked for: its times may be off.
    """

    samples: dict[str, np.ndarray]
    taken: int
    dropped: int
    busy: bool = False

    @property
    def spreads(self) -> dict[str, Spread]:
        """Percentiles of each case."""
        return {name: Spread.of(samples) for name, samples in self.samples.items()}


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to sample: up to ``rounds`` undisturbed samples of every case, within ``seconds``.

    Attributes:
        rounds: Undisturbed samples that are enough; disturbed ones are repeated, up to three times as many in all.
        seconds: Stop earlier once they have passed and every case has ten undisturbed samples, or once they have
            passed three times and every case has five samples.
        threads: Threads that the cases use.
    """

    rounds: int = 100_000
    seconds: float = float("inf")
    threads: int = 1


def sample_rounds(timers: Mapping[K, Callable[[], float]], effort: Effort) -> tuple[dict[K, np.ndarray], int]:
    """Take one sample of every timer, round after round, and drop the disturbed ones.

    Args:
        timers: Case → a call that returns one sample, in any unit.
        effort: When to stop.
    Returns:
        Case → kept samples in order; and how many were dropped. Where fewer than five were undisturbed, the least
        disturbed five are kept.
    """
    return _sampled(timers, effort).kept()


def _sampled(timers: Mapping[K, Callable[[], float]], effort: Effort) -> _Log[K]:
    log = _Log(timers, effort.threads)
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(_LONGEST * effort.rounds):
            spent = time.perf_counter() - start
            enough = log.fewest_quiet() >= _ENOUGH or spent > _LONGEST * effort.seconds
            if done >= _MIN_SAMPLES and spent > effort.seconds and enough:
                break
            if done >= effort.rounds and log.fewest_quiet() >= effort.rounds:
                break
            log.round()
    finally:
        if collecting:
            gc.enable()
    return log


class _Log(Generic[K]):
    """Samples with how disturbed the machine was around each of them.

    Disturbance is the slower of the two probes; on one thread also the wall time over the thread's own time, which
    shows that another process had the core meanwhile.
    """

    def __init__(self, timers: Mapping[K, Callable[[], float]], threads: int) -> None:
        self.timers, self.threads = timers, threads
        self.values: dict[K, list[float]] = {case: [] for case in timers}
        self.disturbance: dict[K, list[float]] = {case: [] for case in timers}
        self._quiet = dict.fromkeys(timers, 0)

    def round(self) -> None:
        for case, timer in self.timers.items():
            before = self._await_quiet()
            wall, own = time.perf_counter_ns(), time.thread_time_ns()
            self.values[case].append(timer())
            own, wall = time.thread_time_ns() - own, time.perf_counter_ns() - wall
            after = slowdown(self.threads)
            waited = wall / max(own, 1) if self.threads == 1 else 1.0
            disturbance = max(before / _QUIET, after / _QUIET, waited / _ALONE)
            self.disturbance[case].append(disturbance)
            self._quiet[case] += disturbance <= 1.0

    def _await_quiet(self) -> float:
        start = time.perf_counter_ns()
        while (slow := slowdown(self.threads)) > _QUIET and time.perf_counter_ns() - start < _PATIENCE_NS:
            pass
        return slow

    def fewest_quiet(self) -> int:
        return min(self._quiet.values())

    def kept(self) -> tuple[dict[K, np.ndarray], int]:
        kept, dropped = {}, 0
        for case, column in self.values.items():
            disturbance = np.array(self.disturbance[case])
            limit = max(1.0, float(np.sort(disturbance)[min(_MIN_SAMPLES, len(column)) - 1]))
            quiet = disturbance <= limit
            kept[case] = np.array(column)[quiet]
            dropped += int((~quiet).sum())
        return kept, dropped


def measure(cases: Mapping[str, Callable[[], object]], seconds: float, threads: int = 1) -> Measurement:
    """Time calls the way a user makes them, interleaved.

    Each sample is one untimed call, to bring the case's own data back into cache, and then as many calls as take
    200 µs. The first calls of all cases are not timed.

    Args:
        cases: Name → a call without arguments.
        seconds: How long to measure, all cases together; at least five rounds are taken.
        threads: Threads of PyTorch's own kernels meanwhile.
    Raises:
        MeasurementError: There is nothing to measure, or a case fails; names the case.
    """
    if not cases or seconds <= 0:
        raise MeasurementError(
            f"nothing to measure: {len(cases)} cases in {seconds:g} s; give at least one case and a time above 0."
        )
    with torch_threads(threads):
        timers: dict[str, Callable[[], float]] = {}
        for name, call in cases.items():
            try:
                timers[name] = call_timer(call, threads)
            except Exception as error:
                raise MeasurementError(f"'{name}' cannot be timed: {type(error).__name__}: {error}") from error
        log = _sampled(timers, Effort(seconds=seconds, threads=threads))
    samples, dropped = log.kept()
    taken = dropped + sum(len(column) for column in samples.values())
    return Measurement(samples, taken, dropped, busy=log.fewest_quiet() < _ENOUGH)


def interleaved_us(
    cases: Mapping[str, Callable[[], object]], seconds: float, threads: int = 1
) -> dict[str, np.ndarray]:
    """Return the samples of ``measure``: case → microseconds a call, shape (kept,) float64."""
    return measure(cases, seconds, threads).samples


def call_timer(call: Callable[[], object], threads: int = 1) -> Callable[[], float]:
    """Return a call that takes one sample of ``call``: microseconds a call, over at least 200 µs.

    With more than one thread a sample begins with calls that are not timed, until one is near the best so far: the
    system needs a while to spread threads that wake over the cores. It ends with a rest where a pool (OpenMP's) spins
    for more work after a call. Without either, a case is timed while it shares a core with another one's threads.
    """
    clock = time.perf_counter_ns
    best_ns = once_ns = sys.maxsize
    for _ in range(3):
        start = clock()
        call()
        once_ns = max(clock() - start, 1)
        best_ns = min(best_ns, once_ns)
    calls = math.ceil(_SAMPLE_US * 1e3 / once_ns)
    lingers = threads > 1 and _lingers(call)

    def settle() -> None:
        nonlocal best_ns
        begin = clock()
        while True:
            start = clock()
            call()
            end = clock()
            best_ns = min(best_ns, end - start)
            if threads == 1 or end - start <= _SETTLED * best_ns or end - begin > _SETTLE_NS:
                break

    def sample() -> float:
        settle()
        start = clock()
        for _ in range(calls):
            call()
        took_us = (clock() - start) / 1e3 / calls
        if lingers:
            time.sleep(_REST_S)
        return took_us

    return sample


def _lingers(call: Callable[[], object]) -> bool:
    """Whether threads of this process stay busy for milliseconds after ``call`` is done; our own sleep after 0.2 ms."""
    call()
    others = time.process_time_ns() - time.thread_time_ns()
    end = time.perf_counter_ns() + _LINGER_NS
    while time.perf_counter_ns() < end:
        pass
    return time.process_time_ns() - time.thread_time_ns() - others > _LINGER_NS // 4


def machine() -> dict[str, str | int]:
    """Return what a latency depends on: processor, cores, vector instructions and versions."""
    facts: dict[str, str | int] = {"cpu": _cpu_name(), "cores": _usable_cores(), "isa": isa_level()}
    facts["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    return facts


def isa_level() -> str:
    """Return the widest vector instructions numba compiles for: ``avx512``, ``avx2``, ``neon`` or ``base``."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    for name, flag in (("avx512", "avx512f"), ("avx2", "avx2"), ("neon", "neon")):
        if features.get(flag):
            return name
    return "base"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    """Return the model name, with family and model number where the name alone is generic (virtual machines)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = {
        key: match.group(1).strip()
        for key in ("model name", "cpu family", "model")
        if (match := re.search(rf"^{key}\s*:(.*)$", text, re.MULTILINE))
    }
    name = found.get("model name", platform.machine())
    return f"{name} (family {found['cpu family']} model {found['model']})" if "cpu family" in found else name
