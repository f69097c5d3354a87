"""``autoprune bench``."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from autoprune.lut.bench import BenchResult


def bench(
    policy: Annotated[Path, typer.Option(help="Policy file.")],
    weights: Annotated[
        Path | None, typer.Option(help="Weights trained under the policy.", show_default="dense, masked by magnitude")
    ] = None,
    data: options.Data = "fashion-mnist",
    data_dir: options.DataDir = None,
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure, building not counted.")] = 10.0,
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    debug: options.Debug = False,
) -> None:
    """Time a policy's deployed network against every dense execution, interleaved in one process."""
    from autoprune.core.policy import Policy
    from autoprune.lut.bench import Labels, append_rows, rows
    from autoprune.lut.bench import bench as measure
    from autoprune.search_spaces.trace import trace
    from autoprune.tasks.task import load_task

    record = Policy.load(policy)
    model = record.file.model
    task = load_task(model, data, data_dir=data_dir, weights=weights)
    record.check_model(trace(task.model, task.example))
    result = measure(task.model, record, task.example.repeat(batch, 1, 1, 1), threads, seconds)
    _show(result)
    if csv is not None:
        compression = 1.0 / record.file.predicted.params_ratio
        date = datetime.now(UTC).date().isoformat()
        command = shlex.join(["autoprune", *sys.argv[1:]])
        append_rows(csv, rows(result, Labels(f"{model} {data}", record.file.budget, compression, date, command)))
        print(csv)


def _show(result: BenchResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from autoprune.cli.table import make_console
    from autoprune.report.summary import significant

    console = make_console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("execution", no_wrap=True)
    for column in ("p20 µs", "p50 µs", "p80 µs", "× fastest dense"):
        table.add_column(column, justify="right", no_wrap=True)
    fastest = result.references[result.best].p50
    dense = sorted(result.references.items(), key=lambda item: item[1].p50)
    for name, spread in [("deployed", result.deployed), *dense]:
        times = [significant(value) for value in (spread.p20, spread.p50, spread.p80)]
        table.add_row(name, *times, f"{spread.p50 / fastest:.2f}", style="bold" if name == "deployed" else "")
    console.print(table)
    for name, why in result.absent.items():
        console.print(f"{name}: {why}", markup=False)
    kept = f"{result.taken - result.dropped} of {result.taken} samples kept"
    console.print(f"batch {result.batch}, {result.threads} threads, {kept}", markup=False)
