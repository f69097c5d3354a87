"""What building and calibrating a table promise: every row, resumable, and an honest error of the fitted line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from networks import resnet

from autoprune.core.choices import Block, Choice, Dense, Fine
from autoprune.core.errors import MeasurementError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.plan import Plan, build_plan
from autoprune.lut.build import build_table, images_at_once
from autoprune.lut.calibrate import calibrate, fit, random_policies
from autoprune.lut.deploy import deployer
from autoprune.lut.table import LatencyTable, Point, Row, current_context

CONV = LayerSpec("a", "conv", (32, 16, 3, 3), padding=(1, 1), input_hw=(12, 12), output_hw=(12, 12))
TWIN = LayerSpec("b", "conv", (32, 16, 3, 3), padding=(1, 1), input_hw=(12, 12), output_hw=(12, 12))
POINTWISE = LayerSpec("c", "conv", (16, 32, 1, 1), stride=(2, 2), input_hw=(12, 12), output_hw=(6, 6))
TOKENS = LayerSpec("d", "linear", (16, 16), input_hw=(9, 1), output_hw=(9, 1))
GROUPED = LayerSpec("e", "conv", (16, 1, 3, 3), padding=(1, 1), groups=16, input_hw=(6, 6), output_hw=(6, 6))
HALF, TENTH = Block(keep=0.5), Fine(keep=0.1)
WANTED: dict[LayerSpec, tuple[Choice, ...]] = {
    CONV: (Dense(), HALF, TENTH),
    TWIN: (Dense(), TENTH, Block(keep=0.25, filters=32)),
    POINTWISE: (HALF,),
    TOKENS: (Dense(), TENTH),
    GROUPED: (Dense(),),
}


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return build_table(WANTED, current_context())


def test_table_holds_every_wanted_row_and_dense_always(table: LatencyTable) -> None:
    table.require(WANTED)
    table.require({POINTWISE: (Dense(),)})
    assert len(table.rows) == 4 + 2 + 2 + 1
    for row in table.rows.values():
        assert 0.0 < row.p10 <= row.p50 <= row.p90
        assert row.weight_bytes > 0
    kernels = {choice: row.kernel for (signature, choice), row in table.rows.items() if signature == CONV.signature}
    assert kernels == {
        "dense": "dense",
        HALF.text: "block",
        TENTH.text: "csr",
        Block(keep=0.25, filters=32).text: "block",
    }
    assert table.row(GROUPED, Dense()).kernel == "dense"


def test_fewer_weights_take_less_memory_and_time(table: LatencyTable) -> None:
    dense, quarter = table.row(CONV, Dense()), table.row(CONV, Block(keep=0.25, filters=32))
    assert quarter.weight_bytes < 0.5 * dense.weight_bytes
    assert quarter.p50 < dense.p50


def test_tokens_are_timed_as_rows(table: LatencyTable) -> None:
    assert TOKENS.signature == "linear-o16-i16-n9"
    single = LayerSpec("one", "linear", (16, 16))
    one = build_table({single: (Dense(),)}, current_context()).row(single, Dense())
    assert table.row(TOKENS, Dense()).p50 > one.p50


def test_rows_are_per_call_of_the_whole_batch(table: LatencyTable) -> None:
    wide = LayerSpec("w", "conv", (64, 64, 3, 3), padding=(1, 1), input_hw=(32, 32), output_hw=(32, 32))
    assert images_at_once([wide], 8) == 1
    assert images_at_once([CONV], 4) == 4
    eight = build_table({CONV: (HALF,)}, current_context(batch=8)).row(CONV, HALF)
    assert 3.0 < eight.p50 / table.row(CONV, HALF).p50 < 24.0


def test_interrupted_build_resumes_where_it_stopped() -> None:
    class Stop(Exception):
        pass

    kept: list[LatencyTable] = []

    def checkpoint(part: LatencyTable) -> None:
        kept.append(part)
        if len(kept) == 2:
            raise Stop

    context = current_context()
    with pytest.raises(Stop):
        build_table(WANTED, context, checkpoint=checkpoint)
    assert len(kept[-1].rows) == 4 + 2
    seen: list[tuple[int, int]] = []
    whole = build_table(WANTED, context, rows=kept[-1].rows, progress=lambda done, total: seen.append((done, total)))
    whole.require(WANTED)
    assert all(whole.rows[key] == row for key, row in kept[-1].rows.items())
    assert seen == [(7, 9), (9, 9)]  # the grouped layer takes more of the time than the tokens


def test_complete_table_is_not_measured_again(table: LatencyTable) -> None:
    again = build_table(WANTED, table.context, rows=table.rows, checkpoint=lambda part: pytest.fail("measured again"))
    assert again == table


def test_layer_no_kernel_can_run_is_named() -> None:
    broken = LayerSpec("odd", "conv", (16, 16, 3, 3), padding=(1, 1), input_hw=(8, 8), output_hw=(5, 5))
    with pytest.raises(MeasurementError, match="layer 'odd'"):
        build_table({broken: (Dense(),)}, current_context())


# The calibration, on networks whose latency is made up.


def _rows(speedup: float = 4.0) -> LatencyTable:
    rows = {}
    for layer in (CONV, POINTWISE):
        for choice, us in ((Dense(), 100.0), (HALF, 60.0), (TENTH, 100.0 / speedup), (Fine(keep=0.9), 140.0)):
            rows[layer.signature, choice.text] = Row(p10=us, p50=us, p90=us, weight_bytes=1, kernel="x")
    return LatencyTable(current_context(), rows)


SPACE: dict[str, tuple[Choice, ...]] = {name: (Dense(), Fine(keep=0.9), HALF, TENTH) for name in ("a", "b", "c")}
LAYERS = (CONV, TWIN, POINTWISE)


def _points(slope: float, intercept: float, noise: float = 0.0) -> list[Point]:
    generator = np.random.default_rng(0)
    sums = np.linspace(50.0, 300.0, 12)
    factors = 1.0 + noise * generator.standard_normal(12)
    return [Point(rows_us=s, measured_us=(slope * s + intercept) * f) for s, f in zip(sums, factors, strict=True)]


def test_exact_line_is_found_without_error() -> None:
    found = fit(_points(1.2, 7.0))
    assert found.slope == pytest.approx(1.2)
    assert found.intercept_us == pytest.approx(7.0)
    assert found.mape == pytest.approx(0.0, abs=1e-9)
    assert found.kendall_tau == pytest.approx(1.0)
    assert len(found.points) == 12


def test_error_is_that_of_networks_left_out() -> None:
    points = _points(1.0, 0.0)
    outlier = points[5].model_copy(update={"measured_us": 2.0 * points[5].measured_us})
    points[5] = outlier
    found = fit(points)
    others = fit([point for point in points if point is not outlier])
    left_out = abs(others.slope * outlier.rows_us + others.intercept_us - outlier.measured_us) / outlier.measured_us
    assert left_out == pytest.approx(0.5)
    assert found.mape >= left_out / len(points)
    assert found.kendall_tau < 1.0


def test_noise_shows_in_the_error() -> None:
    assert 0.02 < fit(_points(1.0, 10.0, noise=0.05)).mape < 0.1


@pytest.mark.parametrize("points", [_points(1.0, 0.0)[:3], [Point(rows_us=5.0, measured_us=6.0)] * 9, []])
def test_fit_refuses_too_little_to_go_by(points: list[Point]) -> None:
    with pytest.raises(MeasurementError, match="give at least 4 that differ"):
        fit(points)


def test_random_policies_span_the_space_and_skip_what_is_slower_than_dense() -> None:
    table = _rows()
    policies = random_policies(table, LAYERS, SPACE, seed=3, count=20)
    sums = [table.rows_us(LAYERS, policy) for policy in policies]
    assert policies[0] == {}
    assert len(policies) == 20
    assert sums[0] == max(sums) == 300.0
    assert min(sums) <= 110.0
    assert len({round(value) for value in sums}) >= 8
    assert all(choice != Fine(keep=0.9) for policy in policies for choice in policy.values())
    assert policies == random_policies(table, LAYERS, SPACE, seed=3, count=20)
    assert policies != random_policies(table, LAYERS, SPACE, seed=4, count=20)


def test_calibration_measures_networks_and_predicts_them() -> None:
    table = _rows()

    def deploy(choices: Mapping[str, Choice]) -> Callable[[], object]:
        nanoseconds = 1e3 * (1.1 * table.rows_us(LAYERS, choices) + 40.0)

        def run() -> None:
            end = time.perf_counter_ns() + nanoseconds
            while time.perf_counter_ns() < end:
                pass

        return run

    fitted = calibrate(table, LAYERS, deploy, SPACE, seed=0, count=8, sample_seconds=0.05)
    assert fitted.calibration is not None
    assert fitted.rows == table.rows
    assert fitted.calibration.slope == pytest.approx(1.1, rel=0.1)
    assert fitted.calibration.intercept_us == pytest.approx(40.0, abs=20.0)
    assert fitted.calibration.mape < 0.05
    assert len(fitted.calibration.points) == 8
    assert fitted.network_us(LAYERS, {}) == pytest.approx(370.0, rel=0.1)


def test_calibration_needs_four_networks() -> None:
    with pytest.raises(MeasurementError, match="give at least 4"):
        calibrate(_rows(), LAYERS, lambda choices: lambda: None, SPACE, seed=0, count=3)


def test_real_network_is_built_measured_and_calibrated() -> None:
    model, x = resnet(), torch.randn(1, 1, 12, 12)
    plan = build_plan(model, x, {})
    assert isinstance(plan, Plan)
    layers = [op.layer for op in plan.convs]
    names = ("layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2")
    space: dict[str, tuple[Choice, ...]] = {name: (Dense(), Block(keep=0.5), Block(keep=0.2)) for name in names}
    options = {layer: space.get(layer.name, (Dense(),)) for layer in layers}
    table = build_table(options, current_context())
    fitted = calibrate(table, layers, deployer(model, x), space, seed=0, count=5, sample_seconds=0.05)
    assert fitted.calibration is not None
    assert len(fitted.calibration.points) == 5
    assert fitted.network_us(layers, {}) > 0.0
