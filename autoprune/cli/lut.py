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
    model_args: options.ModelArgs = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Several networks, separated by commas: resnet20,vgg16@3x32x32,torchvision:resnet50.",
            show_default="the one of --model",
        ),
    ] = None,
    data: options.Data = "fashion-mnist",
    data_dir: options.DataDir = None,
    space: options.SpaceByDevice = None,
    batch: options.Batch = 1,
    batches: Annotated[
        str | None,
        typer.Option(help="Several batch sizes, separated by commas: 1,32,128.", show_default="the one of --batch"),
    ] = None,
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    limit: Annotated[
        str | None,
        typer.Option(
            help="Time for everything, such as 8m: dense rows first, then the layers that take most of the time.",
            show_default="as long as it takes",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The table's file, written after every layer; of several tables their folder.",
            show_default="made from the settings",
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Write the table that a search of this run's name uses.", show_default=False)
    ] = None,
    runs_dir: options.RunsDir = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of an existing file.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure the table of a model and a search space, and calibrate it on whole networks; or several tables."""
    from autoprune.cli.progress import steps, working
    from autoprune.core.duration import parse_seconds
    from autoprune.core.errors import RunError
    from autoprune.lut.device import check_device
    from autoprune.search.tables import Request, build_tables, plan_jobs
    from autoprune.tasks.names import with_args

    check_device(device)
    if models is not None and model_args is not None:
        raise RunError("--model-args belong to --model; in --models write them behind a name, such as NAME{\"k\":2}.")
    if run is not None and (models is not None or batches is not None):
        raise RunError("--run takes one table, --models and --batches make several; leave out one of them.")
    model = with_args(model, model_args)
    names = [with_args(name, None) for name in _names(models)] if models is not None else [model]
    sizes = [_size(text) for text in _listed("--batches", batches)] if batches is not None else [batch]
    request = Request(
        data=data,
        data_dir=data_dir,
        space=space or ("gpu-default" if device == "cuda" else "cpu-default"),
        seed=seed,
        device=device,
        threads=threads,
        limit_s=None if limit is None else parse_seconds("--limit", limit),
    )
    if run is not None:
        made = {"model": model, "data": data, "space": request.space, "batch": batch, "threads": threads}
        _check_run(run, runs_dir, made)
    several = len(names) * len(sizes) > 1
    file = _run_table(run, runs_dir) if run is not None else None if several else out
    jobs = plan_jobs(names, sizes, request, file=file, folder=out if several else None, runs_dir=runs_dir)
    for job in jobs:
        _check_place(job.path, out, resume=resume)
    with working() as progress:
        tables = build_tables(jobs, request, lambda name: steps(progress, name), progress.note)
    for job, table in zip(jobs, tables, strict=True):
        if several and not as_json:
            _print_summary(job.path, table)
        else:
            _show(table, job.path, as_json)
            if not as_json:
                print(job.path)


def _names(text: str) -> list[str]:
    from autoprune.core.errors import RunError
    from autoprune.tasks.names import split_names

    names = split_names(text)
    if not names:
        raise RunError(f"--models {text!r}: empty; write names separated by commas.")
    return names


def _listed(flag: str, text: str) -> list[str]:
    from autoprune.core.errors import RunError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise RunError(f"{flag} {text!r}: empty; write names separated by commas.")
    return list(dict.fromkeys(parts))


def _size(text: str) -> int:
    from autoprune.core.errors import RunError

    if not text.isdecimal() or int(text) < 1:
        raise RunError(f"--batches: {text!r} is no batch size; write whole numbers from 1, such as 1,32,128.")
    return int(text)


def _run_table(run: str, runs_dir: Path) -> Path:
    from autoprune.core.rundir import RunDir

    return RunDir.named(runs_dir, run).table


def _check_place(path: Path, out: Path | None, *, resume: bool) -> None:
    from autoprune.core.errors import RunError

    if path.exists() and not resume:
        raise RunError(f"{path} exists; --resume keeps its rows and measures what is absent, or give another --out.")
    if out is not None and path.parent != out and not os.access(out.parent, os.W_OK):
        raise RunError(f"--out {out}: {out.parent} is no folder that can be written; make it, or give another --out.")


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


def _print_summary(path: Path, table: LatencyTable) -> None:
    from autoprune.lut.left_out import left_out
    from autoprune.report.tables import summary

    print(f"{path}: {summary(table)}")
    for line in left_out(table):
        print(f"  {line}")


def _print_table(table: LatencyTable) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from autoprune.cli.table import make_console
    from autoprune.lut.left_out import left_out
    from autoprune.report.summary import significant
    from autoprune.report.tables import summary

    console = make_console()
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "choice", "kernel"):
        shown.add_column(column, no_wrap=True)
    for column in ("p10 µs", "p50 µs", "p90 µs", "× dense", "model µs", "floor µs", "bytes"):
        shown.add_column(column, justify="right", no_wrap=True)
    for (signature, choice), row in sorted(table.rows.items(), key=_slowest_first):
        dense = table.rows.get((signature, "dense"))
        ratio = f"{row.p50 / dense.p50:.2f}" if dense is not None else "–"
        times = [significant(value) for value in (row.p10, row.p50, row.p90)]
        limits = ["–" if value is None else significant(value) for value in (row.model_us, row.floor_us)]
        kernel = f"{row.kernel} {row.config}".strip()
        cells = (signature, choice, kernel, *times, ratio, *limits, str(row.weight_bytes))
        shown.add_row(*map(escape, cells))
    console.print(shown)
    facts = table.context.model_dump()
    for name, value in {**dict(facts.pop("versions")), **facts}.items():
        console.print(f"{name:<12}{value}", markup=False)
    for line in left_out(table):
        console.print(line, markup=False)
    console.print(f"{'calibration':<12}{summary(table)}", markup=False)
