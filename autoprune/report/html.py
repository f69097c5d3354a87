"""The report of a run: one HTML file that needs no network, made from the JSON files of the run alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from autoprune.core.policy import Policy, PolicyFile
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir, write_text
from autoprune.core.sensitivity import Sensitivity
from autoprune.report.explain import explain
from autoprune.report.plots import figures
from autoprune.report.summary import (
    COLUMNS,
    metric_text,
    percent,
    reference_lines,
    seconds_text,
    significant,
    table_lines,
    time_text,
    verdict,
)


def write_report(run: RunDir) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    Raises:
        RunError: The run has no readable result, or its folder cannot be written.
        PolicyError: Its policy file is damaged.
    """
    result = Result.load(run.result)
    policy = Policy.load(run.policy).file if run.policy.exists() else None
    write_text(run.report, render(result, policy, Sensitivity.load(run.sensitivity)))
    return run.report


def render(result: Result, policy: PolicyFile | None = None, sensitivity: Sensitivity | None = None) -> str:
    """Return the report as HTML text."""
    plots = {name: Markup(text) for name, text in figures(result, sensitivity).items()}
    return environment().get_template("template.html.j2").render(
        result=result,
        policy=policy,
        verdict=verdict(result),
        metric_text=metric_text(result.metric),
        columns=COLUMNS,
        lines=table_lines(result),
        references=reference_lines(result),
        explanations=explain(result),
        plots=plots,
        has_model=any(layer.model_us is not None for layer in result.layers),
        plotly_js=Markup(get_plotlyjs()),
        total_seconds=sum(result.seconds.values()),
    )


@cache
def environment() -> Environment:
    """Return the templates of this package, with the filters they use."""
    environment = Environment(
        loader=PackageLoader("autoprune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        time=time_text,
        seconds=seconds_text,
        percent=percent,
        significant=significant,
        times_floor=_times_floor,
        breakable=_breakable,
    )
    return environment


def _times_floor(measured_us: float | None, floor_us: float) -> str:
    if measured_us is None or floor_us <= 0.0:
        return "–"
    return f"{measured_us / floor_us:.1f} ×"


def _breakable(choice: str) -> Markup:
    """Let a choice's text wrap after its commas."""
    return Markup(",<wbr>").join(choice.split(","))
