"""Builds a latency table: every layer shape with every choice, the shapes that take most of the network's time first.

How one shape is measured is the device's own affair (``cpu_rows``, ``gpu_rows``); here are the order, the time limit,
and going on where an earlier build stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autoprune.core.choices import Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.lut.context import Context
from autoprune.lut.cpu_rows import Setting, images_at_once, measure_layer
from autoprune.lut.row import Row, Unmeasured
from autoprune.lut.table import Key, LatencyTable

__all__ = ["Bench", "Pace", "build_table", "images_at_once"]

Progress = Callable[[int, int], None]
Checkpoint = Callable[[LatencyTable], None]
Outcome = Mapping[Key, Row | Unmeasured]


class Bench(Protocol):
    """How a device measures the choices of one layer shape."""

    def estimate_us(self, layer: LayerSpec) -> float:
        """Return about what a call of the dense layer takes; only ratios count."""
        ...

    def prepare(self, wanted: Sequence[tuple[LayerSpec, Sequence[Choice]]]) -> None:
        """Do what is better done for all shapes together, such as compiling."""
        ...

    def measure(self, layer: LayerSpec, choices: Sequence[Choice], dense: Row | None) -> Outcome:
        """Return a row for each choice, or why it has none.

        Args:
            layer: The shape.
            choices: To measure.
            dense: The layer's dense row, if it is known and not among ``choices``.
        """
        ...


@dataclass(frozen=True, slots=True)
class CpuBench:
    """Interleaved measurements on this machine's processor."""

    setting: Setting

    def estimate_us(self, layer: LayerSpec) -> float:
        return float(layer.macs / layer.calls)

    def prepare(self, wanted: Sequence[tuple[LayerSpec, Sequence[Choice]]]) -> None:
        pass

    def measure(self, layer: LayerSpec, choices: Sequence[Choice], dense: Row | None) -> Outcome:
        return measure_layer(layer, choices, self.setting)


@dataclass(slots=True)
class Pace:
    """How fast rows come, and what that means for those still to come.

    Attributes:
        limit_s: Seconds for everything; None for as long as it takes.
        clock: Seconds that pass.
    """

    limit_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)
    _spent: float = field(init=False, default=0.0)
    _rows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._start = self.clock()

    def count(self, rows: int, seconds: float) -> None:
        """Note that so many rows took so long."""
        self._rows += rows
        self._spent += seconds

    @property
    def row_s(self) -> float:
        """Seconds a row has taken so far, on average; 0 before the first."""
        return self._spent / self._rows if self._rows else 0.0

    @property
    def left_s(self) -> float:
        """Seconds left of the limit."""
        return float("inf") if self.limit_s is None else self.limit_s - (self.clock() - self._start)

    def fitting(self, rows: int) -> int:
        """Return how many of so many rows are expected to fit into the time left."""
        if self.left_s <= 0.0:
            return 0
        return rows if self.row_s <= 0.0 else min(rows, int(min(self.left_s / self.row_s, 1e9)))


def build_table(
    space_layers: Mapping[LayerSpec, Sequence[Choice]],
    context: Context,
    *,
    rows: Mapping[Key, Row] | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    pace: Pace | None = None,
    bench: Bench | None = None,
) -> LatencyTable:
    """Measure what is absent of a table.

    Args:
        space_layers: Layer → choices it may take; layers of one signature share their rows. The dense row is measured
            for every layer, asked for or not.
        context: From ``current_context``; fixes batch size and threads.
        rows: Rows measured before in this context; not measured again.
        progress: Called with (rows done, rows in all).
        checkpoint: Called with the table so far whenever a shape is complete.
        pace: With a limit, all dense rows are measured first, then the shapes by their share of the network's time,
            each in an order in which any part spans its choices; what does not fit is noted as unmeasured.
        bench: Measures; by default the processor.
    Raises:
        MeasurementError: A layer cannot be run on this machine.
    """
    bench = bench or CpuBench(Setting(context, images_at_once(space_layers, context.batch, context.threads)))
    work = _Work(by_share(space_layers, bench), LatencyTable(context, dict(rows or {})), bench, pace or Pace())
    work.progress, work.checkpoint = progress, checkpoint
    bench.prepare([(layer, choices) for layer, choices in work.absent() if choices])
    if work.pace.limit_s is not None:
        for layer, choices in work.absent():
            if Dense() in choices:
                work.measure(layer, [Dense()])
    for layer, choices in work.absent():
        if choices:
            work.measure(layer, choices if work.pace.limit_s is None else spread(choices))
    work.give_up()
    return work.table


