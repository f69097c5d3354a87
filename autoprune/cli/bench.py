"""``autoprune bench``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options
from autoprune.cli.subject import Subject, subject_of

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from autoprune.core.policy import Policy
    from autoprune.lut.bench import BenchResult
    from autoprune.tasks.task import Task


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is timed: a policy's file (None: ``--uniform``), weights (None: the model's own), settings, and where."""

    policy: Path | None
    weights: Path | None
    data: str
    batch: int
    threads: int
    device: str = "cpu"
    table: Path | None = None


def bench(
    policy: Annotated[
        Path | None, typer.Option(help="Policy file; this, --run or --uniform.", show_default=False)
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Take policy and weights of this run.", show_default=False)
    ] = None,
    uniform: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHOICE",
            help="Instead of a policy: one choice for every layer of --model that can take it, first convolution and "
            "classifier dense; random weights. Repeatable: each layer takes the first that fits.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"With --uniform, the network: {options.MODEL_HELP}, @CxHxW behind it.")
    ] = None,
    model_args: options.ModelArgs = None,
    weights: options.TakenWeights = None,
    data: options.TakenData = None,
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
    device: options.Device = "cpu",
    table: Annotated[
        Path | None,
        typer.Option(help="Table of this GPU: its rows say which kernel runs a layer. With --device cuda."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure on a CPU, building not counted.")] = 10.0,
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time a policy's deployed network against every dense execution, interleaved in one process."""
    from autoprune.cli.progress import working
    from autoprune.core.errors import DeviceError
    from autoprune.lut.bench import append_rows
    from autoprune.lut.device import check_device

    check_device(device)
    if table is not None and device == "cpu":
        raise DeviceError("--table: on a CPU the kernel of each choice is fixed; give it with --device cuda.")
    model = options.named(model, model_args)
    if uniform:
        _check_uniform(policy, run, weights, model)
    subject = _Subject(None, None, "fashion-mnist", 1, 1) if uniform else _of(subject_of(policy, run, runs_dir))
    subject = replace(
        subject,
        weights=weights or subject.weights,
        data=options.prepared_data(data or subject.data, transform),
        batch=batch or subject.batch,
        threads=threads or subject.threads,
        device=device,
        table=table,
    )
    if uniform:
        assert model is not None
        network, images, record = _untrained(model, uniform, subject, data_dir, seed)
    else:
        network, images, record = _trained(subject, data_dir, seed)
    if csv is not None:
        append_rows(csv, [])  # a file that cannot take the figures is told of before they are measured
    with working() as progress:
        progress.stage("measure")
        result = _measure(subject, network, record, images, seconds)
    if csv is not None:
        _append(csv, result, record, "random" if uniform else subject.data)
    if as_json:
        _print_record(subject, record, result, seed)
        return
    _show(result)
    if csv is not None:
        print(csv)


def _measure(subject: _Subject, model: nn.Module, policy: Policy, images: Tensor, seconds: float) -> BenchResult:
    if subject.device == "cpu":
        from autoprune.lut.bench import bench as on_cpu

        return on_cpu(model, policy, images, subject.threads, seconds)
    from autoprune.lut.gpu_bench import bench_on_gpu
    from autoprune.lut.table import LatencyTable

    return bench_on_gpu(model, policy, images, None if subject.table is None else LatencyTable.load(subject.table))


def _of(subject: Subject) -> _Subject:
    return _Subject(subject.policy, subject.weights, subject.data, subject.batch, subject.threads)


def _check_uniform(policy: Path | None, run: str | None, weights: Path | None, model: str | None) -> None:
    from autoprune.core.errors import RunError

    others = {"--policy": policy, "--run": run, "--weights": weights}
    given = [flag for flag, value in others.items() if value is not None]
    if given:
        raise RunError(f"--uniform and {given[0]}: got both; the network of --uniform has random weights.")
    if model is None:
        raise RunError("--uniform: of no network; give --model too.")


def _untrained(
    model: str, uniform: list[str], subject: _Subject, data_dir: Path | None, seed: int
) -> tuple[nn.Module, Tensor, Policy]:
    """Return a network with random weights, random images for it, and its uniform policy."""
    import torch

    from autoprune.search_spaces.trace import trace
    from autoprune.search_spaces.uniform import uniform_policy
    from autoprune.tasks.networks import untrained

    network, example = untrained(model, subject.data, seed, data_dir)
    record = uniform_policy(trace(network, example), uniform, model=model)
    generator = torch.Generator().manual_seed(seed)
    return network, torch.randn(subject.batch, *example.shape[1:], generator=generator), record


def _trained(subject: _Subject, data_dir: Path | None, seed: int) -> tuple[nn.Module, Tensor, Policy]:
    """Return a policy, the network that it is for, and images of its data."""
    from autoprune.core.policy import Policy
    from autoprune.search_spaces.trace import trace
    from autoprune.tasks.task import load_task

    assert subject.policy is not None
    record = Policy.load(subject.policy)
    task = load_task(record.file.model, subject.data, data_dir=data_dir, weights=subject.weights)
    record.check_model(trace(task.model, task.example))
    return task.model, _images(task, subject.batch, seed), record


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


def _print_record(subject: _Subject, policy: Policy, result: BenchResult, seed: int) -> None:
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
            "context": result.context or current_context(result.batch, result.threads),
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
    where = f"{result.threads} threads" if result.context is None else result.context.place
    console.print(f"batch {result.batch}, {where}, {kept}", markup=False)


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
