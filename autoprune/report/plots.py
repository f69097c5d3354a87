"""The report's plots, from a result alone.

Colours are told apart by readers with any colour vision (after Okabe and Ito) and stand out on white and on black;
wherever colour carries meaning, a symbol, a hatch or a label carries it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autoprune.core.result import LayerRow, Result, TrialRow
from autoprune.core.sensitivity import CurvePoint, LayerCurve, Sensitivity
from autoprune.report.summary import pareto_front, percent, significant, time_text

BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY = "#2f7fc1", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8f98"
_KIND_LOOKS = {  # colour, hatch
    "dense": (GREY, ""),
    "block": (BLUE, ""),
    "pattern": (ORANGE, "/"),
    "fine": (PINK, "."),
    "ck": (GREEN, "x"),
    "window": (SKY, "\\"),
    "combined": (RED, "+"),
}
_OTHER_LOOK = (GREEN, "|")
SERIES = ((BLUE, "circle"), (ORANGE, "square"), (GREEN, "diamond"), (PINK, "triangle-up"), (SKY, "cross"), (GREY, "x"))


def figures(result: Result, sensitivity: Sensitivity | None = None) -> dict[str, str]:
    """Return plot name → figure as JSON; a plot whose data are absent is left out."""
    made = {
        "layers": layer_figure(result.layers) if result.layers else None,
        "trials": trial_figure(result) if result.trials else None,
        "fidelity": fidelity_figure(result) if result.fidelity else None,
        "sensitivity": sensitivity_figure(sensitivity) if sensitivity is not None else None,
    }
    return {name: as_json(figure) for name, figure in made.items() if figure is not None}


def as_json(figure: go.Figure) -> str:
    """Return a figure as JSON that may stand inside a script element."""
    text: str = figure.to_json()
    return text.replace("<", "\\u003c")  # no layer name may end the script element that holds it


def laid_out(figure: go.Figure, height: int) -> go.Figure:
    """Give a figure the look that all plots share."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 10, "t": 56, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "inherit", "size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "yref": "paper", "x": 0, "bgcolor": "rgba(0,0,0,0)"},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(automargin=True, zeroline=False, showline=True, ticks="outside")
    figure.update_yaxes(automargin=True, zeroline=False, showline=True)
    return figure


def layer_figure(layers: Sequence[LayerRow]) -> go.Figure:
    """Return density by layer, coloured by the choice's kind, beside the layer's time: dense, predicted, measured."""
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.05, column_widths=[0.42, 0.58])
    kinds = list(dict.fromkeys(_kind(layer) for layer in layers))
    for kind in kinds:
        rows = [layer for layer in layers if _kind(layer) == kind]
        color, hatch = _KIND_LOOKS.get(kind, _OTHER_LOOK)
        figure.add_bar(
            x=[100.0 * layer.density for layer in rows],
            y=[layer.name for layer in rows],
            name=kind,
            orientation="h",
            width=0.7,
            marker={"color": color, "pattern": {"shape": hatch, "fillmode": "overlay", "fgcolor": "#ffffff"}},
            text=[f"{layer.density:.0%} · {layer.kernel}" for layer in rows],
            textposition=["inside" if layer.density > 0.6 else "outside" for layer in rows],
            insidetextanchor="end",
            insidetextfont={"size": 12, "color": "#ffffff"},
            outsidetextfont={"size": 12},
            constraintext="none",
            customdata=[[layer.choice, layer.shape] for layer in rows],
            hovertemplate="%{y}<br>%{customdata[1]}<br>%{customdata[0]}<extra></extra>",
            cliponaxis=False,
            row=1,
            col=1,
        )
    _add_times(figure, layers)
    figure = laid_out(figure, height=110 + 26 * len(layers))
    order = [layer.name for layer in layers]
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(categoryorder="array", categoryarray=order, autorange="reversed", ticks="")
    figure.update_xaxes(title_text="weights kept (%)", range=[0, 100], row=1, col=1)
    figure.update_xaxes(title_text="time of the layer (µs)", rangemode="tozero", row=1, col=2)
    return figure


def _add_times(figure: go.Figure, layers: Sequence[LayerRow]) -> None:
    names = [layer.name for layer in layers]
    where = {"row": 1, "col": 2}
    hover = "%{y}: %{x:.1f} µs"
    dense = [layer.dense_us for layer in layers]
    figure.add_bar(
        x=dense,
        y=names,
        name="dense time",
        orientation="h",
        width=0.7,
        marker={"color": GREY, "opacity": 0.35},
        hovertemplate=hover + "<extra>dense</extra>",
        **where,
    )
    if any(layer.measured_us is not None for layer in layers):
        figure.add_bar(
            x=[layer.measured_us for layer in layers],
            y=names,
            name="measured in the network",
            orientation="h",
            width=0.35,
            marker={"color": BLUE},
            hovertemplate=hover + "<extra>measured</extra>",
            **where,
        )
    diamond = {"symbol": "diamond", "size": 9, "color": "#ffffff", "line": {"width": 2, "color": RED}}
    tick = {"symbol": "line-ns-open", "size": 14, "color": GREEN, "line": {"width": 2.5}}
    marks: list[tuple[str, list[float | None], dict[str, object]]] = [
        ("predicted", [layer.predicted_us for layer in layers], diamond),
        ("floor", [layer.floor_us for layer in layers], tick),
    ]
    if any(layer.model_us is not None for layer in layers):
        triangle = {"symbol": "triangle-up-open", "size": 9, "color": PINK, "line": {"width": 2}}
        marks.append(("tile model", [layer.model_us for layer in layers], triangle))
    for name, values, marker in marks:
        figure.add_scatter(
            x=values,
            y=names,
            name=name,
            mode="markers",
            marker=marker,
            hovertemplate=hover + f"<extra>{name}</extra>",
            **where,
        )


