"""What measuring promises: everything in turn, disturbed samples left out and counted, nothing left changed."""

from __future__ import annotations

import csv
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Concatenated, resnet, settled

from autoprune.core.choices import Block, Choice, Fine
from autoprune.core.errors import MeasurementError, PolicyError
from autoprune.lut import measure as measuring
from autoprune.lut.bench import COLUMNS, BenchResult, Labels, append_rows, bench, rows
from autoprune.lut.measure import (
    Effort,
    Spread,
    call_timer,
    interleaved_us,
    machine,
    measure,
    peak_gflops,
    sample_rounds,
)


def _spin(us: float) -> Callable[[], None]:
    def run() -> None:
        end = time.perf_counter_ns() + us * 1e3
        while time.perf_counter_ns() < end:
            pass

    return run


def _counted() -> Callable[[], float]:
    """Return a timer whose samples are 0, 1, 2 …"""
    numbers = iter(range(1000))
    return lambda: float(next(numbers))


def _probes(monkeypatch: pytest.MonkeyPatch, values: Iterator[int]) -> None:
    monkeypatch.setattr(measuring, "slowdown", lambda _: next(values) / 100)


def test_samples_beside_a_slow_probe_are_dropped_and_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A probe before each sample and one after: every second round is disturbed after its sample.
    _probes(monkeypatch, iter([100, 107, 100, 125] * 100))
    kept, dropped = sample_rounds({"a": _counted()}, Effort(rounds=10, threads=2))
    assert kept["a"].tolist() == [float(2 * index) for index in range(10)]
    assert dropped == 9


def test_a_sample_waits_for_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    _probes(monkeypatch, iter([130, 150, 120, 100, 101] * 100))
    kept, dropped = sample_rounds({"a": _counted()}, Effort(rounds=6, threads=2))
    assert (len(kept["a"]), dropped) == (6, 0)


def test_disturbance_concerns_the_samples_next_to_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _probes(monkeypatch, itertools.cycle([100, 100, 100, 150, 100, 100, 100, 100]))
    kept, dropped = sample_rounds({name: _counted() for name in "abcd"}, Effort(rounds=6, threads=2))
    assert [len(kept[name]) for name in "acd"] == [18, 18, 18]
    # Nothing of b is ever quiet: the least disturbed five stay, here all of them alike.
    assert (len(kept["b"]), dropped) == (18, 0)


def test_five_least_disturbed_samples_stay_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_PATIENCE_NS", -1)
    _probes(monkeypatch, iter([probe for level in range(200, 300) for probe in (level, level)]))
    kept, dropped = sample_rounds({"a": _counted()}, Effort(rounds=5, threads=2))
    assert kept["a"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert dropped == 10


def test_a_busy_machine_is_given_three_times_the_time_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "slowdown", lambda _: 1.0)
    monkeypatch.setattr(measuring, "_ALONE", 10.0)
    assert not measure({"a": _spin(50.0)}, 0.02).busy
    monkeypatch.setattr(measuring, "_PATIENCE_NS", -1)
    monkeypatch.setattr(measuring, "slowdown", lambda _: 1.5)
    start = time.perf_counter()
    found = measure({"a": _spin(50.0)}, 0.1)
    assert time.perf_counter() - start > 0.3
    assert found.busy
    assert len(found.samples["a"]) >= 5


def test_samples_during_which_the_thread_did_not_run_are_dropped() -> None:
    calls = iter(range(1000))

    def timer() -> float:
        if next(calls) % 2:
            time.sleep(0.004)
            return 4000.0
        _spin(300.0)()
        return 300.0

    kept, dropped = sample_rounds({"a": timer}, Effort(rounds=12))
    assert set(kept["a"].tolist()) == {300.0}
    assert dropped >= 6


def test_time_limit_ends_sampling_after_five_rounds() -> None:
    kept, dropped = sample_rounds({"a": _counted()}, Effort(seconds=0.0, threads=2))
    assert len(kept["a"]) + dropped == 5


def test_interleaved_times_tell_cases_apart() -> None:
    order: list[str] = []

    def case(name: str, us: float) -> Callable[[], None]:
        spin = _spin(us)

        def run() -> None:
            order.append(name)
            spin()

        return run

    result = measure({"fast": case("fast", 150.0), "slow": case("slow", 450.0)}, 0.1)
    fast, slow = (np.median(result.samples[name]) for name in ("fast", "slow"))
    assert fast >= 150.0
    assert slow >= 450.0
    assert 2.0 < slow / fast < 4.5
    assert result.taken == result.dropped + sum(len(column) for column in result.samples.values())
    assert result.spreads["fast"].p20 <= result.spreads["fast"].p50 <= result.spreads["fast"].p80
    switches = sum(first != second for first, second in itertools.pairwise(order))
    assert switches >= 9


def test_short_calls_are_timed_in_batches() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    samples = interleaved_us({"a": run}, 0.01)["a"]
    assert calls > 100 * len(samples)
    assert np.all(samples < 50.0)


def test_threads_and_garbage_collection_are_restored() -> None:
    seen: set[int] = set()
    before = torch.get_num_threads()
    interleaved_us({"a": lambda: seen.add(torch.get_num_threads())}, 0.01, before + 1)
    assert seen == {before + 1}
    assert torch.get_num_threads() == before
    assert gc.isenabled()


