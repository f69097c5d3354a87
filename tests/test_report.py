"""The report: complete, self-contained, true to result.json, and safe against any text in it."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.errors import RunError
from autoprune.core.policy import Policy
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir
from autoprune.core.sensitivity import CurvePoint, LayerCurve, Sensitivity
from autoprune.report.explain import explain
from autoprune.report.html import render, write_report
from autoprune.report.plots import figures
from autoprune.report.summary import (
    COLUMNS,
    pareto_front,
    percent,
    reference_lines,
    seconds_text,
    table_lines,
    time_text,
    verdict,
)

_VOID = {"meta", "br", "wbr", "link", "img", "hr"}


class _Page(HTMLParser):
    """Collects what the tests ask of a page: text outside scripts, addresses it fetches, tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.fetched += [value for name in ("src", "href") if (value := values.get(name))]
        self.ids += [value for value in [values.get("id")] if value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_is_self_contained_and_well_formed(result: Result, policy: Policy) -> None:
    text = render(result, policy.file)
    page = _Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "default-src 'none'" in text
    assert text.count("plotly.js v") == 1
    assert len(text) < 6_000_000


def test_page_shows_what_the_result_says(result: Result, policy: Policy) -> None:
    page = _Page(render(result, policy.file))
    for line in table_lines(result):
        assert " ".join(line.cells) in page.text
    for layer in result.layers:
        assert layer.name in page.text
        assert layer.why in page.text
    for name, time, _ in reference_lines(result):
        assert f"{name} {time}" in page.text
    for name in (*result.seconds, *result.context, policy.file.model_fingerprint, "0.940", "3.1 %"):
        assert name in page.text
    assert {"layers", "trials", "fidelity"} <= set(page.ids)


def test_report_is_written_from_the_run_folder_alone(run: RunDir, result: Result) -> None:
    path = write_report(run)
    assert path == run.report
    assert verdict(result) in html.unescape(path.read_text(encoding="utf-8"))


def test_report_needs_no_policy_file(run: RunDir) -> None:
    run.policy.unlink()
    assert "model fingerprint" not in write_report(run).read_text(encoding="utf-8")


def test_report_of_a_run_without_result_says_what_to_do(run: RunDir) -> None:
    run.result.unlink()
    with pytest.raises(RunError, match="the search is not finished"):
        write_report(run)


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<b>&\"'", "{{ 7 * 7 }}"])
def test_text_in_a_result_stays_text(result: Result, policy: Policy, text: str) -> None:
    layer = result.layers[0].model_copy(update={"name": text, "why": text, "choice": text})
    trial = result.trials[0].model_copy(update={"proposer": text})
    hostile = result.model_copy(
        update={"model": text, "context": {text: text}, "layers": [layer], "trials": [trial], "reason": text}
    )
    page = _Page(render(hostile, policy.file))
    plain = _Page(render(result, policy.file))
    assert text in page.text
    assert page.ids == plain.ids


def test_same_result_gives_the_same_page(result: Result, policy: Policy) -> None:
    assert render(result, policy.file) == render(result, policy.file)


def test_parts_without_data_are_left_out(result: Result) -> None:
    empty: dict[str, object] = {"layers": [], "trials": [], "fidelity": [], "references": {}}
    bare = result.model_copy(update={**empty, "rows": result.rows[:1]})
    page = _Page(render(bare))
    assert not {"layers", "trials", "fidelity"} & set(page.ids)
    assert "No policy was found" in page.text


def test_missed_budget_is_said(result: Result) -> None:
    missed = result.model_copy(update={"met": False, "reason": "every finalist was slower than predicted"})
    assert verdict(missed).startswith("The budget is missed: asked was latency=50%")
    assert verdict(missed).endswith("Every finalist was slower than predicted.")
    assert 'class="verdict missed"' in render(missed)


def test_verdict_compares_with_the_dense_time_of_the_same_run(result: Result) -> None:
    faster = result.model_copy(update={"references": {**result.references, "other": 800.0}})
    chosen = faster.rows[1]
    assert chosen.measured is not None
    measured = chosen.measured.model_copy(update={"latency_ratio": 0.612, "dense_latency_us": 805.0})
    faster.rows[1] = chosen.model_copy(update={"measured": measured})
    assert "61.2 % of the fastest dense execution timed beside it (other, 805 µs)" in verdict(faster)


def test_verdict_of_a_budget_without_latency(result: Result) -> None:
    chosen = result.rows[1].model_copy(update={"measured": None})
    unmeasured = result.model_copy(update={"rows": [result.rows[0], chosen], "budget": "macs=60%"})
    assert f"keeps {percent(chosen.predicted.macs_ratio)} of the MACs" in verdict(unmeasured)


def test_test_accuracy_is_shown_for_dense_and_chosen_alone(result: Result) -> None:
    column = COLUMNS.index("test")
    shown = {line.cells[0]: line.cells[column] for line in table_lines(result)}
    assert [name for name, text in shown.items() if text != "–"] == ["dense", "chosen (knapsack)"]
    assert shown["dense"] == "92.92 %"


