"""From the sum of a network's rows to its latency end to end: a fitted line, with its error on networks left out.

T = slope · Σ rows + intercept. The slope takes up what layers gain or lose beside each other, the intercept what no row
holds: pooling, copying the input, the call itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.coupling import Coupling
from autoprune.core.errors import MeasurementError
from autoprune.core.layers import LayerSpec
from autoprune.lut.deploy import Deploy
from autoprune.lut.measure import interleaved_us
from autoprune.lut.table import Calibration, LatencyTable, Point


@dataclass(frozen=True, slots=True)
class Coupled:
    """A network whose channels are searched: all its layers, and how they are coupled."""

    layers: Sequence[LayerSpec]
    coupling: Coupling


Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]

# Bytes of packed weights held at once: networks of one group are timed in turn, so that drift hits all alike.
_GROUP_BYTES = 1 << 30


def calibrate(
    table: LatencyTable,
    layers: Sequence[LayerSpec] | Coupled,
    deploy: Deploy,
    space: Mapping[str, Sequence[Choice]],
    seed: int,
    count: int = 30,
    *,
    sample_seconds: float = 0.15,
    timer: Timer | None = None,
) -> LatencyTable:
    """Time random policies end to end and return the table with its calibration.

    Args:
        table: Covers every layer and choice of the space.
        layers: All layers of the network, with their coupling where channels are among the choices.
        deploy: From choices to a call that runs that network once (``lut.deploy.deployer``).
        space: Layer → choices; layers not named stay dense.
        seed: Of the policies drawn.
        count: Networks to time, the dense one among them; at least 4.
        sample_seconds: Time spent on each network.
        timer: From calls by name to their median µs; by default interleaved on the host for ``sample_seconds`` each.
    Raises:
        MeasurementError: Fewer than 4 networks, or no spread in what they take.
    """
    if count < 4:
        raise MeasurementError(f"calibration on {count} networks: give at least 4.")
    network = layers if isinstance(layers, Coupled) else Coupled(layers, Coupling())
    policies = [
        network.coupling.expanded(policy) for policy in random_policies(table, network.layers, space, seed, count)
    ]
    points: list[Point] = []
    size = max(4, _GROUP_BYTES // (8 * sum(layer.weights for layer in network.layers)))
    for start in range(0, len(policies), size):
        group = policies[start : start + size]
        runs = {str(index): deploy(choices) for index, choices in enumerate(group)}
        medians = timer(runs) if timer else _host_us(runs, sample_seconds, table.context.threads)
        for index, choices in enumerate(group):
            own = {name: choice for name, choice in choices.items() if not isinstance(choice, Channels)}
            rows_us = table.rows_us(network.coupling.resized(network.layers, choices), own)
            points.append(Point(rows_us=rows_us, measured_us=medians[str(index)]))
    return table.with_calibration(fit(points))


def _host_us(runs: Mapping[str, Callable[[], object]], sample_seconds: float, threads: int) -> dict[str, float]:
    samples = interleaved_us(runs, sample_seconds * len(runs), threads)
    return {name: float(np.median(values)) for name, values in samples.items()}


def random_policies(
    table: LatencyTable, layers: Sequence[LayerSpec], space: Mapping[str, Sequence[Choice]], seed: int, count: int
) -> list[dict[str, Choice]]:
    """Return the dense policy and ``count - 1`` random ones, spread evenly from nearly dense to the fastest.

    Each layer draws among the choices that are faster than its dense row, ranked by time, around the policy's own rank;
    policies that mix the ranks freely would all take about the same time.
    """
    generator = np.random.default_rng(seed)
    by_name = {layer.name: layer for layer in layers}
    ranked: dict[str, list[Choice]] = {}
    for name, choices in space.items():
        layer = by_name[name]
        dense_us = table.layer_us(layer, Dense())
        faster = [choice for choice in table.measured(layer, choices) if table.layer_us(layer, choice) < dense_us]
        # Widths: the narrower the faster. What a group takes depends on its neighbours.
        widths = sorted((c for c in choices if isinstance(c, Channels)), key=lambda c: -c.keep)
        ranked[name] = [Dense(), *widths, *sorted(faster, key=lambda c: -table.layer_us(layer, c))]
    policies: list[dict[str, Choice]] = [{}]
    for index in range(1, count):
        centre = index / (count - 1)
        policy: dict[str, Choice] = {}
        for name, choices in ranked.items():
            rank = np.clip(generator.normal(centre, 0.25), 0.0, 1.0)
            policy[name] = choices[round(float(rank) * (len(choices) - 1))]
        policies.append(policy)
    return policies


def fit(points: Sequence[Point]) -> Calibration:
    """Return the line with the least weighted relative error, and its error on points left out.

    Raises:
        MeasurementError: Fewer than 4 points, or they hardly differ.
    """
    rows = np.array([point.rows_us for point in points])
    measured = np.array([point.measured_us for point in points])
    weights = np.array([point.weight for point in points])
    if len(points) < 4 or np.ptp(rows) < 0.01 * rows.max():
        raise MeasurementError(
            f"calibration: {len(points)} networks between {rows.min(initial=0):.1f} and {rows.max(initial=0):.1f} us; "
            "give at least 4 that differ by more than 1 %."
        )
    slope, intercept = _line(rows, measured, weights)
    left_out = np.empty(len(points))
    for index in range(len(points)):
        others = np.arange(len(points)) != index
        a, b = _line(rows[others], measured[others], weights[others])
        left_out[index] = a * rows[index] + b
    errors = np.abs(left_out - measured) / measured
    tau = float(kendalltau(left_out, measured).statistic)
    if not np.isfinite(tau):
        raise MeasurementError("calibration: every network took the same time; measure again on a quiet machine.")
    return Calibration(
        slope=slope,
        intercept_us=intercept,
        mape=float(np.average(errors, weights=weights)),
        kendall_tau=tau,
        points=tuple(points),
    )


def _line(rows: np.ndarray, measured: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    scale = np.sqrt(weights) / measured
    matrix = np.stack([rows * scale, scale], axis=1)
    (slope, intercept), *_ = np.linalg.lstsq(matrix, np.sqrt(weights), rcond=None)
    return float(slope), float(intercept)
