"""``autoprune train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from autoprune.core.policy import Policy
    from autoprune.trainers.recipe import Recipe
    from autoprune.trainers.result import Savings, TrainResult
    from autoprune.trainers.run import TrainRequest

# Any number: how many steps an epoch has is known once the data is read.
_MANY_STEPS = 10**6


def train(
    policy: Annotated[Path | None, typer.Option(help="Policy file.", show_default="dense training")] = None,
    uniform: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHOICE",
            help="Instead of a policy: one choice for every layer that can take it, such as 'fine(keep=0.2)'; first "
            "convolution and classifier stay dense. Repeatable: each layer takes the first that fits.",
        ),
    ] = None,
    trainer: Annotated[
        str | None,
        typer.Option(
            help="How the policy is reached: clicktrain, campfire, magnitude, agp, admm, lottery, slimming, "
            "prunetrain, nm, ese, set, rigl, dsr, snip, deepr, nest or ssl.",
            show_default="the recipe's, or clicktrain",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="How the network is trained: default, or a paper's recipe such as clicktrain-imagenet.")
    ] = "default",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the trainer, such as lasso=1e-3; repeatable."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes over the training data; what the recipe does at an epoch moves in proportion.",
            show_default="the recipe's; 12",
        ),
    ] = None,
    mixup: Annotated[
        float | None,
        typer.Option(min=0.0, help="Mix pairs of images by Beta(a, a); 0 for none.", show_default="the recipe's"),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init", "--weights", help="Weights to start from: safetensors, or a state dict of torch.save.",
            show_default="random ones",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"Network to train: {options.MODEL_HELP}.", show_default="the policy's, or resnet20"),
    ] = None,
    model_args: options.ModelArgs = None,
    data: options.Data = "fashion-mnist",
    data_dir: options.DataDir = None,
    transform: options.Transform = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Train on the 8,000 images inside the package, not on the full data set.")
    ] = False,
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    device: Annotated[str, typer.Option(help="Where training runs: cpu or cuda.")] = "cpu",
    dense_kernels: Annotated[
        bool,
        typer.Option(
            "--dense-kernels", help="Train on PyTorch's dense kernels even where a sparse one is measured to be faster."
        ),
    ] = False,
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
    """Train a network under a policy, beside a dense control of the same recipe, and time what comes out.

    On several GPUs or machines: torchrun --nproc-per-node 2 -m -- autoprune train …, with the same options.
    """
    from autoprune.cli.progress import working
    from autoprune.core.rundir import RunDir, run_name
    from autoprune.core.undo import undone_when_refused
    from autoprune.trainers.presets import PRESETS
    from autoprune.trainers.run import TrainRequest, follow_training, train_policy
    from autoprune.trainers.team import joined

    preset = PRESETS.get(recipe)
    model = options.named(model, model_args)
    method = trainer or preset.trainer or "clicktrain"
    length = epochs or preset.recipe.epochs
    chosen = {**preset.settings_for(method, length), **_settings(method, settings or [], bool(policy or uniform))}
    _check_settings(method, chosen, length)
    data = options.prepared_data(data, transform)
    record = _policy(policy, uniform or [], model, data)
    request = TrainRequest(
        model=model or (record.file.model if record is not None else "resnet20"),
        data=data,
        policy=record,
        trainer=method,
        settings=chosen if record is not None else {},
        recipe=_recipe(preset.recipe.lasting(length), mixup, device),
        seed=seed,
        init=init,
        data_dir=data_dir,
        embedded=embedded,
        control=not no_dense_control,
        batch=batch,
        threads=threads,
        device=device,
        sparse=not dense_kernels,
    )
    name = run or run_name(*_origin(policy, uniform or [], request), *_recipe_name(recipe), f"e{length}", f"s{seed}")
    with joined(device) as team:
        if not team.leads:
            follow_training(request, RunDir.named(runs_dir, name))
            return
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


def _origin(policy: Path | None, uniform: list[str], request: TrainRequest) -> tuple[str, ...]:
    """Say in a run's name what is trained: the search run, file or choices a policy comes from, and the trainer."""
    if request.policy is None:
        return request.model, "dense"
    if policy is None:
        kinds = (text.replace("(", "-").replace(",", "-").rstrip(")") for text in uniform)
        return request.model, *kinds, request.trainer
    return policy.resolve().parent.name if policy.name == "policy.json" else policy.stem, request.trainer


def _recipe_name(recipe: str) -> tuple[str, ...]:
    return () if recipe == "default" else (recipe,)


def _policy(policy: Path | None, uniform: list[str], model: str | None, data: str) -> Policy | None:
    from autoprune.core.errors import PolicyError
    from autoprune.core.policy import Policy
    from autoprune.trainers.run import make_uniform

    if policy is not None and uniform:
        raise PolicyError("--policy and --uniform: got both; give one of the two.")
    if uniform:
        return make_uniform(model or "resnet20", data, uniform)
    return None if policy is None else Policy.load(policy)


def _recipe(recipe: Recipe, mixup: float | None, device: str) -> Recipe:
    from dataclasses import replace

    from autoprune.trainers.recipe import native_precision

    recipe = replace(recipe, precision="bf16" if device == "cuda" else native_precision())
    return recipe if mixup is None else replace(recipe, mixup=mixup, mixup_start=0)


def _settings(trainer: str, texts: list[str], pruned: bool) -> dict[str, object]:
    from autoprune.trainers import session  # noqa: F401  registers the methods
    from autoprune.trainers.method import parse_settings
    from autoprune.trainers.schedule import TrainerError

    if texts and not pruned:
        raise TrainerError(f"--set {texts[0]}: dense training has no such settings; give a --policy.")
    return parse_settings(trainer, texts)


def _check_settings(trainer: str, settings: dict[str, object], epochs: int) -> None:
    """Refuse wrong settings before anything heavy starts: without layers a method checks nothing else."""
    from autoprune.trainers.method import METHODS, Clock

    METHODS.get(trainer)([], Clock(_MANY_STEPS, epochs), settings)


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
    if savings is not None:
        console.print(_savings_text(savings), markup=False)
    if result.delta is not None:
        console.print(f"pruned − dense: {100.0 * result.delta:+.2f} points of validation accuracy", markup=False)
    if timed is not None:
        text = f"deployed: {timed.ratio:.2f} × the fastest dense execution ({timed.fastest_reference})"
        console.print(text, markup=False)


def _savings_text(savings: Savings) -> str:
    from autoprune.report.summary import percent

    parts = [f"{savings.conv_compression:.2f}x conv weights, {savings.all_compression:.2f}x all parameters"]
    if savings.training_macs_saved is not None:
        parts.append(f"training MACs saved (counted) {percent(savings.training_macs_saved)}")
    if savings.training_time_saved is not None:
        parts.append(f"training time saved (measured) {percent(savings.training_time_saved)}")
    if savings.final_time_saved is not None:
        parts.append(f"of an epoch under final masks {percent(savings.final_time_saved)}")
    lines = ["; ".join(parts)]
    if savings.trained_on:
        sparse = sum(set(run.kernels.values()) != {"dense"} for run in savings.trained_on)
        lines.append(f"trained on sparse kernels: {sparse} of {len(savings.trained_on)} pruned layers")
        lines += [f"  {run.layer}: {run.why}" for run in savings.trained_on]
    return "\n".join(lines)
