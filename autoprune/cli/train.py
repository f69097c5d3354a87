"""``autoprune train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from autoprune.trainers.run import TrainRequest, TrainResult

# Any number: how many steps an epoch has is known once the data is read.
_MANY_STEPS = 10**6


def train(
    policy: Annotated[Path | None, typer.Option(help="Policy file.", show_default="dense training")] = None,
    trainer: Annotated[str, typer.Option(help="How the policy is reached: clicktrain or campfire.")] = "clicktrain",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the trainer, such as lasso=1e-3; repeatable."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 12,
    init: Annotated[
        Path | None, typer.Option(help="Weights to start from (safetensors).", show_default="random ones")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Network to train, by name.", show_default="the policy's, or resnet20")
    ] = None,
    data: options.Data = "fashion-mnist",
    data_dir: options.DataDir = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Train on the 8,000 images inside the package, not on the full data set.")
    ] = False,
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    no_dense_control: Annotated[
        bool, typer.Option("--no-dense-control", help="Leave out the dense training to compare with.")
    ] = False,
    run: options.Run = None,
    runs_dir: options.RunsDir = Path("runs"),
    fresh: options.Fresh = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train a network under a policy, beside a dense control of the same recipe, and time what comes out."""
    from autoprune.cli.progress import working
    from autoprune.core.policy import Policy
    from autoprune.core.rundir import RunDir, run_name
    from autoprune.core.undo import undone_when_refused
    from autoprune.trainers.recipe import Recipe, native_precision
    from autoprune.trainers.run import TrainRequest, train_policy

    record = None if policy is None else Policy.load(policy)
    request = TrainRequest(
        model=model or (record.file.model if record is not None else "resnet20"),
        data=data,
        policy=record,
        trainer=trainer,
        settings=_settings(trainer, settings or [], policy, epochs),
        recipe=Recipe(epochs=epochs, precision=native_precision()),
        seed=seed,
        init=init,
        data_dir=data_dir,
        embedded=embedded,
        control=not no_dense_control,
        batch=batch,
        threads=threads,
    )
    name = run or run_name(*_origin(policy, request), f"e{epochs}", f"s{seed}")
    with undone_when_refused(runs_dir, name), working() as progress:
        folder = RunDir.open(runs_dir, name, request.config(), fresh=fresh)
        result = train_policy(request, folder, progress)
    if as_json:
        from autoprune.cli.record import print_record

        paths = {"weights": folder.weights, "metrics": folder.metrics}
        print_record({**result.model_dump(), "run": name, "paths": paths})
        return
    _show(result)
    print(f"  {'weights':<8}{folder.weights}\n  {'metrics':<8}{folder.metrics}")


def _origin(policy: Path | None, request: TrainRequest) -> tuple[str, str]:
    """Say in a run's name what is trained: the search run or the file a policy comes from, and the trainer."""
    if policy is None:
        return request.model, "dense"
    return policy.resolve().parent.name if policy.name == "policy.json" else policy.stem, request.trainer


def _settings(trainer: str, texts: list[str], policy: Path | None, epochs: int) -> dict[str, object]:
    from autoprune.trainers.method import METHODS, Clock, parse_settings
    from autoprune.trainers.schedule import TrainerError

    if texts and policy is None:
        raise TrainerError(f"--set {texts[0]}: dense training has no such settings; give a --policy.")
    settings = parse_settings(trainer, texts)
    # Without layers a method only checks its settings: a wrong one is refused before anything heavy starts.
    METHODS.get(trainer)([], Clock(_MANY_STEPS, epochs), settings)
    return settings


def _show(result: TrainResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from autoprune.cli.table import make_console
    from autoprune.report.summary import NONE, percent, seconds_text, time_text

    console = make_console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for column in ("validation", "test", "sparsity", "MACs saved", "latency", "training time"):
        table.add_column(column, justify="right", no_wrap=True)
    timed, savings, seconds = result.deployment, result.savings, result.seconds
    table.add_row(
        result.trainer,
        percent(result.accuracy.validation, 2),
        percent(result.accuracy.test, 2),
        percent(savings.prunable_sparsity) if savings is not None else NONE,
        percent(savings.inference_macs_saved) if savings is not None else NONE,
        time_text(timed.latency_us if timed is not None else None),
        seconds_text(seconds["train"]),
        style="bold",
    )
    fastest = timed.references[timed.fastest_reference] if timed is not None else None
    if result.dense is not None:
        accuracy = (percent(result.dense.validation, 2), percent(result.dense.test, 2))
        table.add_row("dense", *accuracy, NONE, NONE, time_text(fastest), seconds_text(seconds["dense control"]))
    console.print(table)
    if result.delta is not None:
        console.print(f"pruned − dense: {100.0 * result.delta:+.2f} points of validation accuracy", markup=False)
    if timed is not None:
        text = f"deployed: {timed.ratio:.2f} × the fastest dense execution ({timed.fastest_reference})"
        console.print(text, markup=False)
