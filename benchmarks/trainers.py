"""What pruning during training costs and keeps, against dense training by the same recipe, seed by seed.

    python benchmarks/trainers.py [--case clicktrain campfire trade] [--epochs 16] [--seeds 3] [--embedded]

clicktrain: 2.25, 4.5, 8.6 and 10.7 times fewer convolution weights, per-kernel patterns and patterns shared by 16
filters. campfire: window, CK and combined at 40 to 80 %, the era early, in the middle and late, ten more epochs in a
hundred after a further drop, FGSM at 60 %. trade: ClickTrain against train → prune → fine-tune and train → ADMM →
retrain, in accuracy, epochs and seconds.

Every training is a run of its own below --runs-dir and goes on from its last epoch after a kill; a row that is already
in the results is not made again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, row

from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.core.rundir import RunDir
from autoprune.lut.bench import BenchRow, append_rows
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.tasks.attack import attacked_accuracy
from autoprune.tasks.data import DataSet, load_data
from autoprune.tasks.models import build_model
from autoprune.tasks.weights import load_weights
from autoprune.trainers.campfire import window_entries
from autoprune.trainers.recipe import Precision, Recipe, native_precision
from autoprune.trainers.result import TrainResult
from autoprune.trainers.run import TrainRequest, train_policy

CASES = ("clicktrain", "campfire", "trade")
EPSILONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of a study: what is trained, and how.

    Attributes:
        study: Part of the row's case.
        name: The row's choice.
        texts: Choices of the uniform policy; none trains dense.
        trainer, settings: The method.
        recipe: How.
        dense_recipe: Of the dense training that it is compared with.
        attack: Whether FGSM is measured too.
    """

    study: str
    name: str
    texts: tuple[str, ...]
    trainer: str
    recipe: Recipe
    dense_recipe: Recipe
    settings: Mapping[str, object] = field(default_factory=dict)
    attack: bool = False


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and on what the studies run."""

    model: str
    data: DataSet
    layers: tuple[LayerSpec, ...]
    options: argparse.Namespace

    def train(self, cell: Cell, seed: int, *, dense: bool = False) -> tuple[TrainResult, RunDir]:
        """Train one network, or take up what is trained already."""
        policy: Policy | None = None
        if not dense:
            policy = uniform_policy(self.layers, cell.texts, model=self.model)
        request = TrainRequest(
            self.model, policy=policy, trainer=cell.trainer, settings=cell.settings if policy else {},
            recipe=cell.dense_recipe if dense else cell.recipe, seed=seed, data_dir=self.options.data_dir,
            embedded=self.options.embedded, control=False, bench_seconds=0, device=self.options.device,
        )  # fmt: skip
        folder = RunDir.open(self.options.runs_dir, run_key(request), request.config())
        if folder.training.exists():
            return TrainResult.model_validate_json(folder.training.read_text(encoding="utf-8")), folder
        return train_policy(request, folder), folder

    def attacked(self, folder: RunDir) -> dict[float, float]:
        """Return the accuracy of a run's weights under FGSM, by strength."""
        network = build_model(self.model, self.data.test.images.shape[1], self.data.classes)
        load_weights(network, folder.weights)
        part = self.data.test if self.options.images is None else self.data.test.take(self.options.images)
        return attacked_accuracy(network.to(self.options.device), part, self.data, EPSILONS)


def run_key(request: TrainRequest) -> str:
    """Return a run's name that is the same for the same training only."""
    text = json.dumps(request.config(), sort_keys=True)
    kind = "dense" if request.policy is None else request.trainer
    return f"bench-{kind}-e{request.recipe.epochs}-s{request.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def kernels_for(layers: Sequence[LayerSpec], ratio: float, entries: int = 4) -> float:
    """Return the share of kernels to keep for ``ratio`` times fewer convolution weights; the first layer is dense.

    At most 1: 2.25 is what patterns of 4 alone give where every convolution is 3×3 and pruned.
    """
    convs = [layer for layer in layers if layer.op == "conv"]
    rest = [layer for layer in convs[1:] if layer.groups == 1]
    scale = sum(layer.weights * (entries / 9 if layer.window == (3, 3) else 1.0) for layer in rest)
    fixed = sum(layer.weights for layer in convs) - sum(layer.weights for layer in rest)
    kept = sum(layer.weights for layer in convs) / ratio - fixed
    return round(min(1.0, max(0.01, kept / scale)), 4)


