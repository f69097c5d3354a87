"""Rows that the benchmark scripts share."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from autoprune.lut.bench import BenchRow
from autoprune.lut.context import Context
from autoprune.lut.measure import machine

RESULTS = Path(__file__).parent / "results"


def command() -> str:
    """Return the command that is running, as it is repeated: folders of this machine go, or keep their last name."""
    words = list(sys.argv[1:])
    for option in ("--runs-dir", "--results", "--data-dir"):
        if option in words:
            place = words.index(option)
            del words[place : place + 2]
    words = [re.sub(r"(?<![^:=])/[^\s#]*/", "", word) for word in words]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def today() -> str:
    """Return the date, UTC."""
    return datetime.now(UTC).date().isoformat()


def row(
    case: str, choice: str, metric: str, samples: list[float], *, baseline: float, compression: float = 1.0,
    unit: str = "fraction", batch: int = 1, threads: int = 1, context: Context | None = None,
) -> BenchRow:
    """Return a row of a figure; percentiles over ``samples`` (seeds, replays); baseline 0 means none.

    ``context`` is of a figure that was measured on another device than this processor.
    """
    facts = machine()
    versions = {name: str(facts[name]) for name in ("python", "torch", "numba", "onnxruntime")}
    if context is not None:
        versions = {"driver": context.driver, **dict(context.versions)}
    low, middle, high = (float(value) for value in np.percentile(samples, [20, 50, 80]))
    return BenchRow(
        case=case,
        choice=choice,
        compression=round(compression, 3),
        metric=metric,
        unit=unit,
        p20=round(low, 6),
        p50=round(middle, 6),
        p80=round(high, 6),
        baseline_p50=round(baseline, 6),
        ratio=round(middle / baseline, 4) if baseline else 0.0,
        device=f"{facts['cpu']} {facts['isa']}" if context is None else context.place,
        threads=threads,
        batch=batch,
        dtype="float32" if context is None else context.dtype,
        versions=" ".join(f"{name}={value}" for name, value in versions.items() if value),
        date=today(),
        command=command(),
    )
