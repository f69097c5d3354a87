"""Rows of removed channels on a GPU: the same layer, dense, with fewer filters and input channels.

Widths are multiples of 32: vendors' kernels are staircases of such steps, and a width between two runs as slowly as
the upper one or more so. A network pads with zero channels up to a width that was measured, which is never worse than
the best of the wider rows: that is what ``narrowed_us`` returns. Which layers must keep the same channels is for the
search space to say; here every layer stands alone, with both of its widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autoprune.core.choices import Dense
from autoprune.core.errors import MissingLatency
from autoprune.core.layers import LayerSpec
from autoprune.lut.build import Bench, Pace
from autoprune.lut.row import Row
from autoprune.lut.table import LatencyTable

STEP = 32
KEPT = (0.75, 0.5, 0.25)


def widths(channels: int) -> tuple[int, ...]:
    """Return the widths that are measured of so many channels, the widest first; multiples of 32 and the whole."""
    narrower = {max(STEP, round(keep * channels / STEP) * STEP) for keep in KEPT}
    return (channels, *sorted((width for width in narrower if width < channels), reverse=True))


def narrowed(layer: LayerSpec, filters: int, channels: int) -> LayerSpec:
    """Return a layer with fewer filters and input channels, shape facts alone."""
    return replace(layer, weight_shape=(filters, channels, *layer.weight_shape[2:]))


def narrowed_layers(layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """Return every narrower form of a layer that is measured; none of a grouped one."""
    if layer.groups != 1:
        return ()
    found = [narrowed(layer, k, c) for k in widths(layer.filters) for c in widths(layer.channels)]
    return tuple(found[1:])


def with_narrowed(table: LatencyTable, layers: Iterable[LayerSpec], bench: Bench, pace: Pace) -> LatencyTable:
    """Return a table with the dense rows of every layer's narrower forms added, as far as the time goes.

    Args:
        table: Rows so far; those it has are not measured again.
        layers: Whole layers, those that matter most first.
        bench: Measures.
        pace: Whose limit ends it.
    """
    for form in dict.fromkeys(form for layer in layers for form in narrowed_layers(layer)):
        if pace.left_s <= 0.0:
            break
        if table.measured(form, [Dense()]):
            continue
        outcome = bench.measure(form, [Dense()], None)
        table = table.with_rows({key: row for key, row in outcome.items() if isinstance(row, Row)})
    return table


def narrowed_us(table: LatencyTable, layer: LayerSpec, filters: int, channels: int) -> float:
    """Return the latency of a layer that keeps some filters and input channels, µs: of the best row at least as wide.

    Args:
        table: Built with ``with_narrowed``.
        layer: The whole layer.
        filters, channels: What is kept of it.
    Raises:
        MissingLatency: Not even the whole layer was measured.
    """
    forms = (layer, *narrowed_layers(layer))
    wide = [form for form in forms if form.filters >= filters and form.channels >= channels]
    times = [table.layer_us(form, Dense()) for form in wide if table.measured(form, [Dense()])]
    if not times:
        raise MissingLatency(
            f"no latency of layer '{layer.name}' with {filters} filters of {channels} channels, nor of any wider form. "
            "Run: autoprune lut build --device cuda"
        )
    return min(times)
