"""``autoprune lut build`` and ``autoprune lut show``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from autoprune.lut.table import LatencyTable, Row

app = typer.Typer(name="lut", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Latency tables: what every layer costs with every choice, measured on this machine."""


@app.command()
def build(
    model: options.Model = "resnet20",
    data: options.Data = "fashion-mnist",
    data_dir: options.DataDir = None,
    space: options.Space = "cpu-default",
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    out: Annotated[Path, typer.Option(help="The table's file; written after every layer.")] = Path("table.json"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of an existing file.")] = False,
    debug: options.Debug = False,
) -> None:
    """Measure the table of a model and a search space, and calibrate it on whole networks."""
    from autoprune.cli.progress import make_progress, steps
    from autoprune.core.errors import DeviceError, RunError
    from autoprune.lut.build import build_table
    from autoprune.lut.calibrate import calibrate
    from autoprune.lut.deploy import deployer
    from autoprune.lut.table import LatencyTable, current_context
    from autoprune.search_spaces.space import load_space
    from autoprune.search_spaces.trace import trace
    from autoprune.tasks.task import load_task

    if device != "cpu":
        raise DeviceError(f"--device {device!r}: sparse kernels exist for 'cpu'.")
    if out.exists() and not resume:
        raise RunError(f"{out} exists; --resume keeps its rows and measures what is absent, or give another --out.")
    context = current_context(batch, threads)
    rows = LatencyTable.load(out, context).rows if out.exists() else {}
    task = load_task(model, data, data_dir=data_dir)
    layers = trace(task.model, task.example)
    choices = load_space(space, layers).choices
    wanted = {layer: choices[layer.name] for layer in layers}
    progress = make_progress()
    try:
        table = build_table(
            wanted, context, rows=rows, progress=steps(progress, "table"), checkpoint=lambda part: part.save(out)
        )
        progress.stage("calibration")
        deploy = deployer(task.model, task.example.repeat(batch, 1, 1, 1), threads)
        table = calibrate(table, layers, deploy, choices, seed)
        table.save(out)
    finally:
        progress.finish()
    _show(table)
    print(out)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A table's file.")],
    debug: options.Debug = False,
) -> None:
    """Show a table: its context, its calibration and every row."""
    from autoprune.lut.table import LatencyTable

    _show(LatencyTable.load(file))


def _slowest_first(item: tuple[tuple[str, str], Row]) -> tuple[str, float, str]:
    (signature, choice), row = item
    return signature, -row.p50, choice


def _show(table: LatencyTable) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from autoprune.cli.table import make_console
    from autoprune.report.summary import percent, significant

    console = make_console()
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "choice", "kernel"):
        shown.add_column(column, no_wrap=True)
    for column in ("p10 µs", "p50 µs", "p90 µs", "× dense", "bytes"):
        shown.add_column(column, justify="right", no_wrap=True)
    for (signature, choice), row in sorted(table.rows.items(), key=_slowest_first):
        dense = table.rows.get((signature, "dense"))
        ratio = f"{row.p50 / dense.p50:.2f}" if dense is not None else "–"
        times = [significant(value) for value in (row.p10, row.p50, row.p90)]
        cells = (signature, choice, row.kernel, *times, ratio, str(row.weight_bytes))
        shown.add_row(*map(escape, cells))
    console.print(shown)
    facts = table.context.model_dump()
    for name, value in {**dict(facts.pop("versions")), **facts}.items():
        console.print(f"{name:<12}{value}", markup=False)
    fit = table.calibration
    if fit is None:
        console.print("not calibrated: end-to-end latency is the plain sum of rows")
        return
    line = f"end to end = {fit.slope:.3f} × sum of rows + {fit.intercept_us:.1f} µs"
    error = f"{percent(fit.mape)} mean error, Kendall τ {significant(fit.kendall_tau)} over {len(fit.points)} networks"
    console.print(f"{'calibration':<12}{line}; {error}", markup=False)
