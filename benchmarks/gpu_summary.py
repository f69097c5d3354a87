"""The bars that a GPU must reach beside what ``gpu.py`` measured, written as ``gpu-summary.md``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Speed-up over the best cuDNN of ResNet-50's 3×3 layers at batch 128 on an H200: believable, and the moonshot.
LAYER_BARS: dict[str, dict[float, tuple[float, float]]] = {
    "64@56": {2.25: (1.4, 2.0), 4.5: (1.6, 2.5), 9.0: (1.6, 2.5)},
    "128@28": {2.25: (1.6, 2.1), 4.5: (2.5, 3.3), 9.0: (2.6, 3.3)},
    "256@14": {2.25: (1.5, 2.0), 4.5: (2.5, 3.5), 9.0: (3.8, 5.3)},
    "512@7": {2.25: (1.5, 2.0), 4.5: (2.5, 3.5), 9.0: (4.0, 5.9)},
}
NETWORKS = ("ResNet-18 CIFAR", "VGG-16 CIFAR")
FORWARD_BARS = {2.25: 1.6, 4.5: 2.2}
TRAINING_BARS = {4.5: 1.3}
TABLE_SECONDS = 480.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure that was asked for.

    Attributes:
        what: In words.
        asked, hoped: Must be reached, and is aimed at; 0 where nothing more is.
        got: Measured; None where it was not.
        note: More, such as latency and floor.
    """

    what: str
    asked: float
    hoped: float
    got: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """What became of it."""
        if self.got is None:
            return "not measured"
        if self.hoped and self.got >= self.hoped:
            return "moonshot"
        return "reached" if self.got >= self.asked else "missed"


def bars(rows: Sequence[dict[str, str]]) -> list[Bar]:
    """Return every bar with its figure; of several rows of one figure the last counts."""
    found = []
    for layer, wanted in LAYER_BARS.items():
        case = f"ResNet-50 3x3 {layer}"
        for compression, (believable, moonshot) in wanted.items():
            got = _latest(rows, case, compression, "speed-up over best cuDNN")
            times = [_latest(rows, case, compression, name) for name in ("latency", "tile model", "roofline floor")]
            note = "measured / tile model / floor: " + " / ".join("–" if us is None else f"{us:.1f}" for us in times)
            found.append(Bar(f"{case}, {compression:g}×", believable, moonshot, got, f"{note} µs"))
    for kind, wanted_nets in (("forward", FORWARD_BARS), ("training step", TRAINING_BARS)):
        for network in NETWORKS:
            for compression, asked in wanted_nets.items():
                got = _latest(rows, f"{network} {kind}", compression, "speed-up over fastest dense", best=True)
                found.append(Bar(f"{network} {kind}, {compression:g}×", asked, 0.0, got))
    return found


def _latest(
    rows: Sequence[dict[str, str]], case: str, compression: float, metric: str, *, best: bool = False
) -> float | None:
    values = [
        float(row["p50"])
        for row in rows
        if row["case"] == case and row["metric"] == metric and abs(float(row["compression"]) - compression) < 0.01
    ]
    if not values:
        return None
    return max(values) if best else values[-1]


def write_summary(folder: Path) -> Path:
    """Write the summary of a folder's rows and return its path."""
    path = folder / "gpu.csv"
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    where = next((f"{row['device']}, {row['dtype']}, {row['versions']}" for row in reversed(rows)), "nothing measured")
    lines = ["# What was asked of the GPU, and what was measured", "", where, "",
             "| figure | asked | moonshot | measured | | |", "|---|---|---|---|---|---|"]
    for bar in bars(rows):
        got, hoped = "–" if bar.got is None else f"{bar.got:.2f}×", f"{bar.hoped:g}×" if bar.hoped else ""
        lines.append(f"| {bar.what} | {bar.asked:g}× | {hoped} | {got} | {bar.verdict} | {bar.note} |")
    lines += ["", *_tables(rows), *_failures(folder)]
    target = folder / "gpu-summary.md"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _tables(rows: Sequence[dict[str, str]]) -> list[str]:
    lines = []
    seconds = _latest(rows, "tables", 1.0, "seconds")
    if seconds is not None:
        lines.append(f"Tables took {seconds:.0f} s; asked were at most {TABLE_SECONDS:.0f} s without a limit.")
        lines.append("To embed them: `unzip gpu-tables.zip -d autoprune/assets/tables`, then look at `search --table`.")
    cases = dict.fromkeys(row["case"] for row in rows if row["case"].startswith("table "))
    if cases:
        lines += ["", "| table | rows | left out | networks | MAPE | Kendall τ |", "|---|---|---|---|---|---|"]
    for case in cases:
        figures = [_latest(rows, case, 1.0, name) for name in ("rows", "left out", "networks", "MAPE", "Kendall tau")]
        cells = ["–" if value is None else f"{value:g}" for value in figures]
        lines.append(f"| {case.removeprefix('table ')} | {' | '.join(cells)} |")
    return lines


def _failures(folder: Path) -> list[str]:
    path = folder / "gpu-failures.txt"
    return ["", f"Something failed: see {path.name}."] if path.exists() else []