def test_case_that_fails_is_named() -> None:
    def fail() -> None:
        raise ValueError("no such luck")

    with pytest.raises(MeasurementError, match="'b' cannot be timed: ValueError: no such luck"):
        interleaved_us({"a": lambda: None, "b": fail}, 0.1)
    with pytest.raises(MeasurementError, match="nothing to measure"):
        interleaved_us({}, 0.1)
    with pytest.raises(MeasurementError, match="nothing to measure"):
        interleaved_us({"a": lambda: None}, 0.0)
    assert gc.isenabled()


def test_machine_is_described_by_what_latency_depends_on() -> None:
    facts = machine()
    assert {"cpu", "cores", "isa", "python", "torch", "numba", "onnxruntime"} == set(facts)
    assert facts["torch"] == torch.__version__.split("+")[0] or str(facts["torch"]) in torch.__version__
    assert isinstance(facts["cores"], int)
    assert facts["cores"] >= 1
    assert facts["isa"] in ("avx512", "avx2", "neon", "base")


def test_peak_is_above_what_a_real_multiplication_reaches() -> None:
    x = torch.randn(256, 256)
    samples = interleaved_us({"matmul": lambda: x @ x}, 0.2)["matmul"]
    reached = 2.0 * 256**3 / samples.min() / 1e3
    assert peak_gflops(1) > 0.9 * reached
    assert peak_gflops(1) == peak_gflops(1)


def test_spread_is_three_percentiles() -> None:
    assert Spread.of(np.arange(101.0)) == Spread(20.0, 50.0, 80.0)


@pytest.fixture(scope="module")
def result() -> BenchResult:
    choices: dict[str, Choice] = {"layer2.0.conv2": Block(keep=0.25), "layer3.0.conv2": Fine(keep=0.1)}
    return bench(resnet(), choices, torch.randn(2, 1, 12, 12), seconds=0.3, compile=False)


def test_bench_compares_with_the_fastest_dense_execution(result: BenchResult) -> None:
    assert {"plan", "onnxruntime", "torch-folded"} <= set(result.references)
    assert result.absent == {"torch-compile": "left out on request"}
    fastest = min(spread.p50 for spread in result.references.values())
    assert result.references[result.best].p50 == fastest
    assert result.ratio == result.deployed.p50 / fastest
    assert set(result.build_seconds) == set(result.references)
    assert (result.batch, result.threads) == (2, 1)
    assert 0 <= result.dropped < result.taken


def test_bench_rows_share_one_baseline_and_fill_every_column(result: BenchResult, tmp_path: Path) -> None:
    labels = Labels("resnet", "a policy, with a comma", 3.5, "2026-01-02", 'autoprune bench --case "x"')
    made = rows(result, labels)
    assert len(made) == 1 + len(result.references)
    assert {row.baseline_p50 for row in made} == {round(result.references[result.best].p50, 3)}
    assert min(row.ratio for row in made[1:]) == 1.0
    path = tmp_path / "new" / "bench.csv"
    append_rows(path, made)
    append_rows(path, made[:1])
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == COLUMNS
    assert ",".join(COLUMNS) == (
        "case,choice,compression,metric,unit,p20,p50,p80,baseline_p50,ratio,device,threads,batch,dtype,versions,date,"
        "command"
    )
    assert len(read) == len(made) + 1
    assert read[0]["choice"] == read[-1]["choice"] == labels.choice
    assert read[0]["command"] == labels.command
    assert float(read[0]["p50"]) == made[0].p50
    assert all(value for row in read for value in row.values())


def test_rows_are_not_appended_to_a_file_of_other_columns(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    labels = Labels("resnet", "x", 1.0, "2026-01-02", "c")
    with pytest.raises(MeasurementError, match="its columns are 'a,b'"):
        append_rows(path, rows(result, labels))
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(MeasurementError, match="cannot be written"):
        append_rows(tmp_path, rows(result, labels))


def test_bench_covers_networks_that_are_no_flat_plan() -> None:
    model, x = settled(Concatenated()), torch.randn(1, 3, 10, 10)
    found = bench(model, {"c": Block(keep=0.25)}, x, seconds=0.1, compile=False)
    assert "not one flat plan" in found.absent["plan"]
    assert found.deployed.p50 > 0.0
    with pytest.raises(PolicyError, match="no layer 'nosuch'"):
        bench(resnet(), {"nosuch": Fine(keep=0.5)}, torch.randn(1, 1, 12, 12), seconds=0.1, compile=False)


def test_with_several_threads_a_sample_begins_once_a_call_is_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns, calls = 0, 0
    times_ms = iter([1, 1, 1, 1, 3, 3, 3, 1, 1])

    def clock() -> int:
        nonlocal now_ns
        now_ns += 100  # reading it takes a moment
        return now_ns

    def call() -> None:
        nonlocal now_ns, calls
        calls += 1
        now_ns += next(times_ms) * 1_000_000

    monkeypatch.setattr(time, "perf_counter_ns", clock)
    sample = call_timer(call, threads=2)
    assert calls == 4  # three to know how long it takes, one to see whether its threads linger
    assert sample() == pytest.approx(1000.0, rel=0.01)
    assert calls == 9  # three of 3 ms and one of 1 ms, which are not timed, and one that is


def test_threads_that_spin_after_a_call_are_noticed_and_left_to_fall_asleep() -> None:
    work = torch.randn(512, 512)

    def multiply() -> None:
        threading.Thread(target=lambda: [work @ work for _ in range(12)]).start()

    sample = call_timer(multiply, threads=2)
    start = time.perf_counter()
    sample()
    assert time.perf_counter() - start > 0.01
