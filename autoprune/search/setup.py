"""From a configuration to a search problem: model, space, table, dense references, layer database."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch import nn

from autoprune.core.budget import Budget, Limit
from autoprune.core.choices import Choice, Dense
from autoprune.core.errors import InfeasibleBudget
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Splits
from autoprune.core.progress import Progress
from autoprune.core.rundir import Cache
from autoprune.envs.database import LayerDatabase, build_database
from autoprune.envs.evaluator import Evaluator
from autoprune.envs.network import StitchedNetwork
from autoprune.envs.problem import Constraint, Problem, Quality
from autoprune.envs.store import DatabaseStore
from autoprune.lut.table import LatencyTable
from autoprune.search.memory import Memory, memory_constraint
from autoprune.search_spaces.space import SearchSpace
from autoprune.tasks.data import DataSet
from autoprune.tasks.precision import compute_device
from autoprune.tasks.task import Task
from autoprune.trainers.finetune import FinetuneRecipe

CALIBRATION_IMAGES = 500
MOMENT_IMAGES = 1_000
EVALUATION_IMAGES = 1_000
SINGLE_LAYER_IMAGES = 96
_WORDS = {"latency": "us", "macs": " MACs", "params": " weights", "size": " bytes", "memory": " bytes"}


class Scorer(Protocol):
    """What a problem needs of an evaluator."""

    def quality(self, choices: Mapping[str, Choice]) -> Quality:
        """Return error, accuracy and seconds of a policy; layers not named are dense."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """The quality side of a problem.

    Attributes:
        options: Choices of each searched layer, dense first.
        database: Compensated weights of all of them.
        evaluator: Scores policies.
        errors: Per layer an array: the network's error with only that layer changed.
    """

    options: dict[LayerSpec, tuple[Choice, ...]]
    database: LayerDatabase
    evaluator: Scorer
    errors: tuple[np.ndarray, ...]


def score_choices(task: Task, space: SearchSpace, cache: Cache, progress: Progress) -> Scored:
    """Return the database and single-layer errors of a space, from the cache where an earlier run made them."""
    data, device = task.data, compute_device()
    options = {layer: space.choices[layer.name] for layer in space.searched}
    # The task's own model stays where it is: latency is measured on another device than this one.
    model = task.model if device.type == "cpu" else copy.deepcopy(task.model).to(device)
    key = _key(task, device.type)
    progress.stage("layer database", 2 * len(options))
    images = data.normalize(data.train.images[:MOMENT_IMAGES])
    database = build_database(model, options, images, progress.advance, DatabaseStore(cache.database(key)))
    network = StitchedNetwork(model, data.normalize(data.train.images[:CALIBRATION_IMAGES]))
    scored, _ = data.judges(EVALUATION_IMAGES)
    evaluator = Evaluator(network, database, data.normalize(scored.images), scored.labels)
    errors = _single_errors(evaluator, options, _errors_key(key, task, options), cache, progress)
    return Scored(options, database, evaluator, errors)


def measured_space(space: SearchSpace, table: LatencyTable) -> SearchSpace:
    """Return the space without the choices that a table left unmeasured on purpose."""
    if not table.unmeasured:
        return space
    choices = {layer.name: table.measured(layer, space.choices[layer.name]) for layer in space.layers}
    return replace(space, choices=choices)


def _single_errors(
    evaluator: Evaluator, options: Mapping[LayerSpec, Sequence[Choice]], key: str, cache: Cache, progress: Progress
) -> tuple[np.ndarray, ...]:
    """Return the errors of every layer, those that are kept from the cache; each new one is kept at once."""
    rows = {layer: row for layer, row in cache.read_errors(key).items() if layer in {spec.name for spec in options}}
    progress.advance(len(rows))
    keeping = threading.Lock()

    def keep(layer: str, errors: np.ndarray) -> None:
        with keeping:
            rows[layer] = errors.tolist()
            cache.write_errors(key, rows)

    absent = {layer: choices for layer, choices in options.items() if layer.name not in rows}
    if absent:
        evaluator.single_errors(absent, SINGLE_LAYER_IMAGES, progress.advance, keep)
    return tuple(np.array(rows[layer.name]) for layer in options)


def worthwhile(scored: Scored, table: LatencyTable) -> Scored:
    """Return the choices without those whose kernel is not faster than dense on this machine, or was not measured."""
    options, errors = {}, []
    for (layer, choices), row in zip(scored.options.items(), scored.errors, strict=True):
        dense_us = table.layer_us(layer, Dense())
        measured = set(table.measured(layer, choices))
        kept = [
            index
            for index, choice in enumerate(choices)
            if isinstance(choice, Dense) or (choice in measured and table.layer_us(layer, choice) < dense_us)
        ]
        options[layer] = tuple(choices[index] for index in kept)
        errors.append(row[kept])
    return Scored(options, scored.database, scored.evaluator, tuple(errors))


def make_problem(
    layers: tuple[LayerSpec, ...],
    scored: Scored,
    table: LatencyTable,
    budget: Budget,
    dense_us: float,
    margin: float = 1.0,
    memory: Memory | None = None,
) -> Problem:
    """Return the search problem of a budget.

    Args:
        layers: All layers of the model.
        scored: Quality side.
        table: Calibrated latency table.
        budget: What is asked for.
        dense_us: Latency of the fastest dense execution.
        margin: Factor on a latency budget, for what the table under- or overestimates near it.
        memory: What a memory budget is made of; needed for one.
    Raises:
        InfeasibleBudget: No policy of the space meets it.
    """
    names = [layer.name for layer in scored.options]
    budget = Budget(tuple(_scaled(limit, margin) for limit in budget.limits))
    constraints: list[Constraint] = []
    describe: dict[str, Callable[[float], str]] = {}
    for limit in budget.limits:
        if limit.kind == "memory":
            assert memory is not None
            constraint, fixed = memory_constraint(limit, layers, scored.options, table, memory)
        else:
            constraint, fixed = _constraint(limit, layers, scored.options, table, dense_us)
        constraints.append(constraint)
        describe[limit.kind] = _words(limit, fixed)
        if constraint.limit < 0.0:
            raise InfeasibleBudget(
                f"{limit.text} is {describe[limit.kind](constraint.limit)}; the layers that are not searched alone "
                f"take {describe[limit.kind](0.0)}; raise the budget or search more layers."
            )

    def evaluate(assignment: tuple[int, ...]) -> Quality:
        chosen = zip(names, scored.options.values(), assignment, strict=True)
        return scored.evaluator.quality({name: choices[index] for name, choices, index in chosen})

    return Problem(
        list(scored.options),
        {layer.name: choices for layer, choices in scored.options.items()},
        constraints,
        scored.errors,
        evaluate,
        lambda kind, cost: describe[kind](cost),
    )


def _constraint(
    limit: Limit,
    layers: tuple[LayerSpec, ...],
    options: Mapping[LayerSpec, tuple[Choice, ...]],
    table: LatencyTable,
    dense_us: float,
) -> tuple[Constraint, float]:
    """Return the constraint over the searched layers, and the cost of everything else."""
    fit = table.calibration
    slope, intercept = (fit.slope, fit.intercept_us) if fit else (1.0, 0.0)
    cost_of: dict[str, Callable[[LayerSpec, Choice], float]] = {
        "latency": lambda layer, choice: slope * layer.calls * table.layer_us(layer, choice),
        "macs": lambda layer, choice: layer.macs * choice.density(layer),
        "params": lambda layer, choice: layer.weights * choice.density(layer),
        "size": lambda layer, choice: float(table.row(layer, choice).weight_bytes),
    }
    cost = cost_of[limit.kind]
    fixed = sum(cost(layer, Dense()) for layer in layers if layer not in options)
    if limit.kind == "latency":
        fixed += intercept
        dense = dense_us
    else:
        dense = sum(cost(layer, Dense()) for layer in layers)
    costs = tuple(np.array([cost(layer, choice) for choice in choices]) for layer, choices in options.items())
    return Constraint(limit.kind, costs, limit.absolute(dense) - fixed), fixed


def _scaled(limit: Limit, margin: float) -> Limit:
    return replace(limit, value=limit.value * margin) if limit.kind == "latency" else limit


def _words(limit: Limit, fixed: float) -> Callable[[float], str]:
    unit = _WORDS[limit.kind]
    return lambda cost: f"{cost + fixed:,.0f}{unit}"


def _key(task: Task, device: str) -> str:
    """Return what a layer database depends on besides its layers and choices: weights, images, and where it is made."""
    digest = hashlib.sha256(device.encode())
    for name, tensor in task.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    digest.update(task.data.train.images[:MOMENT_IMAGES].numpy().tobytes())
    return digest.hexdigest()[:16]


def _errors_key(database: str, task: Task, options: Mapping[LayerSpec, Sequence[Choice]]) -> str:
    digest = hashlib.sha256(database.encode())
    for layer, choices in options.items():
        digest.update(f"{layer.name} {layer.signature} {[choice.text for choice in choices]}".encode())
    digest.update(task.data.train.images[:CALIBRATION_IMAGES].numpy().tobytes())
    searched, _ = task.data.judges(EVALUATION_IMAGES)
    digest.update(searched.digest().encode())
    digest.update(searched.labels.numpy().tobytes())
    digest.update(str(SINGLE_LAYER_IMAGES).encode())
    return digest.hexdigest()[:16]


def finetune_recipe(task: Task) -> FinetuneRecipe:
    """Return how pruned networks are fine-tuned: by distillation alone where the labels are not to be used."""
    return FinetuneRecipe() if task.metric == "accuracy" else FinetuneRecipe(distill=1.0)


def splits_of(data: DataSet) -> Splits:
    """Return which images a search uses for what; reads all of them, so that a broken file is told of at once."""
    calibration = data.train.take(MOMENT_IMAGES)
    searched, judged = data.judges(EVALUATION_IMAGES)
    digest = hashlib.sha256("".join(part.digest() for part in (calibration, searched, judged)).encode())
    return Splits(
        train=len(data.train),
        calibration=len(calibration),
        search=len(searched),
        validation=len(judged),
        test=len(data.test),
        seed=data.seed,
        sha256=digest.hexdigest(),
    )


def pruned_model(task: Task, database: LayerDatabase, choices: Mapping[str, Choice]) -> nn.Module:
    """Return a float32 copy of the dense model under a policy: compensated weights, recalibrated BatchNorm."""
    data = task.data
    network = StitchedNetwork(task.model, data.normalize(data.train.images[:CALIBRATION_IMAGES]))
    network.load(database.policy_weights(choices))
    network.recalibrate()
    return network.model.eval().requires_grad_(True)
