"""Our policy against Torch-Pruning at the same measured latency: same network, data and two-epoch fine-tune.

    python benchmarks/peer.py [--budgets 50 25] [--evaluations 100] [--seconds 1.0]

Torch-Pruning removes channels; its networks run through the fastest dense execution found, our dense plan or
onnxruntime. Its pruning ratio is chosen by bisection, with the latency measured, so that the network just meets the
budget; of several channel roundings the one that keeps most MACs there is taken. That favours the peer, as does the
epoch of regularised training that the group-norm pruner gets on top. Accuracy after the same fine-tune is compared at
latencies measured in one interleaved run; the peer that counts is the best on validation data.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from common import RESULTS, row
from torch import nn

from autoprune.core.policy import Policy
from autoprune.core.progress import Silent
from autoprune.core.rundir import RunDir
from autoprune.envs.network import side_by_side
from autoprune.kernels.convert import convert
from autoprune.kernels.dense import dense_references, runners
from autoprune.lut.bench import append_rows
from autoprune.lut.measure import interleaved_us
from autoprune.search.config import SearchConfig
from autoprune.search.pipeline import run_search
from autoprune.tasks.metrics import accuracy
from autoprune.tasks.task import Task, load_task
from autoprune.tasks.weights import load_weights
from autoprune.trainers.finetune import FinetuneRecipe, Teacher, finetune
from autoprune.trainers.recipe import Recipe, make_optimizer

METHODS = ("magnitude", "taylor", "group-norm")
SCOPES = ("uniform", "global")
_FORMS = ("plan", "onnxruntime")
_ROUNDINGS = (1, 8, 16)
_BISECTIONS = 6
_GRADIENT_IMAGES = 512
_MOST = 0.95


@dataclass(frozen=True, slots=True)
class Entry:
    """One network of the comparison.

    Attributes:
        name: Method and scope, or ``autoprune``.
        budget: In percent of the fastest dense execution.
        model: Fine-tuned.
        run: Runs the fastest form once.
        form: Its name.
        compression: Dense parameters over the network's that are not zero.
    """

    name: str
    budget: int
    model: nn.Module
    run: Callable[[], object]
    form: str
    compression: float


class Peer:
    """Torch-Pruning's pruners on one task.

    Args:
        task: Dense network and data; not modified.
        threads: Of the deployed networks.
        seconds: Of one latency measurement.
    """

    def __init__(self, task: Task, threads: int, seconds: float) -> None:
        self.task, self.threads, self.seconds = task, threads, seconds
        runs = runners(dense_references(task.model, task.example, threads, compile=False))
        samples = interleaved_us(runs, 4 * seconds, threads)
        self.dense_name = min(samples, key=lambda name: float(np.median(samples[name])))
        self.dense_run = runs[self.dense_name]
        self._sources: dict[str, nn.Module] = {}

    def pruned(self, method: str, scope: str, ratio: float, rounding: int) -> nn.Module:
        """Return a physically smaller network."""
        model = copy.deepcopy(self._source(method)).requires_grad_(True)
        importance: object
        if method == "taylor":
            importance = tp.importance.GroupTaylorImportance()
            self._gradients(model)
        else:
            importance = tp.importance.GroupMagnitudeImportance(p=2)
        make = tp.pruner.GroupNormPruner if method == "group-norm" else tp.pruner.BasePruner
        pruner = make(
            model,
            self.task.example,
            importance,
            global_pruning=scope == "global",
            pruning_ratio=ratio,
            max_pruning_ratio=_MOST,
            round_to=rounding,
            ignored_layers=[module for module in model.modules() if isinstance(module, nn.Linear)],
        )
        pruner.step()
        model.zero_grad(set_to_none=True)
        return model.eval()

    def _source(self, method: str) -> nn.Module:
        if method != "group-norm":
            return self.task.model
        if method not in self._sources:
            self._sources[method] = self._regularised()
        return self._sources[method]

    def _regularised(self) -> nn.Module:
        """Return the network after an epoch with the group-norm pruner's regulariser."""
        model, data = copy.deepcopy(self.task.model).requires_grad_(True), self.task.data
        ignored = [module for module in model.modules() if isinstance(module, nn.Linear)]
        pruner = tp.pruner.GroupNormPruner(
            model, self.task.example, tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
            ignored_layers=ignored,
        )  # fmt: skip
        recipe = FinetuneRecipe()
        optimizer = make_optimizer(model, Recipe(batch_size=recipe.batch_size, peak_lr=recipe.peak_lr / 2))
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        model.train()
        pruner.update_regularizer()
        for index in torch.split(order, recipe.batch_size):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = model(data.normalize(data.train.images[index])).float()
            nn.functional.cross_entropy(logits, data.train.labels[index]).backward()
            pruner.regularize(model)
            optimizer.step()
        return model.eval()

    def _gradients(self, model: nn.Module) -> None:
        part = self.task.data.train.take(_GRADIENT_IMAGES)
        for images, labels in zip(torch.split(part.images, 128), torch.split(part.labels, 128), strict=True):
            nn.functional.cross_entropy(model(self.task.data.normalize(images)), labels).backward()

    def at_budget(self, method: str, scope: str, percent: int) -> nn.Module | None:
        """Return the network that just meets a budget in our dense plan: of all roundings, the one with most MACs."""
        found: list[tuple[float, nn.Module]] = []
        for rounding in _ROUNDINGS:
            model = self._bisect(functools.partial(self.pruned, method, scope, rounding=rounding), percent / 100.0)
            if model is not None:
                found.append((tp.utils.count_ops_and_params(model, self.task.example)[0], model))
        return max(found, key=lambda item: item[0])[1] if found else None

    def _bisect(self, prune: Callable[[float], nn.Module], budget: float) -> nn.Module | None:
        low, high, best = 0.0, _MOST, None
        for _ in range(_BISECTIONS):
            ratio = (low + high) / 2
            model = prune(ratio)
            if self._latency_ratio(model) <= budget:
                best, high = model, ratio
            else:
                low = ratio
        return best

    def _latency_ratio(self, model: nn.Module) -> float:
        plan = convert(model, {}, self.task.example, threads=self.threads)
        cases = {"dense": self.dense_run, "pruned": lambda: plan(self.task.example)}
        with torch.inference_mode():
            samples = interleaved_us(cases, self.seconds / 2, self.threads)
        return float(np.median(samples["pruned"]) / np.median(samples["dense"]))

    def fastest(self, model: nn.Module) -> tuple[str, Callable[[], object]]:
        """Return the faster of our dense plan and onnxruntime for a network, and a call that runs it."""
        runs = runners(dense_references(model, self.task.example, self.threads, only=_FORMS))
        samples = interleaved_us(runs, self.seconds, self.threads)
        best = min(samples, key=lambda name: float(np.median(samples[name])))
        return best, runs[best]


