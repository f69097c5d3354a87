"""``autoprune bench``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options
from autoprune.cli.subject import Subject, subject_of

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from autoprune.core.policy import Policy
    from autoprune.lut.bench import BenchResult
    from autoprune.tasks.task import Task


def bench(
    policy: Annotated[Path | None, typer.Option(help="Policy file; this or --run.", show_default=False)] = None,
    run: Annotated[
        str | None, typer.Option(help="Take policy and weights of this run; this or --policy.", show_default=False)
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights trained under the policy.", show_default="the run's, or dense masked by magnitude"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set, by name.", show_default="the run's, or fashion-mnist")
    ] = None,
    data_dir: options.DataDir = None,
    transform: options.Transform = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass.", show_default="the run's, or 1")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=62, help="CPU threads.", show_default="the run's, or 1", metavar="INTEGER")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the images drawn as input.", metavar="INTEGER")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure, building not counted.")] = 10.0,
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time a policy's deployed network against every dense execution, interleaved in one process."""
    from autoprune.cli.progress import working
    from autoprune.core.policy import Policy
    from autoprune.lut.bench import append_rows
    from autoprune.lut.bench import bench as measure
    from autoprune.search_spaces.trace import trace
    from autoprune.tasks.task import load_task

    subject = subject_of(policy, run, runs_dir)
    subject = replace(
        subject,
        weights=weights or subject.weights,
        data=options.prepared_data(data or subject.data, transform),
        batch=batch or subject.batch,
        threads=threads or subject.threads,
    )
    record = Policy.load(subject.policy)
    task = load_task(record.file.model, subject.data, data_dir=data_dir, weights=subject.weights)
    record.check_model(trace(task.model, task.example))
    if csv is not None:
        append_rows(csv, [])  # a file that cannot take the figures is told of before they are measured
    with working() as progress:
        progress.stage("measure")
        result = measure(task.model, record, _images(task, subject.batch, seed), subject.threads, seconds)
    if csv is not None:
        _append(csv, result, record, task.name)
    if as_json:
        _print_record(subject, record, result, seed)
        return
    _show(result)
    if csv is not None:
        print(csv)


def _images(task: Task, batch: int, seed: int) -> Tensor:
    """Return ``batch`` validation images drawn at random, (N, C, H, W); more than there are repeat."""
    import torch

    images = task.data.validation.images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return task.data.normalize(images[order[torch.arange(batch) % len(order)]]).contiguous()


def _append(csv: Path, result: BenchResult, policy: Policy, data: str) -> None:
    from autoprune.lut.bench import Labels, append_rows, rows

    compression = 1.0 / policy.file.predicted.params_ratio
    date = datetime.now(UTC).date().isoformat()
    command = shlex.join(["autoprune", *sys.argv[1:]])
    labels = Labels(f"{policy.file.model} {data}", policy.file.budget, compression, date, command)
    append_rows(csv, rows(result, labels))


def _print_record(subject: Subject, policy: Policy, result: BenchResult, seed: int) -> None:
    from autoprune.cli.record import print_record
    from autoprune.lut.table import current_context

    print_record(
        {
            "model": policy.file.model,
            "data": subject.data,
            "budget": policy.file.budget,
            "policy": subject.policy,
            "weights": subject.weights,
            "seed": seed,
            "unit": "us",
            "deployed": result.deployed,
            "references": result.references,
            "absent_references": result.absent,
            "fastest_reference": result.best,
            "ratio": result.ratio,
            "samples": {"taken": result.taken, "dropped": result.dropped},
            "build_seconds": result.build_seconds,
            "layers": result.decisions,
            "context": current_context(result.batch, result.threads),
        }
    )


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
    _show_layers(console, result)
    for name, why in result.absent.items():
        console.print(f"{name}: {why}", markup=False)
    kept = f"{result.taken - result.dropped} of {result.taken} samples kept"
    console.print(f"batch {result.batch}, {result.threads} threads, {kept}", markup=False)


def _show_layers(console: Console, result: BenchResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "choice", "kernel", "why"):
        table.add_column(column, overflow="fold")
    for decision in result.decisions:
        if decision.choice != "dense":
            words = (decision.layer, decision.choice, decision.kernel, decision.why)
            table.add_row(*(Text(word) for word in words))
    if table.row_count:
        console.print(table)