def _kind(layer: LayerRow) -> str:
    return layer.choice.partition("(")[0]


def trial_figure(result: Result) -> go.Figure:
    """Return every evaluated policy, latency against error, by proposer; the front, the budget and the chosen one."""
    figure = go.Figure()
    proposers = list(dict.fromkeys(trial.proposer for trial in result.trials))
    for index, proposer in enumerate(proposers):
        color, symbol = SERIES[index % len(SERIES)]
        rows = [trial for trial in result.trials if trial.proposer == proposer]
        look: dict[str, object] = {"color": color, "symbol": symbol, "size": 8, "opacity": 0.75}
        _add_trials(figure, rows, f"{proposer} ({len(rows)})", look)
    front = [result.trials[i] for i in pareto_front([(t.latency_us, t.error) for t in result.trials])]
    figure.add_scatter(
        x=[trial.latency_us for trial in front],
        y=[trial.error for trial in front],
        mode="lines",
        name="front",
        line={"shape": "hv", "color": GREY, "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
    )
    chosen = [trial for trial in result.trials if trial.number == result.chosen_trial]
    if chosen:
        star = {"color": RED, "symbol": "star", "size": 18, "line": {"width": 1, "color": "#ffffff"}}
        _add_trials(figure, chosen, "chosen", star)
    figure = laid_out(figure, height=440)
    limit = result.latency_limit_us
    if limit is not None:
        label = {"annotation_text": f"budget {time_text(limit)}", "annotation_position": "bottom right"}
        figure.add_vline(x=limit, line={"color": RED, "dash": "dash", "width": 1.5}, annotation_font_color=RED, **label)
    logarithmic = all(trial.error > 0.0 for trial in result.trials)
    figure.update_xaxes(title_text="predicted latency (µs)")
    scale = "log" if logarithmic else "linear"
    figure.update_yaxes(title_text="error: KL to dense (nats)", type=scale, dtick="D2" if logarithmic else None)
    return figure


def _add_trials(figure: go.Figure, rows: Sequence[TrialRow], name: str, marker: dict[str, object]) -> None:
    figure.add_scatter(
        x=[trial.latency_us for trial in rows],
        y=[trial.error for trial in rows],
        customdata=[[trial.number, percent(trial.accuracy, 2)] for trial in rows],
        mode="markers",
        name=name,
        marker=marker,
        hovertemplate="trial %{customdata[0]}: %{x:.0f} µs, %{y:.4g} nats, accuracy %{customdata[1]}<extra></extra>",
    )


def fidelity_figure(result: Result) -> go.Figure:
    """Return predicted against measured latency of random policies, with the line on which both agree."""
    predicted = [point.predicted_us for point in result.fidelity]
    measured = [point.measured_us for point in result.fidelity]
    low, high = 0.95 * min(*predicted, *measured), 1.05 * max(*predicted, *measured)
    figure = go.Figure()
    for factor, name in ((1.1, "+10 %"), (0.9, "−10 %")):
        figure.add_scatter(
            x=[low, high],
            y=[factor * low, factor * high],
            mode="lines",
            name=name,
            line={"color": GREY, "width": 1, "dash": "dot"},
            showlegend=False,
            hoverinfo="skip",
        )
    figure.add_scatter(x=[low, high], y=[low, high], mode="lines", name="equal", line={"color": GREY}, hoverinfo="skip")
    figure.add_scatter(
        x=measured,
        y=predicted,
        mode="markers",
        name="random policy",
        marker={"color": BLUE, "size": 8, "opacity": 0.8},
        hovertemplate="measured %{x:.1f} µs, predicted %{y:.1f} µs<extra></extra>",
    )
    figure = laid_out(figure, height=440)
    figure.update_xaxes(title_text="measured, end to end (µs)", range=[low, high])
    figure.update_yaxes(title_text="predicted from the table (µs)", range=[low, high])
    return figure


def sensitivity_figure(sensitivity: Sensitivity) -> go.Figure:
    """Return each layer's error alone against the weights it keeps, and the threshold that would meet the budget."""
    figure = go.Figure()
    count = max(1, len(sensitivity.layers) - 1)
    for index, curve in enumerate(sensitivity.layers):
        rows = _best_by_density(curve)
        figure.add_scatter(
            x=[100.0 * point.density for point in rows],
            y=[point.error for point in rows],
            customdata=[point.choice for point in rows],
            mode="lines+markers",
            name=curve.layer,
            line={"color": f"hsl({round(300.0 * index / count)},55%,50%)", "width": 1.5},
            marker={"size": 5},
            hovertemplate=f"{curve.layer}<br>%{{customdata}}: %{{y:.3g}} nats<extra></extra>",
        )
    figure = laid_out(figure, height=480)
    if sensitivity.threshold is not None and sensitivity.threshold > 0.0:
        label = {"annotation_text": f"threshold {significant(sensitivity.threshold)} nats"}
        line = {"color": RED, "dash": "dash", "width": 1.5}
        figure.add_hline(y=sensitivity.threshold, line=line, annotation_font_color=RED, **label)
    figure.update_xaxes(title_text="weights kept in the layer (%)")
    figure.update_yaxes(title_text="error with only this layer pruned (nats)", type="log", dtick="D2")
    figure.update_layout(legend={"orientation": "v", "yanchor": "top", "y": 1.0, "x": 1.02})
    return figure


def _best_by_density(curve: LayerCurve) -> list[CurvePoint]:
    """Return the best choice of every density; one without error has no place on a logarithmic axis."""
    best: dict[float, CurvePoint] = {}
    for point in sorted(curve.points, key=lambda point: -point.error):
        if point.error > 0.0:
            best[point.density] = point
    return [best[density] for density in sorted(best)]