def peers(peer: Peer, budgets: list[int], methods: list[str], scopes: list[str]) -> list[Entry]:
    """Return every peer at every budget, fine-tuned."""
    keys = list(itertools.product(budgets, methods, scopes))
    pruned = {key: peer.at_budget(key[1], key[2], key[0]) for key in keys}
    models = {key: model for key, model in pruned.items() if model is not None}
    for budget, method, scope in [key for key in keys if key not in models]:
        print(f"latency={budget}% {method} {scope}: not reached at a pruning ratio of {_MOST}", flush=True)

    teacher = Teacher(peer.task.model)

    def tune(model: nn.Module) -> None:
        finetune(model.requires_grad_(True), teacher, {}, peer.task.data, FinetuneRecipe(), seed=0)

    with side_by_side() as pool:
        list(pool.map(tune, models.values()))
    entries = []
    for (budget, method, scope), model in models.items():
        form, run = peer.fastest(model.requires_grad_(False))
        entries.append(Entry(f"{method} {scope}", budget, model, run, form, _compression(peer.task.model, model)))
    return entries


def ours(task: Task, options: argparse.Namespace, budget: int) -> Entry:
    """Return our policy's network at a budget: searched, or taken from its finished run."""
    config = SearchConfig(
        budget=f"latency={budget}%", evaluations=options.evaluations, threads=options.threads,
        space=options.space, run=f"peer-{budget}-{options.evaluations}", runs_dir=options.runs_dir,
    )  # fmt: skip
    run_search(config, Silent())
    run = RunDir(config.runs_dir / config.name)
    model = copy.deepcopy(task.model)
    load_weights(model, run.weights)
    network = convert(model, Policy.load(run.policy), task.example, threads=options.threads)
    compression = _compression(task.model, model)
    return Entry("autoprune", budget, model, lambda: network(task.example), "sparse plan", compression)


def _compression(dense: nn.Module, model: nn.Module) -> float:
    count = [sum(int(torch.count_nonzero(p)) for p in network.parameters()) for network in (dense, model)]
    return count[0] / max(1, count[1])


def main() -> None:
    """Compare at every budget; append the rows and say who is ahead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 25])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one latency measurement")
    parser.add_argument("--images", type=int, help="training images of the peers; all by default")
    parser.add_argument("--space", default="cpu-default")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args()
    task = load_task("resnet20", "fashion-mnist")
    if options.images:
        task = replace(task, data=replace(task.data, train=task.data.train.take(options.images)))
    own = [ours(task, options, budget) for budget in options.budgets]
    peer = Peer(task, options.threads, options.seconds)
    entries = [*own, *peers(peer, options.budgets, options.methods, options.scopes)]
    cases = {f"{entry.name} {entry.budget}": entry.run for entry in entries}
    cases["dense"] = peer.dense_run
    with torch.inference_mode():
        samples = interleaved_us(cases, options.seconds * len(cases), options.threads)
    rows = []
    for budget in options.budgets:
        at = [entry for entry in entries if entry.budget == budget]
        scored = [(entry, *_scores(task, entry)) for entry in at]
        for entry, validation, test in scored:
            case = f"resnet20 fashion-mnist latency={budget}%"
            latency = list(samples[f"{entry.name} {budget}"] / float(np.median(samples["dense"])))
            for metric, values in (("latency over fastest dense", latency), ("validation accuracy", [validation]),
                                   ("test accuracy", [test])):
                rows.append(row(case, f"{entry.name} ({entry.form})", metric, values, baseline=0.0,
                                compression=entry.compression, threads=options.threads))
            print(f"latency={budget}% {entry.name:20s} {entry.form:12s} measured {np.median(latency):.3f} of "
                  f"{peer.dense_name}, validation {validation:.4f}, test {test:.4f}", flush=True)
        best = max((line for line in scored if line[0].name != "autoprune"), key=lambda line: line[1], default=None)
        mine = next(line for line in scored if line[0].name == "autoprune")
        if best is not None:
            ahead = "autoprune is ahead" if mine[2] > best[2] else "the peer is ahead" if mine[2] < best[2] else "equal"
            print(f"latency={budget}%: {ahead}: test {mine[2]:.4f} against {best[2]:.4f} of the best peer, "
                  f"{best[0].name}", flush=True)
    if not options.dry:
        append_rows(RESULTS / "peer.csv", rows)


def _scores(task: Task, entry: Entry) -> tuple[float, float]:
    """Return accuracy on validation and test data."""
    splits = (task.data.validation, task.data.test)
    return tuple(accuracy(entry.model, task.data.normalize(s.images), s.labels) for s in splits)  # type: ignore[return-value]


if __name__ == "__main__":
    main()