def clicktrain_cells(bench: Bench, recipe: Recipe) -> Iterator[Cell]:
    """Study 1: patterns by compression and share."""
    for ratio in (2.25, 4.5, 8.6, 10.7):
        kernels = kernels_for(bench.layers, ratio)
        for share in ("1x1", "16x1"):
            texts = [f"pattern(count=8,entries=4,kernels={kernels},share={share})"]
            texts += [f"fine(keep={kernels})"] if kernels < 1.0 else []
            yield Cell("clicktrain", f"{ratio}x share {share}", tuple(texts), "clicktrain", recipe, recipe)


def campfire_cells(bench: Bench, recipe: Recipe) -> Iterator[Cell]:
    """Study 2: schemes by sparsity, the era's start, ten more epochs in a hundred; FGSM at 60 %."""
    for percent in (40, 60, 70, 80):
        keep = round(1.0 - percent / 100, 2)
        schemes = {
            "window": f"window(entries={window_entries(percent / 100)})",
            "ck": f"ck(keep={keep})",
            "combined": f"combined(keep={keep})",
        }
        for name, text in schemes.items():
            texts = (text, f"fine(keep={keep})")
            yield Cell(
                "campfire", f"{name} {percent}%", texts, "campfire", recipe, recipe,
                attack=percent == 60,
            )  # fmt: skip
    texts = ("ck(keep=0.4)", "fine(keep=0.4)")
    length = max(1, round(0.3 * recipe.epochs))
    for name, share in (("early", 0.0), ("middle", 0.3), ("late", 0.5)):
        settings = {"era_start": int(share * recipe.epochs), "era_length": length}
        yield Cell("campfire era", f"ck 60% {name}", texts, "campfire", recipe, recipe, settings)
    drops = tuple(round(recipe.epochs * part / 9) for part in (3, 6))
    short = replace(recipe, schedule="steps", drops=drops, peak_lr=0.1)
    more = max(1, round(recipe.epochs / 9))
    long = replace(short, epochs=recipe.epochs + more, drops=(*drops, recipe.epochs))
    settings = {"era_start": drops[0], "era_length": max(1, min(length, recipe.epochs - 1 - drops[0]))}
    for name, chosen in (("without", short), (f"with {more}", long)):
        yield Cell("campfire more epochs", f"ck 60% {name}", texts, "campfire", chosen, chosen, settings)


