"""``autoprune lut build`` and ``autoprune lut show``."""

from __future__ import annotations

import os
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
    out: Annotated[
        Path | None,
        typer.Option(help="The table's file, written after every layer.", show_default="made from the settings"),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Write the table that a search of this run's name uses.", show_default=False)
    ] = None,
    runs_dir: options.RunsDir = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of an existing file.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure the table of a model and a search space, and calibrate it on whole networks."""
    from autoprune.cli.progress import steps, working
    from autoprune.core.errors import RunError
    from autoprune.core.rundir import make_folder
    from autoprune.lut.build import build_table
    from autoprune.lut.calibrate import calibrate
    from autoprune.lut.deploy import deployer
    from autoprune.lut.device import check_device
    from autoprune.lut.table import LatencyTable, current_context
    from autoprune.search_spaces.space import load_space
    from autoprune.search_spaces.trace import trace
    from autoprune.tasks.task import load_task

    check_device(device)
    settings = {"model": model, "data": data, "space": space, "batch": batch, "threads": threads}
    path = out or _path(run, runs_dir, settings)
    if run is not None:
        _check_run(run, runs_dir, settings)
    if path.exists() and not resume:
        raise RunError(f"{path} exists; --resume keeps its rows and measures what is absent, or give another --out.")
    context = current_context(batch, threads)
    rows = LatencyTable.load(path, context).rows if path.exists() else {}
    task = load_task(model, data, data_dir=data_dir)
    layers = trace(task.model, task.example)
    choices = load_space(space, layers).choices
    wanted = {layer: choices[layer.name] for layer in layers}
    if out is None:
        make_folder(path.parent)
    elif not os.access(out.parent, os.W_OK):
        raise RunError(f"--out {out}: {out.parent} is no folder that can be written; make it, or give another --out.")
    with working() as progress:
        table = build_table(
            wanted, context, rows=rows, progress=steps(progress, "table"), checkpoint=lambda part: part.save(path)
        )
        progress.stage("calibration")
        deploy = deployer(task.model, task.example.repeat(batch, 1, 1, 1), threads)
        table = calibrate(table, layers, deploy, choices, seed)
        table.save(path)
    _show(table, path, as_json)
    if not as_json:
        print(path)


@app.command()
def show(
    file: Annotated[Path | None, typer.Argument(help="A table's file.", show_default=False)] = None,
    run: options.RunRead = None,
    runs_dir: options.RunsDir = Path("runs"),
    batch: options.BatchRead = None,
    threads: options.ThreadsRead = None,
    seed: options.SeedRead = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show a table: its context, its calibration and every row."""
    from autoprune.core.rundir import RunDir, check_made_with
    from autoprune.lut.table import LatencyTable

    options.one_of("FILE", file, "--run", run)
    made: dict[str, object] = {}
    if run is not None:
        folder = RunDir.existing(runs_dir, run)
        file = folder.table
        made = folder.read_json(folder.config) if folder.config.exists() else {}
    assert file is not None
    table = LatencyTable.load(file)
    # Of the seed, which drew the calibration's networks, only a run keeps a note.
    made = {**made, "batch": table.context.batch, "threads": table.context.threads}
    check_made_with(f"latency table {file}", made, {"batch": batch, "threads": threads, "seed": seed})
    _show(table, file, as_json)


def _path(run: str | None, runs_dir: Path, settings: dict[str, object]) -> Path:
    from autoprune.core.rundir import RunDir, run_name, table_path

    if run is not None:
        return RunDir.named(runs_dir, run).table
    return table_path(runs_dir, run_name(settings["model"], f"b{settings['batch']}", f"t{settings['threads']}"))


def _check_run(run: str, runs_dir: Path, settings: dict[str, object]) -> None:
    """Refuse to measure for a run that exists with other settings."""
    from autoprune.core.rundir import RunDir, check_made_with

    folder = RunDir.named(runs_dir, run)
    if folder.config.exists():
        check_made_with(f"run {folder.path}", folder.read_json(folder.config), settings)


def _slowest_first(item: tuple[tuple[str, str], Row]) -> tuple[str, float, str]:
    (signature, choice), row = item
    return signature, -row.p50, choice


def _show(table: LatencyTable, path: Path, as_json: bool) -> None:
    if as_json:
        from autoprune.cli.record import print_record

        rows = [{"layer": key[0], "choice": key[1], **row.model_dump()} for key, row in sorted(table.rows.items())]
        facts = {"context": table.context, "calibration": table.calibration, "hash": table.hash, "rows": rows}
        print_record({"path": path, **facts})
        return
    _print_table(table)


def _print_table(table: LatencyTable) -> None:
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