def by_share(
    space_layers: Mapping[LayerSpec, Sequence[Choice]], bench: Bench
) -> list[tuple[LayerSpec, list[Choice]]]:
    """Return each shape once, with all choices of its layers, by falling share of the network's dense time."""
    by_signature: dict[str, tuple[LayerSpec, dict[str, Choice]]] = {}
    share: dict[str, float] = {}
    for layer, choices in space_layers.items():
        known = by_signature.setdefault(layer.signature, (layer, {}))[1]
        for choice in (Dense(), *choices):
            known.setdefault(choice.text, choice)
        share[layer.signature] = share.get(layer.signature, 0.0) + layer.calls * bench.estimate_us(layer)
    ranked = sorted(by_signature.items(), key=lambda item: -share[item[0]])
    return [(layer, list(choices.values())) for _, (layer, choices) in ranked]


def spread(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices in an order whose every beginning spans them: the ends, the middle, the quarters …"""
    count = len(choices)
    order = dict.fromkeys([0, count - 1] if count > 1 else range(count))
    step = 1.0
    while len(order) < count:
        step /= 2.0
        places = [round(step * odd * (count - 1)) for odd in range(1, round(1.0 / step), 2)]
        order.update(dict.fromkeys(places))
    return [choices[index] for index in order]


class _Work:
    """A build under way."""

    def __init__(
        self, wanted: list[tuple[LayerSpec, list[Choice]]], table: LatencyTable, bench: Bench, pace: Pace
    ) -> None:
        self.wanted, self.table, self.bench, self.pace = wanted, table, bench, pace
        self.progress: Progress | None = None
        self.checkpoint: Checkpoint | None = None
        self.total = sum(len(choices) for _, choices in wanted)

    def absent(self) -> list[tuple[LayerSpec, list[Choice]]]:
        """Return the choices of each shape that are neither measured nor ruled out."""
        return [
            (layer, [choice for choice in choices if not self._settled((layer.signature, choice.text))])
            for layer, choices in self.wanted
        ]

    def _settled(self, key: Key) -> bool:
        return key in self.table.rows or key in self.table.unmeasured

    def measure(self, layer: LayerSpec, choices: Sequence[Choice]) -> None:
        """Measure what fits into the time left; the dense row always."""
        dense = self.table.rows.get((layer.signature, Dense().text))
        if Dense() not in choices:
            choices = choices[: self.pace.fitting(len(choices))]
        if not choices:
            return
        start = self.pace.clock()
        outcome = self.bench.measure(layer, choices, dense)
        self.pace.count(len(choices), self.pace.clock() - start)
        self.table = self.table.with_rows({key: row for key, row in outcome.items() if isinstance(row, Row)})
        self.table = self.table.without({key: why for key, why in outcome.items() if isinstance(why, Unmeasured)})
        if self.checkpoint is not None:
            self.checkpoint(self.table)
        if self.progress is not None:
            self.progress(self.total - sum(len(rest) for _, rest in self.absent()), self.total)

    def give_up(self) -> None:
        """Note what the time did not suffice for."""
        late = {(layer.signature, choice.text): Unmeasured(reason="limit") for layer, rest in self.absent()
                for choice in rest}
        if late:
            self.table = self.table.without(late)
            if self.checkpoint is not None:
                self.checkpoint(self.table)
