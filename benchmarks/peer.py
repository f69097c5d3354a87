"""Our policy against Torch-Pruning at the same measured latency: same network, data and two-epoch fine-tune.

    python benchmarks/peer.py [--budgets 50 25] [--evaluations 100] [--seconds 1.0] [--train-only]

Every network is kept under ``runs/peer`` when it is trained, and not made again: ``--train-only`` ends there, and the
same command without it then only times, for a minute, on a machine that should be quiet.

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
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from common import RESULTS, row
from safetensors.torch import load_file, save_file
from torch import nn

from autoprune.core.policy import Policy
from autoprune.core.progress import Silent
from autoprune.core.rundir import RunDir
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
        run: Runs the fastest form once.
        form: Its name.
        compression: Dense parameters over the network's that are not zero.
        validation, test: Accuracy.
    """

    name: str
    budget: int
    run: Callable[[], object]
    form: str
    compression: float
    validation: float
    test: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A fine-tuned network of the peer's.

    Attributes:
        model: In eval mode.
        validation, test: Accuracy.
    """

    model: nn.Module
    validation: float
    test: float


class Peer:
    """Torch-Pruning's pruners on one task.

    Args:
        task: Dense network and data; not modified.
        threads: Of the deployed networks.
        seconds: Of one latency measurement.
        folder: Where networks are kept.
    """

    def __init__(self, task: Task, threads: int, seconds: float, folder: Path) -> None:
        self.task, self.threads, self.seconds, self.folder = task, threads, seconds, folder
        folder.mkdir(parents=True, exist_ok=True)
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
            path = self.folder / "regularised.safetensors"
            if path.exists():
                self._sources[method] = copy.deepcopy(self.task.model)
                self._sources[method].load_state_dict(load_file(path))
            else:
                self._sources[method] = self._regularised()
                _keep(self._sources[method], path)
        return self._sources[method]

    def trained(self, key: tuple[int, str, str], teacher: Teacher) -> Trained | None:
        """Return the fine-tuned network of a budget, method and scope; None where the budget is not reached."""
        budget, method, scope = key
        path = self.folder / f"{budget}-{method}-{scope}.safetensors"
        record = path.with_suffix(".json")
        if record.exists():
            facts = json.loads(record.read_text(encoding="utf-8"))
            if facts is None:
                return None
            model = self.pruned(method, scope, facts["ratio"], facts["rounding"])
            model.load_state_dict(load_file(path))
            return Trained(model.requires_grad_(False).eval(), facts["validation"], facts["test"])
        found = self.at_budget(method, scope, budget)
        facts = None
        if found is not None:
            ratio, rounding, model = found
            finetune(model.requires_grad_(True), teacher, {}, self.task.data, FinetuneRecipe(), seed=0)
            model.requires_grad_(False)
            validation, test = _scores(self.task, model)
            _keep(model, path)
            facts = {"ratio": ratio, "rounding": rounding, "validation": validation, "test": test}
        record.write_text(json.dumps(facts), encoding="utf-8")
        return self.trained(key, teacher)

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

    def at_budget(self, method: str, scope: str, percent: int) -> tuple[float, int, nn.Module] | None:
        """Return pruning ratio, rounding and network that just meet a budget in our dense plan.

        Of all roundings the one with most MACs.
        """
        found: list[tuple[float, tuple[float, int, nn.Module]]] = []
        for rounding in _ROUNDINGS:
            met = self._bisect(functools.partial(self.pruned, method, scope, rounding=rounding), percent / 100.0)
            if met is not None:
                ratio, model = met
                macs = tp.utils.count_ops_and_params(model, self.task.example)[0]
                found.append((macs, (ratio, rounding, model)))
        return max(found, key=lambda item: item[0])[1] if found else None

    def _bisect(self, prune: Callable[[float], nn.Module], budget: float) -> tuple[float, nn.Module] | None:
        low, high, best = 0.0, _MOST, None
        for _ in range(_BISECTIONS):
            ratio = (low + high) / 2
            model = prune(ratio)
            if self._latency_ratio(model) <= budget:
                best, high = (ratio, model), ratio
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


def train_peers(peer: Peer, budgets: list[int], methods: list[str], scopes: list[str]) -> dict[str, Trained]:
    """Return every peer at every budget, fine-tuned, by budget, method and scope."""
    teacher = Teacher(peer.task.model)
    found = {}
    for key in itertools.product(budgets, methods, scopes):
        trained = peer.trained(key, teacher)
        name = " ".join(str(part) for part in key)
        if trained is None:
            print(f"{name}: not reached at a pruning ratio of {_MOST}", flush=True)
        else:
            found[name] = trained
    return found


def entries_of(peer: Peer, trained: dict[str, Trained]) -> list[Entry]:
    """Return every peer in its fastest form."""
    entries = []
    for key, one in trained.items():
        form, run = peer.fastest(one.model)
        budget, _, name = key.partition(" ")
        compression = _compression(peer.task.model, one.model)
        entries.append(Entry(name, int(budget), run, form, compression, one.validation, one.test))
    return entries


def _keep(model: nn.Module, path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, path)


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
    compression, scores = _compression(task.model, model), _scores(task, model)
    return Entry("autoprune", budget, lambda: network(task.example), "sparse plan", compression, *scores)


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
    parser.add_argument("--train-only", action="store_true", help="make and keep the networks, time nothing")
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args()
    task = load_task("resnet20", "fashion-mnist")
    if options.images:
        task = replace(task, data=replace(task.data, train=task.data.train.take(options.images)))
    peer = Peer(task, options.threads, options.seconds, options.runs_dir / "peer")
    trained = train_peers(peer, options.budgets, options.methods, options.scopes)
    own = [ours(task, options, budget) for budget in options.budgets]
    if options.train_only:
        return
    entries = [*own, *entries_of(peer, trained)]
    cases = {f"{entry.name} {entry.budget}": entry.run for entry in entries}
    cases["dense"] = peer.dense_run
    with torch.inference_mode():
        samples = interleaved_us(cases, options.seconds * len(cases), options.threads)
    rows = []
    for budget in options.budgets:
        at = [entry for entry in entries if entry.budget == budget]
        for entry in at:
            case = f"resnet20 fashion-mnist latency={budget}%"
            latency = list(samples[f"{entry.name} {budget}"] / float(np.median(samples["dense"])))
            for metric, values in (("latency over fastest dense", latency), ("validation accuracy", [entry.validation]),
                                   ("test accuracy", [entry.test])):
                rows.append(row(case, f"{entry.name} ({entry.form})", metric, values, baseline=0.0,
                                compression=entry.compression, threads=options.threads))
            print(f"latency={budget}% {entry.name:20s} {entry.form:12s} measured {np.median(latency):.3f} of "
                  f"{peer.dense_name}, validation {entry.validation:.4f}, test {entry.test:.4f}", flush=True)
        best = max((entry for entry in at if entry.name != "autoprune"), key=lambda e: e.validation, default=None)
        mine = next(entry for entry in at if entry.name == "autoprune")
        if best is not None:
            ahead = "autoprune is ahead" if mine.test > best.test else "the peer is ahead"
            print(f"latency={budget}%: {'equal' if mine.test == best.test else ahead}: test {mine.test:.4f} against "
                  f"{best.test:.4f} of the best peer, {best.name}", flush=True)
    if not options.dry:
        append_rows(RESULTS / "peer.csv", rows)


def _scores(task: Task, model: nn.Module) -> tuple[float, float]:
    """Return accuracy on validation and test data."""
    splits = (task.data.validation, task.data.test)
    validation, test = (accuracy(model, task.data.normalize(part.images), part.labels) for part in splits)
    return validation, test


if __name__ == "__main__":
    main()
