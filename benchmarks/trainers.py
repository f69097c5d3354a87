"""What pruning during training costs and keeps, against dense training by the same recipe, seed by seed.

    python benchmarks/trainers.py [--case clicktrain campfire trade] [--epochs 16] [--seeds 3] [--embedded]
    python benchmarks/trainers.py --case core --epochs 4 --seeds 2 --images 2000 --background

core: ClickTrain at 8.6 and 4.5 times, Campfire at 60 and 80 %, a searched policy against a uniform one of its latency
(searched: that pair alone, of any search by --searched RUN).
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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, row
from trainers_cells import CELLS, REFERENCE, Cell, searched_cells

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
from autoprune.trainers.recipe import Precision, Recipe, native_precision
from autoprune.trainers.result import TrainResult
from autoprune.trainers.run import TrainRequest, train_policy

EPSILONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


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
            policy = cell.policy or uniform_policy(self.layers, cell.texts, model=self.model)
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


def case_of(bench: Bench, cell: Cell) -> str:
    """Return the text of a row's case: study, network, data, epochs of the dense training, seeds, device."""
    options = bench.options
    part = "8,000 images" if options.embedded else "full"
    where = " on cuda" if options.device == "cuda" else ""
    return (
        f"{cell.study}: {bench.model} fashion-mnist {part}, {cell.dense_recipe.epochs} epochs, "
        f"{options.seeds} seed{'s' if options.seeds > 1 else ''}{where}"
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
    if not options.background:
        seconds = [result.seconds["train"] for result, _ in pruned]
        base = float(np.median([result.seconds["train"] for result, _ in dense]))
        rows.append(made("training time, measured", seconds, base, "s"))
    if cell.latency is not None:
        rows.append(made("latency / dense latency, by the search's table", [cell.latency]))
    rows.append(made("epochs", [float(cell.recipe.epochs)], float(cell.dense_recipe.epochs), "epochs"))
    if cell.attack:
        attacked = [bench.attacked(folder) for _, folder in pruned]
        clean = [bench.attacked(folder) for _, folder in dense]
        part = "" if options.images is None else f", {options.images} images"
        for epsilon in EPSILONS:
            base = float(np.median([found[epsilon] for found in clean]))
            name = f"test accuracy under FGSM {epsilon:g}{part}"
            rows.append(made(name, [found[epsilon] for found in attacked], base))
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
    parser.add_argument("--case", nargs="+", choices=list(CELLS), default=["clicktrain", "campfire", "trade"])
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--embedded", action="store_true", help="train on the images inside the package")
    parser.add_argument("--searched", type=Path, default=REFERENCE, help="folder of the search for --case searched")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, help="test images that are attacked (default: all)")
    parser.add_argument("--background", action="store_true", help="other work goes on meanwhile: no row of seconds")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS / "trainers.csv")
    options = parser.parse_args(arguments)
    data = load_data("fashion-mnist", options.data_dir, full=not options.embedded)
    network = build_model(options.model, data.test.images.shape[1], data.classes)
    layers = trace(network, data.normalize(data.test.images[:1]))
    bench = Bench(options.model, data, layers, options)
    precision: Precision = "bf16" if options.device == "cuda" else native_precision()
    recipe = Recipe(epochs=options.epochs, precision=precision)
    for name in options.case:
        make = partial(searched_cells, run=options.searched) if name == "searched" else CELLS[name]
        for cell in make(layers, recipe):
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
