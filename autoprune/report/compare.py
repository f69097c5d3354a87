"""The report of a comparison of agents: one HTML file that needs no network, made from ``comparison.json`` alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from autoprune.core.comparison import Cell, Comparison
from autoprune.core.rundir import RunDir, write_text
from autoprune.report.html import environment
from autoprune.report.plots import SERIES, as_json, laid_out
from autoprune.report.standing import COLUMNS, lines, sentences


def write_comparison_report(run: RunDir) -> Path:
    """Write ``report.html`` into a comparison's folder and return its path.

    Raises:
        RunError: There is no readable comparison, or its folder cannot be written.
    """
    write_text(run.report, render_comparison(Comparison.load(run.comparison)))
    return run.report


def render_comparison(comparison: Comparison) -> str:
    """Return the report as HTML text."""
    parts, plots = [], {}
    for index, budget in enumerate(comparison.budgets):
        part = {"budget": budget, "sentences": sentences(comparison, budget), "lines": lines(comparison, budget)}
        parts.append({**part, "curve": f"curve{index}", "tuned": f"tuned{index}"})
        plots[f"curve{index}"] = Markup(as_json(curve_figure(comparison, budget)))
        if comparison.finetuned:
            plots[f"tuned{index}"] = Markup(as_json(tuned_figure(comparison, budget)))
    return environment().get_template("compare.html.j2").render(
        comparison=comparison, columns=COLUMNS, parts=parts, plots=plots, plotly_js=Markup(get_plotlyjs())
    )


def mean_curve(cells: Sequence[Cell]) -> list[tuple[int, float]]:
    """Return (evaluations, mean least error over seeds) from where every seed has a policy; an agent that stops early
    keeps what it found."""
    length = max((len(cell.curve) for cell in cells), default=0)
    rows = [cell.curve + cell.curve[-1:] * (length - len(cell.curve)) for cell in cells if cell.curve]
    found = []
    for place in range(length):
        values = [value for row in rows if (value := row[place]) is not None]
        if len(values) == len(rows):
            found.append((place + 1, statistics.fmean(values)))
    return found


def curve_figure(comparison: Comparison, budget: str) -> go.Figure:
    """Return least error against evaluations, one line per agent."""
    figure = go.Figure()
    for index, agent in enumerate(comparison.agents):
        points = mean_curve(comparison.at(budget, agent))
        color, symbol = SERIES[index % len(SERIES)]
        figure.add_scatter(
            x=[count for count, _ in points],
            y=[error for _, error in points],
            mode="lines+markers" if len(points) < 3 else "lines",
            name=agent,
            line={"color": color, "shape": "hv", "width": 2, "dash": _DASHES[index // len(SERIES) % len(_DASHES)]},
            marker={"symbol": symbol, "size": 9},
            hovertemplate=f"{agent}: %{{y:.4g}} nats after %{{x}}<extra></extra>",
        )
    figure = laid_out(figure, height=440)
    figure.update_xaxes(title_text="evaluations")
    figure.update_yaxes(title_text="least error (nats), mean over seeds", type="log")
    return figure


_DASHES = ("solid", "dash", "dot")


def tuned_figure(comparison: Comparison, budget: str) -> go.Figure:
    """Return error before training against accuracy after it, one mark per policy."""
    figure = go.Figure()
    for index, agent in enumerate(comparison.agents):
        top = [p for cell in comparison.at(budget, agent) for p in cell.top if p.tuned is not None]
        color, symbol = SERIES[index % len(SERIES)]
        figure.add_scatter(
            x=[policy.error for policy in top],
            y=[100.0 * (policy.tuned or 0.0) for policy in top],
            mode="markers",
            name=agent,
            marker={"color": color, "symbol": symbol, "size": 9, "opacity": 0.8},
            hovertemplate=f"{agent}: %{{x:.4g}} nats, %{{y:.2f}} % tuned<extra></extra>",
        )
    figure = laid_out(figure, height=440)
    figure.update_xaxes(title_text="error before training (nats)", type="log")
    figure.update_yaxes(title_text="validation accuracy after the fine-tune (%)")
    return figure
