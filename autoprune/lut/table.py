"""The latency table: measured rows for exactly one context, and their calibration to whole networks.

Stored as one JSON file. A table of another machine, version, batch size or thread count is refused, never adjusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autoprune.core.choices import Choice, Dense, parse_choice
from autoprune.core.errors import AutopruneError, MissingLatency, TableMismatch
from autoprune.core.layers import LayerSpec
from autoprune.core.rundir import write_text
from autoprune.lut.measure import isa_level, machine

_VERSIONED = ("python", "torch", "numba")


class Context(BaseModel):
    """Everything a row's time depends on besides layer and choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    cpu: str
    isa: str
    threads: int
    batch: int
    dtype: str = "float32"
    layout: str = "channels_last"
    direction: str = "forward"
    cache: Literal["warm", "cold"] = "warm"
    versions: tuple[tuple[str, str], ...] = ()


def current_context(batch: int = 1, threads: int = 1) -> Context:
    """Return the context of measurements made here and now."""
    facts = machine()
    versions = tuple((name, str(facts[name])) for name in _VERSIONED)
    return Context(
        device="cpu", cpu=str(facts["cpu"]), isa=isa_level(), threads=threads, batch=batch, versions=versions
    )


class Row(BaseModel):
    """One measured (layer shape, choice): microseconds of a call, bytes of packed weights, and the kernel used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    p10: float
    p50: float
    p90: float
    weight_bytes: int
    kernel: str


class Point(BaseModel):
    """One whole network: sum of its rows, measured end to end, and its weight in the fit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows_us: float
    measured_us: float
    weight: float = 1.0


class Calibration(BaseModel):
    """End to end = ``slope`` · sum of rows + ``intercept_us``; errors are of left-out networks.

    Attributes:
        mape: Mean absolute relative error, leave one out, 0..1.
        kendall_tau: Rank correlation of left-out predictions with measurements.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slope: float
    intercept_us: float
    mape: float
    kendall_tau: float
    points: tuple[Point, ...]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    signature: str
    choice: str
    row: Row


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    context: Context
    calibration: Calibration | None = None
    rows: list[_Entry]


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Rows by (layer signature, choice text).

    Attributes:
        context: Where and how every row was measured.
        rows: Measured rows.
        calibration: Absent until whole networks were timed.
    """

    context: Context
    rows: Mapping[tuple[str, str], Row] = field(default_factory=dict)
    calibration: Calibration | None = None

    def row(self, layer: LayerSpec, choice: Choice) -> Row:
        """Return the row of a layer and choice.

        Raises:
            MissingLatency: It was not measured; nothing is guessed.
        """
        found = self.rows.get((layer.signature, choice.text))
        if found is None:
            raise MissingLatency(
                f"no latency of {choice.text} for layer '{layer.name}' ({layer.signature}). "
                "Run: autoprune lut build --resume --out FILE"
            )
        return found

    def layer_us(self, layer: LayerSpec, choice: Choice) -> float:
        """Return the median latency of one call of a layer, in microseconds.

        Args:
            layer: Shape key; batch size is part of the table's context.
            choice: One the table was measured with.
        Raises:
            MissingLatency: No row for this pair; nothing is guessed.
        """
        return self.row(layer, choice).p50

    def rows_us(self, layers: Iterable[LayerSpec], choices: Mapping[str, Choice]) -> float:
        """Return the sum of the rows of a network as ``convert`` deploys it, µs.

        Layers not named are dense, and so are those whose choice is slower than dense; repeated calls count each.
        """
        return sum(layer.calls * self._deployed_us(layer, choices.get(layer.name, Dense())) for layer in layers)

    def _deployed_us(self, layer: LayerSpec, choice: Choice) -> float:
        return min(self.layer_us(layer, choice), self.layer_us(layer, Dense()))

    def network_us(self, layers: Iterable[LayerSpec], choices: Mapping[str, Choice]) -> float:
        """Return the predicted end-to-end latency of a network, µs; the plain sum while there is no calibration.

        Raises:
            MissingLatency: A row is absent.
        """
        total = self.rows_us(layers, choices)
        return total if self.calibration is None else self.calibration.slope * total + self.calibration.intercept_us

    def require(self, wanted: Mapping[LayerSpec, Sequence[Choice]]) -> None:
        """Refuse a table that lacks any of the wanted rows.

        Raises:
            MissingLatency: Saying how many are absent and naming the first.
        """
        pairs = [(layer, choice) for layer, choices in wanted.items() for choice in choices]
        absent = [(layer, choice) for layer, choice in pairs if (layer.signature, choice.text) not in self.rows]
        if absent:
            layer, choice = absent[0]
            raise MissingLatency(
                f"{len(absent)} of {len(pairs)} rows absent (first: {layer.name}, {choice.text}). "
                "Run: autoprune lut build --resume --out FILE"
            )

    def check(self, context: Context) -> None:
        """Refuse a table that was measured in another context.

        Raises:
            TableMismatch: Naming the first field that differs.
        """
        for name in Context.model_fields:
            got, want = getattr(self.context, name), getattr(context, name)
            if got == want:
                continue
            if name == "versions":
                changed = sorted(set(got) ^ set(want))[0][0]
                name, got, want = changed, dict(got).get(changed, "none"), dict(want).get(changed, "none")
            raise TableMismatch(
                f"latency table was measured with {name} {got!r}, wanted {want!r}; nothing is converted. "
                "Run: autoprune lut build"
            )

    def with_calibration(self, calibration: Calibration | None) -> LatencyTable:
        """Return the same rows with another calibration."""
        return replace(self, calibration=calibration)

    def with_rows(self, rows: Mapping[tuple[str, str], Row]) -> LatencyTable:
        """Return the table with rows added or replaced; a calibration no longer holds and is dropped."""
        return LatencyTable(self.context, {**self.rows, **rows})

    @property
    def hash(self) -> str:
        """Hash of the whole content, 16 hexadecimal digits; the order of rows does not matter."""
        return hashlib.sha256(self._file().model_dump_json().encode()).hexdigest()[:16]

    def _file(self) -> _File:
        entries = [_Entry(signature=key[0], choice=key[1], row=row) for key, row in sorted(self.rows.items())]
        return _File(context=self.context, calibration=self.calibration, rows=entries)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, atomically."""
        write_text(Path(path), self._file().model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: str | Path, context: Context | None = None) -> LatencyTable:
        """Read a table.

        Args:
            path: Its JSON file.
            context: Refuse a table of another one.
        Raises:
            TableMismatch: Absent, damaged, or measured in another context.
        """
        try:
            file = _File.model_validate_json(Path(path).read_bytes())
            rows = {(entry.signature, parse_choice(entry.choice).text): entry.row for entry in file.rows}
        except OSError as error:
            raise TableMismatch(
                f"latency table {path}: cannot be read ({error.strerror}). Run: autoprune lut build"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise TableMismatch(
                f"latency table {path}: field '{where}': {first['msg']}. Run: autoprune lut build"
            ) from None
        except AutopruneError as error:
            raise TableMismatch(f"latency table {path}: {error} Run: autoprune lut build") from None
        table = LatencyTable(file.context, rows, file.calibration)
        if context is not None:
            table.check(context)
        return table
