"""The latency table: measured rows for exactly one context, and their calibration to whole networks.

Stored as one JSON file. A table of another machine, version, batch size or thread count is refused, never adjusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from autoprune.core.choices import Choice, Dense, parse_choice
from autoprune.core.errors import AutopruneError, MissingLatency, TableMismatch
from autoprune.core.layers import LayerSpec
from autoprune.core.rundir import write_text
from autoprune.lut.context import Context, current_context
from autoprune.lut.row import AbsentEntry, Calibration, Entry, Point, Row, TableFile, Unmeasured, Whole

__all__ = ["Calibration", "Context", "LatencyTable", "Point", "Row", "Unmeasured", "Whole", "current_context"]

Key = tuple[str, str]
"""Layer signature and choice text."""


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Rows by (layer signature, choice text).

    Attributes:
        context: Where and how every row was measured.
        rows: Measured rows.
        calibration: Absent until whole networks were timed.
        unmeasured: What has no row on purpose, and why; a search does without it.
        whole: What is known of the network the table was built for.
    """

    context: Context
    rows: Mapping[Key, Row] = field(default_factory=dict)
    calibration: Calibration | None = None
    unmeasured: Mapping[Key, Unmeasured] = field(default_factory=dict)
    whole: Whole | None = None

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
        """Refuse a table that lacks any of the wanted rows; what was left unmeasured on purpose is not missed.

        Raises:
            MissingLatency: Saying how many are absent and naming the first.
        """
        pairs = [(layer, choice) for layer, choices in wanted.items() for choice in choices]
        absent = [
            (layer, choice)
            for layer, choice in pairs
            if (key := (layer.signature, choice.text)) not in self.rows
            and (key not in self.unmeasured or isinstance(choice, Dense))
        ]
        if absent:
            layer, choice = absent[0]
            raise MissingLatency(
                f"{len(absent)} of {len(pairs)} rows absent (first: {layer.name}, {choice.text}). "
                "Run: autoprune lut build --resume --out FILE"
            )

    def measured(self, layer: LayerSpec, choices: Iterable[Choice]) -> tuple[Choice, ...]:
        """Return the choices that have a row, in their order."""
        return tuple(choice for choice in choices if (layer.signature, choice.text) in self.rows)

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

    def with_rows(self, rows: Mapping[Key, Row]) -> LatencyTable:
        """Return the table with rows added or replaced; a calibration no longer holds and is dropped."""
        absent = {key: why for key, why in self.unmeasured.items() if key not in rows}
        return replace(self, rows={**self.rows, **rows}, calibration=None, unmeasured=absent)

    def without(self, unmeasured: Mapping[Key, Unmeasured]) -> LatencyTable:
        """Return the table with more pairs noted as left unmeasured; what has a row keeps it."""
        new = {key: why for key, why in unmeasured.items() if key not in self.rows}
        return replace(self, unmeasured={**self.unmeasured, **new})

    def only(self, layers: Iterable[LayerSpec]) -> LatencyTable:
        """Return what the table holds of some layers' shapes; nothing else of it changes."""
        wanted = {layer.signature for layer in layers}
        rows = {key: row for key, row in self.rows.items() if key[0] in wanted}
        return replace(self, rows=rows, unmeasured={k: why for k, why in self.unmeasured.items() if k[0] in wanted})

    @property
    def hash(self) -> str:
        """Hash of the whole content, 16 hexadecimal digits; the order of rows does not matter."""
        return hashlib.sha256(self._file().model_dump_json().encode()).hexdigest()[:16]

    def _file(self) -> TableFile:
        entries = [Entry(signature=key[0], choice=key[1], row=row) for key, row in sorted(self.rows.items())]
        absent = [
            AbsentEntry(signature=key[0], choice=key[1], why=why)
            for key, why in sorted(self.unmeasured.items(), key=lambda item: item[0])
        ]
        return TableFile(
            context=self.context, calibration=self.calibration, whole=self.whole, unmeasured=absent, rows=entries
        )

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
            file = TableFile.model_validate_json(Path(path).read_bytes())
            rows = {(entry.signature, parse_choice(entry.choice).text): entry.row for entry in file.rows}
            absent = {(entry.signature, parse_choice(entry.choice).text): entry.why for entry in file.unmeasured}
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
        table = LatencyTable(file.context, rows, file.calibration, absent, file.whole)
        if context is not None:
            table.check(context)
        return table