def trade_cells(bench: Bench, recipe: Recipe) -> Iterator[Cell]:
    """Study 3: what pruning afterwards costs for the accuracy of pruning meanwhile, at 8.6 times."""
    kernels = kernels_for(bench.layers, 8.6)
    texts = (f"pattern(count=8,entries=4,kernels={kernels},share=1x1)", f"fine(keep={kernels})")
    yield Cell("trade", "clicktrain", texts, "clicktrain", recipe, recipe)
    epochs = recipe.epochs
    for part in (0.25, 0.5, 1.0, 1.3):
        tuned = max(1, round(part * epochs))
        settings = {"prune_epoch": epochs}
        name = f"train, prune, fine-tune {part:g}E"
        yield Cell("trade", name, texts, "magnitude", replace(recipe, epochs=epochs + tuned), recipe, settings)
    half = max(1, epochs // 2)
    settings = {"warmup_epochs": epochs, "hard_epoch": epochs + half}
    chosen = replace(recipe, epochs=epochs + 2 * half)
    yield Cell("trade", "train, ADMM 0.5E, retrain 0.5E", texts, "admm", chosen, recipe, settings)


def case_of(bench: Bench, cell: Cell) -> str:
    """Return the text of a row's case: study, network, data, epochs of the dense training, seeds, device."""
    options = bench.options
    part = "8,000 images" if options.embedded else "full"
    where = " on cuda" if options.device == "cuda" else ""
    return (
        f"{cell.study}: {bench.model} fashion-mnist {part}, {cell.dense_recipe.epochs} epochs, "
        f"{options.seeds} seeds{where}"
    )


def measure(bench: Bench, cell: Cell) -> list[BenchRow]:
    """Train a cell and its dense control for every seed and return its rows."""
    options, case = bench.options, case_of(bench, cell)
    pruned = [bench.train(cell, seed) for seed in range(options.seeds)]
    dense = [bench.train(cell, seed, dense=True) for seed in range(options.seeds)]
    first = pruned[0][0].savings
    assert first is not None
    deltas = [100 * (a.accuracy.test - b.accuracy.test) for (a, _), (b, _) in zip(pruned, dense, strict=True)]

    def made(metric: str, samples: list[float], baseline: float = 0.0, unit: str = "fraction") -> BenchRow:
        found = row(
            case, cell.name, metric, samples, baseline=baseline, compression=first.conv_compression, unit=unit,
            batch=cell.recipe.batch_size, threads=torch.get_num_threads(),
        )  # fmt: skip
        if options.device == "cuda":
            found = replace(found, device=torch.cuda.get_device_name())
        return replace(found, dtype=cell.recipe.precision)

    rows = []
    for metric in ("test", "validation", "best_validation"):
        name = "test accuracy" if metric == "test" else f"{metric.replace('_', ' ')} accuracy"
        base = float(np.median([getattr(result.accuracy, metric) for result, _ in dense]))
        rows.append(made(name, [getattr(result.accuracy, metric) for result, _ in pruned], base))
    rows.append(made("delta test accuracy", deltas, unit="points"))
    rows.append(made("delta test accuracy, mean", [float(np.mean(deltas))], unit="points"))
    spread = float(np.std(deltas, ddof=1)) if len(deltas) > 1 else 0.0
    rows.append(made("delta test accuracy, standard deviation", [spread], unit="points"))
    rows.append(made("all-parameter compression", [first.all_compression], unit="x"))
    rows.append(made("true sparsity of pruned layers", [first.prunable_sparsity]))
    for metric in ("inference_macs_saved", "training_macs_saved"):
        rows.append(made(metric.replace("_", " ").replace("macs", "MACs") + ", counted", [getattr(first, metric)]))
    seconds = [result.seconds["train"] for result, _ in pruned]
    base = float(np.median([result.seconds["train"] for result, _ in dense]))
    rows.append(made("training time, measured", seconds, base, "s"))
    rows.append(made("epochs", [float(cell.recipe.epochs)], float(cell.dense_recipe.epochs), "epochs"))
    if cell.attack:
        attacked = [bench.attacked(folder) for _, folder in pruned]
        clean = [bench.attacked(folder) for _, folder in dense]
        for epsilon in EPSILONS:
            base = float(np.median([found[epsilon] for found in clean]))
            rows.append(made(f"test accuracy under FGSM {epsilon:g}", [found[epsilon] for found in attacked], base))
    return rows


def known(path: Path) -> set[tuple[str, str]]:
    """Return case and choice of the rows that are there already."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {(line["case"], line["choice"]) for line in csv.DictReader(file)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the studies cell by cell; rows are written as soon as a cell is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--embedded", action="store_true", help="train on the images inside the package")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, help="test images that are attacked (default: all)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS / "trainers.csv")
    options = parser.parse_args(arguments)
    data = load_data("fashion-mnist", options.data_dir, full=not options.embedded)
    network = build_model(options.model, data.test.images.shape[1], data.classes)
    layers = trace(network, data.normalize(data.test.images[:1]))
    bench = Bench(options.model, data, layers, options)
    precision: Precision = "bf16" if options.device == "cuda" else native_precision()
    recipe = Recipe(epochs=options.epochs, precision=precision)
    makers = {"clicktrain": clicktrain_cells, "campfire": campfire_cells, "trade": trade_cells}
    for name in options.case:
        for cell in makers[name](bench, recipe):
            if options.only not in cell.name or (case_of(bench, cell), cell.name) in known(options.results):
                continue
            rows = measure(bench, cell)
            append_rows(options.results, rows)
            found = {line.metric: line.p50 for line in rows}
            print(
                f"{cell.study}: {cell.name}: test {found['test accuracy']:.4f} "
                f"({found['delta test accuracy, mean']:+.2f} points), {rows[0].compression:.2f}x conv weights",
                flush=True,
            )


if __name__ == "__main__":
    main()
