"""What a latency table's file holds: rows, what was left unmeasured and why, and the calibration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from autoprune.lut.context import Context


class _Growing(BaseModel):
    """A record whose later fields are written only where they say something, so that older files keep their hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _plain(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        own = type(self).model_fields
        return {name: value for name, value in fields.items() if own[name].is_required() or value != own[name].default}


class Column(BaseModel):
    """Percentiles of one way to measure, µs a call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    p10: float
    p50: float
    p90: float


class Row(_Growing):
    """One measured (layer shape, choice).

    Attributes:
        p10, p50, p90: Microseconds of a call; of a GPU the column that a network sees (``Context.cache``).
        weight_bytes: Packed weights and their indices.
        kernel: Which one ran.
        config: Its configuration, the fastest of those tried; empty where a kernel has one only.
        workspace_bytes: Memory that the kernel needs while it runs, besides its maps and weights; None in older tables.
        warm, cold: Both columns of a GPU's row: maps in the second-level cache, or in memory.
        floor_us: Roofline floor, None where the device's peaks are not known.
        model_us: What the tile model predicted.
        captured: Whether it was replayed as a CUDA graph; False means launched from the host, with its gaps.
        clock_mhz: Of the multiprocessors meanwhile.
        ring_us: Of a dense row: its time by the kernel that can write a border for a sparse reader, in ``ring_config``.
        pad_us: Of such a row: what copying its output into a border is expected to take.
    """

    p10: float
    p50: float
    p90: float
    weight_bytes: int
    kernel: str
    config: str = ""
    workspace_bytes: int | None = None
    warm: Column | None = None
    cold: Column | None = None
    floor_us: float | None = None
    model_us: float | None = None
    captured: bool = True
    clock_mhz: float | None = None
    ring_us: float | None = None
    ring_config: str = ""
    pad_us: float | None = None


Reason = Literal["floor", "limit", "kernel"]


class Unmeasured(BaseModel):
    """A (layer shape, choice) that has no row on purpose.

    Attributes:
        reason: ``floor``: not even its floor beats the dense row; ``limit``: the time given did not suffice;
            ``kernel``: no kernel runs it on this device.
        bound_us: The floor, launch included, where that was the reason.
        note: More, in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: Reason
    bound_us: float | None = None
    note: str = ""


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
        points: The networks it was fitted on; the first one is dense.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slope: float
    intercept_us: float
    mape: float
    kendall_tau: float
    points: tuple[Point, ...]


class Whole(_Growing):
    """What a table knows of the one network that it was built for.

    Attributes:
        model: Its name.
        fingerprint: Of its layers' names and shapes (``core.policy.model_fingerprint``).
        dense_us: Name of each dense execution → its median end to end, µs.
        activation_bytes: Feature maps that the deployed network keeps at once, whatever its policy.
    """

    model: str
    fingerprint: str
    dense_us: dict[str, float] = Field(default_factory=dict)
    activation_bytes: int | None = None


class Entry(BaseModel):
    """A row with its key, as stored."""

    model_config = ConfigDict(extra="forbid")

    signature: str
    choice: str
    row: Row


class AbsentEntry(BaseModel):
    """What has no row, with its key, as stored."""

    model_config = ConfigDict(extra="forbid")

    signature: str
    choice: str
    why: Unmeasured


class TableFile(BaseModel):
    """The JSON form of a table. Version 2 added everything that a GPU's table needs; version 1 stays readable."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1, 2] = 2
    context: Context
    calibration: Calibration | None = None
    whole: Whole | None = None
    unmeasured: list[AbsentEntry] = Field(default_factory=list)
    rows: list[Entry]

    @model_serializer(mode="wrap")
    def _plain(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if fields["whole"] is None:
            del fields["whole"]
        if not fields["unmeasured"]:
            del fields["unmeasured"]
        if _is_first_version(fields):
            fields["schema_version"] = 1
        return fields


_FIRST = {
    "file": {"schema_version", "context", "calibration", "rows"},
    "context": {
        "device", "cpu", "isa", "threads", "batch", "dtype", "layout", "direction", "cache", "versions"
    },
    "row": {"p10", "p50", "p90", "weight_bytes", "kernel"},
}


def _is_first_version(fields: dict[str, Any]) -> bool:
    """Return whether a file says nothing that version 1 could not: it is then written as version 1, hash and all."""
    return (
        set(fields) <= _FIRST["file"]
        and set(fields["context"]) <= _FIRST["context"]
        and fields["context"]["cache"] != "network"
        and all(set(entry["row"]) <= _FIRST["row"] for entry in fields["rows"])
    )
