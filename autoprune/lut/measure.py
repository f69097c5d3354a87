"""Timing that can be compared: everything interleaved in one process, disturbed samples left out.

A sample counts when a short run of FMAs right before and right after it reached 90 % of its best speed, and, on one
thread, no other process had the core meanwhile.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from autoprune.core.errors import MeasurementError
from autoprune.kernels.dense import torch_threads
from autoprune.lut.probe import peak_gflops, probe_ns

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

# Undisturbed: the probe at this fraction of its best speed; at most this wall time over own time.
_QUIET = 0.9
_ALONE = 1.02
_SAMPLE_US = 200.0
_REST_S = 0.002
_SETTLE_NS = 12_000_000
_MIN_SAMPLES = 5
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
    """

    samples: dict[str, np.ndarray]
    taken: int
    dropped: int

    @property
    def spreads(self) -> dict[str, Spread]:
        """Percentiles of each case."""
        return {name: Spread.of(samples) for name, samples in self.samples.items()}


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to sample: up to ``rounds`` undisturbed samples of every case, within ``seconds``.

    Attributes:
        rounds: Undisturbed samples that are enough; disturbed ones are repeated, up to three times as many in all.
        seconds: Stop earlier once they have passed and every case has five samples.
        threads: Threads that the cases use.
    """

    rounds: int = 100_000
    seconds: float = float("inf")
    threads: int = 1


def sample_rounds(
    timers: Mapping[K, Callable[[], float]], effort: Effort
) -> tuple[dict[K, np.ndarray], int]:
    """Take one sample of every timer, round after round, and drop the disturbed ones.

    Args:
        timers: Case → a call that returns one sample, in any unit.
        effort: When to stop.
    Returns:
        Case → kept samples in order; and how many were dropped. Where fewer than five were undisturbed, the least
        disturbed five are kept.
    """
    log = _Log(timers, single=effort.threads == 1)
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(3 * effort.rounds):
            if done >= _MIN_SAMPLES and time.perf_counter() - start > effort.seconds:
                break
            if done >= effort.rounds and log.fewest_quiet() >= effort.rounds:
                break
            log.round()
    finally:
        if collecting:
            gc.enable()
    return log.kept()


class _Log(Generic[K]):
    """Samples with how disturbed the machine was around each of them.

    Disturbance is the slower of the two FMA probes over the best one; on one thread also the wall time over the
    thread's own time, which shows that another process had the core meanwhile.
    """

    def __init__(self, timers: Mapping[K, Callable[[], float]], *, single: bool) -> None:
        self.timers, self.single = timers, single
        self.values: dict[K, list[float]] = {case: [] for case in timers}
        self.probes: dict[K, list[int]] = {case: [] for case in timers}
        self.waits: dict[K, list[float]] = {case: [] for case in timers}

    def round(self) -> None:
        before = probe_ns()
        for case, timer in self.timers.items():
            wall, own = time.perf_counter_ns(), time.thread_time_ns()
            self.values[case].append(timer())
            own, wall = time.thread_time_ns() - own, time.perf_counter_ns() - wall
            after = probe_ns()
            self.probes[case].append(max(before, after))
            self.waits[case].append(wall / max(own, 1) if self.single else 1.0)
            before = after

    def _disturbance(self, case: K) -> np.ndarray:
        """Return how disturbed each sample is; up to 1 it counts as undisturbed."""
        best = min(min(column) for column in self.probes.values())
        slow = np.array(self.probes[case]) / best * _QUIET
        return np.maximum(slow, np.array(self.waits[case]) / _ALONE)

    def fewest_quiet(self) -> int:
        return min(int((self._disturbance(case) <= 1.0).sum()) for case in self.timers)

    def kept(self) -> tuple[dict[K, np.ndarray], int]:
        kept, dropped = {}, 0
        for case, column in self.values.items():
            disturbance = self._disturbance(case)
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
        samples, dropped = sample_rounds(timers, Effort(seconds=seconds, threads=threads))
    return Measurement(samples, dropped + sum(len(column) for column in samples.values()), dropped)


def interleaved_us(
    cases: Mapping[str, Callable[[], object]], seconds: float, threads: int = 1
) -> dict[str, np.ndarray]:
    """Return the samples of ``measure``: case → microseconds a call, shape (kept,) float64."""
    return measure(cases, seconds, threads).samples


def call_timer(call: Callable[[], object], threads: int = 1) -> Callable[[], float]:
    """Return a call that takes one sample of ``call``: microseconds a call, over at least 200 µs.

    With more than one thread each sample begins with a rest, in which the thread pools of the case before (OpenMP's,
    our own) stop spinning for more work, and with calls that are not timed, in which the system spreads the threads
    that wake over the cores. Without either, a case is timed while it shares a core with another one's threads.
    """
    for _ in range(3):
        start = time.perf_counter_ns()
        call()
        once_us = (time.perf_counter_ns() - start) / 1e3
    calls = max(1, int(np.ceil(_SAMPLE_US / max(once_us, 0.1))))
    clock = time.perf_counter_ns

    def settle() -> None:
        if threads > 1:
            time.sleep(_REST_S)
            start = clock()
            while clock() - start < _SETTLE_NS:
                call()
        call()

    def sample() -> float:
        settle()
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / 1e3 / calls

    return sample


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
