"""A result in words: the one place where its figures become text, for the closing table and the report alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.core.result import Result, Row

NONE = "–"

COLUMNS = (
    "policy",
    "predicted",
    "measured",
    "× dense",
    "MACs",
    "weights",
    "pruned",
    "tuned",
    "test",
    "budget",
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the closing table.

    Attributes:
        cells: One text per entry of ``COLUMNS``.
        role: ``dense``, ``chosen`` or ``baseline``.
    """

    cells: tuple[str, ...]
    role: str


def time_text(us: float | None) -> str:
    """Return a time with three significant digits and its unit; a dash for None."""
    if us is None:
        return NONE
    value, unit = (us, "µs") if us < 999.5 else (us / 1e3, "ms") if us < 999.5e3 else (us / 1e6, "s")
    return f"{significant(value)} {unit}"


def seconds_text(seconds: float) -> str:
    """Return a wall time such as ``0.4 s``, ``38 s`` or ``4 min 05 s``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage; a dash for None."""
    return NONE if fraction is None else f"{100.0 * fraction:.{digits}f} %"


def significant(value: float, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits and no exponent."""
    if value == 0.0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{places}f}"


def verdict(result: Result) -> str:
    """Return one plain sentence: what was asked, and whether the measured network meets it."""
    asked = f"{result.budget} for {result.model} on {result.data}"
    chosen = result.row("chosen")
    if chosen is None:
        return f"No policy was found for {asked}." + _reason(result)
    parts = [_latency_clause(result, chosen), _accuracy_clause(result, chosen)]
    found = ", ".join(part for part in parts if part)
    if result.goal == "front" and result.met:
        which = "its best policy within the budget" if "=" in result.budget else "the policy at its bend"
        return f"A front was asked for: {asked}; {which} {found}."
    thing = "constraint" if result.goal == "constraint" else "budget"
    state = f"The {thing} is {'met' if result.met else 'missed'}"
    if result.predicted_for:
        state += f" as predicted for {result.predicted_for}, where no network was deployed to verify it"
    return f"{state}: asked was {asked}; the chosen policy {found}." + _reason(result)


def _reason(result: Result) -> str:
    text = result.reason.rstrip(".")
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _latency_clause(result: Result, chosen: Row) -> str:
    cost = chosen.measured
    if cost is None and result.predicted_for and chosen.predicted.latency_us is not None:
        text = f"is predicted to run in {time_text(chosen.predicted.latency_us)}"
        ratio = percent(chosen.predicted.latency_ratio)
        return f"{text}, {ratio} of the fastest dense execution measured there"
    if cost is None or cost.latency_us is None:
        return f"keeps {percent(chosen.predicted.macs_ratio)} of the MACs (its latency was not measured)"
    text = f"runs in {time_text(cost.latency_us)} as measured"
    if cost.latency_ratio is not None:
        # Both were timed in turn: a reference time of another moment would compare two states of the machine.
        text += f", {percent(cost.latency_ratio)} of the fastest dense execution timed beside it"
        name = "" if result.fastest_reference is None else f"{result.fastest_reference[0]}, "
        text += f" ({name}{time_text(cost.dense_latency_us)})"
    return text


def _accuracy_clause(result: Result, chosen: Row) -> str:
    accuracy = chosen.accuracy
    tested = accuracy.test is not None and accuracy.dense_test is not None
    final = accuracy.test if tested else accuracy.tuned if accuracy.tuned is not None else accuracy.pruned
    if final is None:
        return ""
    value, where = figure_text(final, result.metric), f"on the {'test' if tested else 'validation'} data"
    if result.metric == "agreement":
        return f"and agrees with the dense network in {value} of its answers {where}"
    dense = figure_text(accuracy.dense_test if tested else accuracy.dense, result.metric)
    if result.metric == "score":
        return f"and scores {value} by the user's own measure (dense: {dense})"
    return f"and reaches {value} {where} (dense: {dense})"


def figure_text(value: float | None, metric: str) -> str:
    """Return a figure of a network's quality: a share as a percentage, the user's own score as it is."""
    if value is None:
        return NONE
    return significant(value, 4) if metric == "score" else percent(value, 2)


def metric_text(metric: str) -> str:
    """Return the sentence that says what the figures of a closing table are."""
    what = {
        "accuracy": "Accuracy is top-1",
        "agreement": "Figures are agreement, not accuracy: the share of images on which a network gives the dense "
        "network's answer",
        "score": "Figures are the user's own measure, more being better",
    }[metric]
    return f"{what}: pruned and tuned on validation data, test for the chosen policy and the dense network alone."


def table_lines(result: Result) -> list[Line]:
    """Return the closing table: dense, chosen, then the baselines in the result's order."""
    return [_line(row, result) for row in result.rows]


def _line(row: Row, result: Result) -> Line:
    role = row.name if row.name in ("dense", "chosen") else "baseline"
    measured = row.measured
    ratio = measured.latency_ratio if measured is not None else row.predicted.latency_ratio
    ratio_text = NONE if ratio is None else f"{ratio:.2f}" + ("" if measured is not None else " (pred.)")
    pruned, test = row.accuracy.pruned, row.accuracy.test
    if role == "dense":
        chosen = result.row("chosen") or row
        pruned = row.accuracy.dense if row.accuracy.dense is not None else chosen.accuracy.dense
        test = chosen.accuracy.dense_test
    name = row.name if row.proposer in ("", row.name) else f"{row.name} ({row.proposer})"
    cells = (
        name,
        time_text(row.predicted.latency_us),
        time_text(measured.latency_us if measured is not None else None),
        ratio_text,
        percent(row.predicted.macs_ratio),
        percent(row.predicted.params_ratio),
        figure_text(pruned, result.metric),
        figure_text(row.accuracy.tuned, result.metric),
        figure_text(test, result.metric) if role != "baseline" else NONE,
        _met(row, result),
    )
    return Line(cells, role)


def _met(row: Row, result: Result) -> str:
    if row.feasible is None:
        return NONE
    return ("met" if row.feasible else "missed") + (" (pred.)" if result.predicted_for else "")


def reference_lines(result: Result) -> list[tuple[str, str, str]]:
    """Return (name, time, remark) of every dense execution, the fastest first, absent ones last."""
    ordered = sorted(result.references.items(), key=lambda item: item[1])
    lines = [(name, time_text(us), "fastest" if index == 0 else "") for index, (name, us) in enumerate(ordered)]
    return lines + [(name, NONE, why) for name, why in sorted(result.absent_references.items())]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points that no other beats in both coordinates (less is better), by the first one."""
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front