def test_plots_carry_every_trial_layer_and_point(result: Result) -> None:
    plots = {name: json.loads(text) for name, text in figures(result).items()}
    trials = [trace for trace in plots["trials"]["data"] if re.fullmatch(r"\w+ \(\d+\)", trace["name"])]
    assert sum(len(trace["x"]) for trace in trials) == len(result.trials)
    chosen = next(trace for trace in plots["trials"]["data"] if trace["name"] == "chosen")
    assert chosen["customdata"][0][0] == result.chosen_trial
    assert plots["trials"]["layout"]["shapes"][0]["x0"] == result.latency_limit_us
    assert plots["layers"]["layout"]["yaxis"]["categoryarray"] == [layer.name for layer in result.layers]
    bars = [trace for trace in plots["layers"]["data"] if "pattern" in trace["marker"]]
    kept = {name: x for trace in bars for name, x in zip(trace["y"], trace["x"], strict=True)}
    assert kept == pytest.approx({layer.name: 100.0 * layer.density for layer in result.layers})
    points = next(trace for trace in plots["fidelity"]["data"] if trace["name"] == "random policy")
    assert points["x"] == [point.measured_us for point in result.fidelity]


def test_kinds_are_told_apart_without_colour(result: Result) -> None:
    markers = [trace["marker"] for trace in json.loads(figures(result)["layers"])["data"]]
    hatches = [marker["pattern"]["shape"] for marker in markers if "pattern" in marker]
    colors = [marker["color"] for marker in markers if "pattern" in marker]
    assert len(colors) == len(set(colors)) >= 3
    assert "/" in hatches


def test_error_of_zero_is_drawn_on_a_linear_axis(result: Result) -> None:
    exact = result.trials[0].model_copy(update={"error": 0.0})
    plots = figures(result.model_copy(update={"trials": [exact, *result.trials]}))
    assert json.loads(plots["trials"])["layout"]["yaxis"]["type"] == "linear"


def test_explanation_accounts_for_the_whole_network(result: Result) -> None:
    sentences = " ".join(explain(result))
    timed = sum(layer.measured_us or 0.0 for layer in result.layers)
    chosen = result.row("chosen")
    assert chosen is not None
    assert chosen.measured is not None
    assert chosen.measured.latency_us is not None
    assert time_text(chosen.measured.latency_us - timed) in sentences
    slowest = max(result.layers, key=lambda layer: layer.measured_us or 0.0)
    assert slowest.name in sentences
    unmeasured = [layer.model_copy(update={"measured_us": None}) for layer in result.layers]
    assert explain(result.model_copy(update={"layers": unmeasured})) == []


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (None, "–"),
        (0.0, "0 µs"),
        (0.5, "0.500 µs"),
        (9.876, "9.88 µs"),
        (123.4, "123 µs"),
        (999.4, "999 µs"),
        (999.6, "1.00 ms"),
        (12345.0, "12.3 ms"),
        (2.5e6, "2.50 s"),
    ],
)
def test_times_have_three_significant_digits(us: float | None, text: str) -> None:
    assert time_text(us) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (38.2, "38 s"), (59.9, "1 min 00 s"), (245.0, "4 min 05 s")]
)
def test_wall_times_read_well(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_front_holds_exactly_the_unbeaten_points(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)

    front = [points[index] for index in pareto_front(points)]
    assert sorted(front) == sorted({point for point in points if not beaten(point)})


def test_sensitivity_curves_are_plotted_where_a_run_has_them(run: RunDir) -> None:
    rows = (("dense", 1.0, 0.0), ("fine(keep=0.5)", 0.5, 0.02), ("block(keep=0.5,filters=16)", 0.5, 0.05))
    points = [CurvePoint(choice=choice, density=density, error=error) for choice, density, error in rows]
    curves = Sensitivity(threshold=0.03, layers=[LayerCurve(layer="layer1.0.conv1", points=points)])
    assert 'id="sensitivity"' not in write_report(run).read_text(encoding="utf-8")
    curves.save(run.sensitivity)
    text = write_report(run).read_text(encoding="utf-8")
    assert 'id="sensitivity"' in text
    assert "threshold 0.0300 nats" in text
    assert "fine(keep=0.5)" in text.partition('id="sensitivity-data"')[2]
    run.sensitivity.write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        write_report(run)


def test_the_verdict_names_what_was_asked_for(result: Result) -> None:
    kept = result.model_copy(update={"goal": "constraint", "budget": "accuracy=-0.5%"})
    assert verdict(kept).startswith("The constraint is met: asked was accuracy=-0.5%")
    front = result.model_copy(update={"goal": "front", "budget": "accuracy+latency"})
    assert verdict(front).startswith("A front was asked for: accuracy+latency for resnet20")
    assert "; the policy at its bend runs in" in verdict(front)
    within = front.model_copy(update={"budget": "latency=60%,accuracy+latency"})
    assert "; its best policy within the budget runs in" in verdict(within)
