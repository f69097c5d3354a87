"""What the GPU timer promises: graphs of many launches, both cache states, and a way out when nothing is captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from autoprune.core.errors import MeasurementError
from autoprune.lut import gpu_facts
from autoprune.lut.gpu_timer import LAUNCHES, REPLAYS, Call, Captureless, HostBackend, Subject, cold_sets, time_subject

MIB = 1 << 20


class Clock:
    """A made-up device: a launch takes 10 µs, 4 more when its set is not in the cache, 3 more from the host."""

    def __init__(self, cache_bytes: int, *, capturable: bool = True) -> None:
        self.cache_bytes = cache_bytes
        self.capturable = capturable
        self.flushes = self.replays = 0
        self.graphs: list[list[Call]] = []
        self.warmed: list[Call] = []
        self._cached: list[Call] = []

    def warm_up(self, calls: Sequence[Call]) -> None:
        self.warmed += calls
        for call in calls:
            call()

    def capture(self, calls: Sequence[Call]) -> Callable[[], float]:
        if not self.capturable:
            raise Captureless("synchronises")
        return self._replay(calls, 0.0)

    def launch(self, calls: Sequence[Call]) -> Callable[[], float]:
        return self._replay(calls, 3.0)

    def _replay(self, calls: Sequence[Call], extra_us: float) -> Callable[[], float]:
        self.graphs.append(list(calls))

        def replay() -> float:
            self.replays += 1
            total = 0.0
            for call in calls:
                total += 10.0 + extra_us + (0.0 if call in self._cached else 4.0)
                kept = self.cache_bytes // SET_BYTES
                self._cached = [*(c for c in self._cached if c is not call), call][-kept:] if kept else []
            return total

        return replay

    def flush(self) -> None:
        self.flushes += 1
        self._cached = []


SET_BYTES = 4 * MIB


def _subject(set_bytes: int = SET_BYTES) -> Subject:
    return Subject(lambda index: lambda: index, set_bytes)


def test_a_column_is_many_launches_in_one_graph_and_a_few_replays() -> None:
    clock = Clock(50 * MIB)
    timing = time_subject(_subject(), clock)
    assert [len(graph) for graph in clock.graphs] == [LAUNCHES, LAUNCHES]
    assert clock.replays == 2 * (REPLAYS + 1)
    assert timing.captured
    assert timing.warm.p10 <= timing.warm.p50 <= timing.warm.p90


@pytest.mark.parametrize(
    ("set_bytes", "cache", "sets"), [(100 * MIB, 50 * MIB, 3), (20 * MIB, 50 * MIB, 5), (1024, 50 * MIB, LAUNCHES)]
)
def test_cold_graphs_rotate_over_twice_the_cache(set_bytes: int, cache: int, sets: int) -> None:
    assert cold_sets(set_bytes, cache) == sets
    assert sets == LAUNCHES or sets * set_bytes >= 2 * cache


def test_warm_data_stay_and_cold_data_do_not() -> None:
    clock = Clock(SET_BYTES * 2)
    timing = time_subject(_subject(), clock)
    assert timing.warm.p50 == pytest.approx(10.0)
    assert timing.cold.p50 == pytest.approx(14.0)
    assert len(set(clock.graphs[0])) == 1
    assert len(set(clock.graphs[1])) == 4
    assert clock.flushes == REPLAYS + 1
    assert set(clock.graphs[1]) <= set(clock.warmed)  # nothing is compiled while the clock runs


def test_small_sets_are_cold_because_the_cache_is_flushed_before_every_replay() -> None:
    clock = Clock(1000 * MIB)
    assert time_subject(_subject(), clock).cold.p50 == pytest.approx(14.0)


def test_what_cannot_be_captured_is_launched_and_says_so() -> None:
    timing = time_subject(_subject(), Clock(50 * MIB, capturable=False))
    assert not timing.captured
    assert timing.warm.p50 == pytest.approx(13.0)


def test_ranking_configurations_needs_one_column() -> None:
    clock = Clock(50 * MIB)
    timing = time_subject(_subject(), clock, cold=False)
    assert timing.cold == timing.warm
    assert len(clock.graphs) == 1


def test_network_sees_the_column_of_its_maps() -> None:
    timing = time_subject(_subject(), Clock(SET_BYTES * 2))
    assert timing.in_network(MIB, 50 * MIB) == timing.warm
    assert timing.in_network(51 * MIB, 50 * MIB) == timing.cold


def test_failing_kernel_and_a_clock_that_stands_still_are_errors() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel image\nmore")

    with pytest.raises(MeasurementError, match=r"it does not run: RuntimeError: no kernel image$"):
        time_subject(Subject(lambda index: broken, 1), HostBackend(1 << 16))
    clock = Clock(MIB)
    clock.capture = lambda calls: lambda: 0.0  # type: ignore[method-assign]
    with pytest.raises(MeasurementError, match="a replay took"):
        time_subject(_subject(), clock)


def test_the_same_procedure_times_a_cpu() -> None:
    sizes = []

    def make(index: int) -> Call:
        x = torch.randn(64, 64)
        sizes.append(index)
        return lambda: x @ x

    timing = time_subject(Subject(make, 3 * 64 * 64 * 4), HostBackend(1 << 16), launches=5, replays=3)
    assert sizes == [0, 1, 2]
    assert 0.0 < timing.warm.p10 <= timing.warm.p90 < 1e6


def test_clock_and_driver_are_read_from_the_drivers_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "clock_rate", _no_library)
    monkeypatch.setattr(gpu_facts, "ask_driver", lambda field: {"clocks.sm": "1980"}.get(field))
    gpu_facts.driver_version.cache_clear()
    assert gpu_facts.sm_clock_mhz() == 1980.0
    assert gpu_facts.driver_version() == "unknown"
    monkeypatch.setattr(gpu_facts, "ask_driver", lambda field: "[N/A]")
    assert gpu_facts.sm_clock_mhz() is None
    gpu_facts.driver_version.cache_clear()


def _no_library() -> float:
    raise ModuleNotFoundError("pynvml")
