"""Times short GPU kernels: CUDA graphs of many launches, replayed a few times.

A graph holds about 20 launches, so that the host's own time does not count. *Warm*: all launches read one input set,
which then lies in the second-level cache. *Cold*: launches rotate over at least three sets that together hold twice
that cache, or each launch has a set of its own, and the cache is flushed before every replay. A call that cannot be
captured is launched from the host instead, and the result says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from autoprune.core.errors import MeasurementError
from autoprune.lut.gpu_facts import l2_bytes
from autoprune.lut.row import Column

LAUNCHES = 20
REPLAYS = 5
MIN_SETS = 3
_WARM_UP_CALLS = 3
# Cycles that the GPU idles before a replay, so that the host has queued all of it by then.
_HEAD_START_CYCLES = 200_000

Call = Callable[[], object]
Replay = Callable[[], float]


class Captureless(Exception):
    """A call cannot be part of a CUDA graph."""


class Backend(Protocol):
    """How launches are run and timed; the graphs of a GPU, or another clock."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the last cache that a kernel's maps can stay in."""
        ...

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Run calls untimed: compilation and a library's own choice of algorithm happen here."""
        ...

    def capture(self, calls: Sequence[Call]) -> Replay:
        """Return a function that runs all calls once, back to back, and returns the microseconds of all together.

        Raises:
            Captureless: They cannot be captured.
        """
        ...

    def launch(self, calls: Sequence[Call]) -> Replay:
        """Return the same, launched one by one from the host."""
        ...

    def flush(self) -> None:
        """Empty the cache of anything a call may read."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """What is timed.

    Attributes:
        make: Returns the call on the i-th input set; sets have inputs (and weights) of their own.
        set_bytes: What a call reads and writes in its set.
    """

    make: Callable[[int], Call]
    set_bytes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Both columns of a call, µs each, and whether it was replayed as a graph."""

    warm: Column
    cold: Column
    captured: bool

    def in_network(self, map_bytes: int, cache_bytes: int) -> Column:
        """Return the column that a layer sees in a network: maps that fit the cache arrive in it."""
        return self.warm if map_bytes <= cache_bytes else self.cold


def cold_sets(set_bytes: int, cache_bytes: int, launches: int = LAUNCHES) -> int:
    """Return how many input sets a cold graph rotates: three or more, over twice the cache, at most one a launch."""
    wanted = math.ceil(2.0 * cache_bytes / max(set_bytes, 1))
    return min(launches, max(MIN_SETS, wanted))


def time_subject(
    subject: Subject, backend: Backend, *, launches: int = LAUNCHES, replays: int = REPLAYS, cold: bool = True
) -> Timing:
    """Return the warm and the cold time of one call.

    Args:
        subject: Makes the calls.
        backend: Runs them.
        launches, replays: Of each column.
        cold: False copies the warm column: for ranking configurations, which need no second one.
    Raises:
        MeasurementError: A call fails, or its time is not a positive number.
    """
    first = subject.make(0)
    warm, captured = _column([first] * launches, backend, replays, flush=False)
    if not cold:
        return Timing(warm, warm, captured)
    count = cold_sets(subject.set_bytes, backend.cache_bytes, launches)
    calls = [first, *(subject.make(index) for index in range(1, count))]
    rotated = [calls[index % count] for index in range(launches)]
    column, both = _column(rotated, backend, replays, flush=True)
    return Timing(warm, column, captured and both)


def samples_us(call: Call, backend: Backend, launches: int, replays: int) -> np.ndarray:
    """Return what one call took in each of ``replays`` graphs of ``launches`` calls, warm, µs; float64.

    Raises:
        MeasurementError: The call fails, or its time is not a positive number.
    """
    return _samples([call] * launches, backend, replays, flush=False)[0]


def _column(calls: list[Call], backend: Backend, replays: int, *, flush: bool) -> tuple[Column, bool]:
    samples, captured = _samples(calls, backend, replays, flush=flush)
    p10, p50, p90 = (float(value) for value in np.percentile(samples, [10, 50, 90]))
    return Column(p10=p10, p50=p50, p90=p90), captured


def _samples(calls: list[Call], backend: Backend, replays: int, *, flush: bool) -> tuple[np.ndarray, bool]:
    try:
        backend.warm_up(list(dict.fromkeys(calls)))
    except Exception as error:  # a kernel's own failure: compilation, memory, an unsupported shape
        raise MeasurementError(f"it does not run: {type(error).__name__}: {_first_line(error)}") from error
    captured = True
    try:
        replay = backend.capture(calls)
    except Captureless:
        replay, captured = backend.launch(calls), False
    samples = np.empty(replays)
    for index in range(-1, replays):  # the first one is not counted: it brings the data where it belongs
        if flush:
            backend.flush()
        elapsed = replay() / len(calls)
        if index >= 0:
            samples[index] = elapsed
    if not (np.isfinite(samples).all() and samples.min() > 0.0):
        raise MeasurementError(f"a replay took {samples.tolist()} us; measure again on a GPU that nobody else uses.")
    return samples, captured


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:160]


class CudaBackend:
    """Graphs of the present CUDA device, timed by events on the device."""

    def __init__(self) -> None:
        self._cache_bytes = l2_bytes()
        self._scratch = torch.empty(2 * self._cache_bytes, dtype=torch.uint8, device="cuda")

    @property
    def cache_bytes(self) -> int:
        return self._cache_bytes

    def warm_up(self, calls: Sequence[Call]) -> None:
        # On a stream of their own, as capture demands of what a library allocates lazily.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                for _ in range(_WARM_UP_CALLS):
                    call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Call]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except Exception as error:  # whatever a call did that a graph cannot hold: synchronise, copy to the host …
            torch.cuda.synchronize()
            raise Captureless(_first_line(error)) from error
        return lambda: self._timed(graph.replay)

    def launch(self, calls: Sequence[Call]) -> Replay:
        def run() -> None:
            for call in calls:
                call()

        return lambda: self._timed(run)

    def flush(self) -> None:
        self._scratch.zero_()

    def _timed(self, run: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        _idle(_HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3


def _idle(cycles: int) -> None:
    """Keep the GPU busy with nothing; without that, the host's launch would be inside the timed span."""
    sleep: Callable[[int], None] | None = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(cycles)


class HostBackend:
    """The same procedure on a CPU: every call runs at once, and the host's clock times them.

    Args:
        cache_bytes: Of the last-level cache.
    """

    def __init__(self, cache_bytes: int = 8 << 20) -> None:
        self._cache_bytes = cache_bytes
        self._scratch = torch.empty(2 * cache_bytes, dtype=torch.uint8)

    @property
    def cache_bytes(self) -> int:
        return self._cache_bytes

    def warm_up(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call()

    def capture(self, calls: Sequence[Call]) -> Replay:
        return self.launch(calls)

    def launch(self, calls: Sequence[Call]) -> Replay:
        def replay() -> float:
            start = time.perf_counter_ns()
            for call in calls:
                call()
            return (time.perf_counter_ns() - start) / 1e3

        return replay

    def flush(self) -> None:
        self._scratch.zero_()
