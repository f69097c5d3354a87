"""Why isn't it faster? Where the chosen policy's time goes, in sentences."""

from __future__ import annotations

from autoprune.core.result import LayerRow, Result
from autoprune.report.summary import percent, time_text

_SHOWN = 3
_DENSE_KERNELS = ("dense", "torch")


def explain(result: Result) -> list[str]:
    """Return sentences on where the deployed network's time goes; empty when no layer was measured."""
    timed = [(layer, layer.measured_us) for layer in result.layers if layer.measured_us is not None]
    total = sum(us for _, us in timed)
    if total <= 0.0:
        return []
    return [
        _slowest(timed, total),
        *_left_dense(timed, total),
        *_above_floor(timed, total),
        *_outside_layers(result, total),
    ]


def _slowest(timed: list[tuple[LayerRow, float]], total: float) -> str:
    slowest = sorted(timed, key=lambda item: -item[1])[:_SHOWN]
    names = ", ".join(f"{layer.name} ({time_text(us)})" for layer, us in slowest)
    share = sum(us for _, us in slowest) / total
    return f"The slowest {len(slowest)} of {len(timed)} layers take {percent(share, 0)} of the layers' time: {names}."


def _left_dense(timed: list[tuple[LayerRow, float]], total: float) -> list[str]:
    dense = [us for layer, us in timed if layer.kernel in _DENSE_KERNELS]
    if not dense:
        return []
    layers = "1 layer runs" if len(dense) == 1 else f"{len(dense)} layers run"
    return [
        f"{layers} on dense kernels, with {percent(sum(dense) / total, 0)} of that time; "
        "the table below says of each why it was left dense."
    ]


def _above_floor(timed: list[tuple[LayerRow, float]], total: float) -> list[str]:
    floor = sum(layer.floor_us for layer, _ in timed)
    if floor <= 0.0:
        return []
    return [
        f"At the machine's measured peak the remaining arithmetic would take {time_text(floor)}: "
        f"the layers run at {percent(floor / total, 0)} of that peak."
    ]


def _outside_layers(result: Result, total: float) -> list[str]:
    chosen = result.row("chosen")
    if chosen is None or chosen.measured is None or chosen.measured.latency_us is None:
        return []
    network = chosen.measured.latency_us
    rest = network - total
    if rest <= 0.0:
        return []
    return [
        f"{time_text(rest)} of the network's {time_text(network)} ({percent(rest / network, 0)}) pass outside these "
        "layers: additions, pooling, padding and reordering of feature maps, and the call itself."
    ]
