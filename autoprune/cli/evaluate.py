"""``autoprune evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from torch import nn

    from autoprune.tasks.data import DataSet, Split

_EPSILONS = "0.05,0.1,0.15,0.2,0.25,0.3"


def evaluate(
    run: Annotated[
        str | None, typer.Option("--run", help="Run whose weights are judged.", show_default="the dense checkpoint")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights to judge instead: safetensors, or a state dict of torch.save.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Network: {options.MODEL_HELP}.", show_default="the run's, or resnet20")
    ] = None,
    model_args: options.ModelArgs = None,
    data: options.TakenData = None,
    data_dir: options.DataDir = None,
    transform: options.Transform = None,
    split: Annotated[str, typer.Option(help="Which images: test or validation.")] = "test",
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, or agreement with the dense network, which needs no labels.", show_default="accuracy"
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Judge only the first so many images.", show_default="all")
    ] = None,
    attack: Annotated[str | None, typer.Option(help="Attack the images first: fgsm.", show_default="no attack")] = None,
    epsilon: Annotated[
        str | None,
        typer.Option(help="Strengths of the attack in pixel units of 0 to 1, by commas.", show_default=_EPSILONS),
    ] = None,
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Judge a run's weights, or the dense checkpoint, on clean and on attacked images."""
    strengths = _strengths(attack, epsilon)
    model = options.named(model, model_args)
    network, data_set, names = _subject(run, weights, model, data, data_dir, runs_dir, transform)
    from autoprune.tasks.attack import attacked_accuracy
    from autoprune.tasks.metrics import metric_of

    found_metric = metric_of(metric, data_set)
    part = _split(data_set, split)
    part = part if images is None else part.take(images)
    divergence = None
    if found_metric == "agreement":
        part, divergence = _against_dense(network, part, data_set, names, data_dir)
    found = attacked_accuracy(network, part, data_set, (0.0, *strengths))
    record = {
        **names,
        "split": split,
        "images": len(part),
        "attack": attack,
        "metric": found_metric,
        found_metric: found[0.0],
        **({} if divergence is None else {"divergence": divergence}),
        "attacked": {f"{strength:g}": found[strength] for strength in strengths},
    }
    if as_json:
        from autoprune.cli.record import print_record

        print_record(record)
        return
    from autoprune.report.summary import percent

    print(f"{names['weights']}, {len(part)} {split} images of {names['data']}\n  {'clean':<14}{percent(found[0.0], 2)}")
    if divergence is not None:
        print(f"  of the answers are the dense network's; KL divergence from it {divergence:.4g} nats")
    for strength in strengths:
        print(f"  {f'fgsm {strength:g}':<14}{percent(found[strength], 2)}")


def _strengths(attack: str | None, epsilon: str | None) -> tuple[float, ...]:
    from autoprune.core.errors import DataError
    from autoprune.core.registry import unknown_name

    if attack is None:
        if epsilon is not None:
            raise DataError(f"--epsilon {epsilon}: no attack is asked for; add --attack fgsm.")
        return ()
    if attack != "fgsm":
        raise unknown_name("attack", attack, ["fgsm"])
    values = []
    for text in (epsilon or _EPSILONS).split(","):
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0.0 < value <= 1.0:
            raise DataError(f"--epsilon '{text.strip()}': must be a number above 0 and at most 1, such as 0.1,0.2.")
        values.append(value)
    return tuple(dict.fromkeys(values))


def _split(data: DataSet, name: str) -> Split:
    from autoprune.core.registry import unknown_name

    if name not in ("test", "validation"):
        raise unknown_name("split", name, ["test", "validation"])
    return data.test if name == "test" else data.validation


def _against_dense(
    network: nn.Module, part: Split, data: DataSet, names: dict[str, object], data_dir: Path | None
) -> tuple[Split, float]:
    """Return the split with the dense network's answers as labels, and the KL divergence from it in nats."""
    from autoprune.envs.evaluator import divergence
    from autoprune.tasks.data import Split
    from autoprune.tasks.metrics import split_logits
    from autoprune.tasks.task import load_task

    dense = load_task(str(names["model"]), data.name, data_dir=data_dir).model
    wanted = split_logits(dense, part, data)
    return Split(part.images, wanted.argmax(1)), divergence(wanted, split_logits(network, part, data))


def _subject(
    run: str | None,
    weights: Path | None,
    model: str | None,
    data: str | None,
    data_dir: Path | None,
    runs_dir: Path,
    transform: list[str] | None,
) -> tuple[nn.Module, DataSet, dict[str, object]]:
    """Return the network with its weights, its data, and what they are called."""
    from autoprune.core.errors import RunError
    from autoprune.core.rundir import RunDir
    from autoprune.tasks.task import load_task

    if run is not None and weights is not None:
        raise RunError("--run and --weights: got both; give one of the two.")
    if run is not None:
        folder = RunDir.find(runs_dir, run)
        config = folder.read_json(folder.config)
        model, data = _same("--model", model, config.get("model")), _same("--data", data, config.get("data"))
        weights = folder.weights
        if not weights.exists():
            raise RunError(f"run '{run}' has no weights yet; the same command that began it finishes it.")
    data = options.prepared_data(data or "fashion-mnist", transform)
    task = load_task(model or "resnet20", data, data_dir=data_dir, weights=weights)
    what = "dense checkpoint" if weights is None else str(weights)
    return task.model, task.data, {"run": run, "weights": what, "model": task.model_name, "data": task.name}


def _same(flag: str, given: str | None, recorded: object) -> str | None:
    """Return what a run recorded, unless the user asks for something else."""
    from autoprune.core.errors import RunError

    if isinstance(recorded, str) and given is not None and given != recorded:
        raise RunError(f"{flag} {given}: the run is of '{recorded}'; leave {flag} out.")
    return recorded if isinstance(recorded, str) else given
