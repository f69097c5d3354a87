"""From a configuration to a search problem: model, space, table, dense references, layer database."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from torch import nn

from autoprune.core.budget import Budget, Limit
from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.coupling import Coupling
from autoprune.core.errors import BudgetError, InfeasibleBudget
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Splits
from autoprune.core.progress import Progress
from autoprune.core.rundir import Cache
from autoprune.envs.coupled import CoupledProblem
from autoprune.envs.database import Channelled, LayerDatabase, build_database
from autoprune.envs.evaluator import Evaluator
from autoprune.envs.network import StitchedNetwork
from autoprune.envs.problem import Constraint, Problem, Quality
from autoprune.envs.store import DatabaseStore
from autoprune.lut.table import LatencyTable
from autoprune.search.channels import CostOf, make_factors, touched_layers
from autoprune.search.memory import Memory, memory_constraint
from autoprune.search_spaces.space import SearchSpace
from autoprune.sparsity.channels import ChannelGroups, mask_channels
from autoprune.tasks.data import DataSet
from autoprune.tasks.precision import compute_device
from autoprune.tasks.task import Task
from autoprune.trainers.finetune import FinetuneRecipe

CALIBRATION_IMAGES = 500
# Of a policy that is only scored: one batch orders policies as well as more do.
RECALIBRATION_IMAGES = 125
MOMENT_IMAGES = 1_000
EVALUATION_IMAGES = 1_000
SINGLE_LAYER_IMAGES = 48
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
        coupling: Channel groups; empty where no channels are searched.
    """

    options: dict[LayerSpec, tuple[Choice, ...]]
    database: LayerDatabase
    evaluator: Scorer
    errors: tuple[np.ndarray, ...]
    coupling: Coupling = field(default_factory=Coupling)


def score_choices(
    task: Task,
    space: SearchSpace,
    cache: Cache,
    progress: Progress,
    groups: ChannelGroups | None = None,
    images_drawn: int | None = None,
) -> Scored:
    """Return the database and single-layer errors of a space, from the cache where an earlier run made them.

    Args:
        task: Network and data.
        space: What is searched.
        cache: Of the folder of runs.
        progress: Told of the stage.
        groups: Channel groups of the network, where channels are searched.
        images_drawn: Of the evaluation images, to score policies on; None takes all.
    """
    data, device = task.data, compute_device()
    options = {layer: space.choices[layer.name] for layer in space.searched}
    # The task's own model stays where it is: latency is measured on another device than this one.
    model = task.model if device.type == "cpu" else copy.deepcopy(task.model).to(device)
    key = _key(task, device.type)
    images = data.normalize(data.train.images[:MOMENT_IMAGES])
    store = DatabaseStore(cache.database(key))
    channels = None if groups is None or not groups.leaders else Channelled(groups, space.layers)
    database = build_database(model, options, images, progress, store, channels)
    network = StitchedNetwork(model, data.normalize(data.train.images[:RECALIBRATION_IMAGES]))
    scored, _ = data.judges(EVALUATION_IMAGES)
    evaluator = Evaluator(network, database, data.normalize(scored.images), scored.labels, images_drawn)
    errors = _single_errors(evaluator, options, _errors_key(key, task, options), cache, progress)
    return Scored(options, database, evaluator, errors, space.coupling)


def measured_space(space: SearchSpace, table: LatencyTable) -> SearchSpace:
    """Return the space without the choices that a table left unmeasured on purpose."""
    if not table.unmeasured:
        return space
    choices = {
        layer.name: tuple(
            choice
            for choice in space.choices[layer.name]
            # Widths have rows of their own, whose absence is an error.
            if isinstance(choice, Channels) or table.measured(layer, [choice])
        )
        for layer in space.layers
    }
    return replace(space, choices=choices)


def _single_errors(
    evaluator: Evaluator, options: Mapping[LayerSpec, Sequence[Choice]], key: str, cache: Cache, progress: Progress
) -> tuple[np.ndarray, ...]:
    """Return the errors of every layer, those that are kept from the cache; each new one is kept at once."""
    rows = {layer: row for layer, row in cache.read_errors(key).items() if layer in {spec.name for spec in options}}
    progress.stage("single-layer errors", len(options))
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
    kept = {layer: _faster(layer, choices, table) for layer, choices in scored.options.items()}
    options = {layer: tuple(scored.options[layer][index] for index in indices) for layer, indices in kept.items()}
    errors = tuple(row[indices] for row, indices in zip(scored.errors, kept.values(), strict=True))
    return replace(scored, options=options, errors=errors)


def _faster(layer: LayerSpec, choices: Sequence[Choice], table: LatencyTable) -> list[int]:
    """Return the indices of dense, of the choices that were measured faster, and of channels, whose cost is coupled."""
    dense_us = table.layer_us(layer, Dense())
    measured = set(table.measured(layer, choices))
    return [
        index
        for index, choice in enumerate(choices)
        if isinstance(choice, Dense | Channels) or (choice in measured and table.layer_us(layer, choice) < dense_us)
    ]


def check_reachable(
    layers: tuple[LayerSpec, ...], space: SearchSpace, table: LatencyTable, budget: Budget, dense_us: float
) -> None:
    """Refuse a budget that no policy of the space meets, before anything is scored; a limit on memory comes later.

    Args:
        layers: All layers of the model.
        space: Of measured choices.
        table: Calibrated latency table.
        budget: What is asked for.
        dense_us: Latency of the fastest dense execution.
    Raises:
        InfeasibleBudget: It cannot be met.
    """
    limits = tuple(limit for limit in budget.limits if limit.kind != "memory")
    if not limits:
        return
    options = {
        layer: tuple(space.choices[layer.name][index] for index in _faster(layer, space.choices[layer.name], table))
        for layer in space.searched
    }
    errors = tuple(np.zeros(len(choices)) for choices in options.values())
    unscored = Scored(options, LayerDatabase({}, {}), _Unscored(), errors, space.coupling)
    make_problem(layers, unscored, table, Budget(limits), dense_us)


class _Unscored:
    """Stands in for an evaluator while only costs are in question."""

    def quality(self, choices: Mapping[str, Choice]) -> Quality:
        """Nothing is known yet."""
        return Quality(error=float("nan"), accuracy=0.0, seconds=0.0)


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
    coupling = scored.coupling
    touched = touched_layers(layers, scored.options, coupling)
    constraints: list[Constraint] = []
    describe: dict[str, Callable[[float], str]] = {}
    for limit in budget.limits:
        if limit.kind == "memory":
            assert memory is not None
            if touched:
                raise BudgetError(
                    f"--budget '{limit.text}': memory is not a budget for channels, whose maps shrink by the policy; "
                    "give size=, params= or latency=."
                )
            constraint, fixed = memory_constraint(limit, layers, scored.options, table, memory)
        else:
            constraint, fixed = _constraint(limit, (layers, frozenset(touched)), scored.options, table, dense_us)
        constraints.append(constraint)
        describe[limit.kind] = _words(limit, fixed)
        if constraint.limit < 0.0:
            raise InfeasibleBudget(
                f"{limit.text} is {describe[limit.kind](constraint.limit)}; the layers that are not searched alone "
                f"take {describe[limit.kind](0.0)}; raise the budget or search more layers."
            )

    def evaluate(assignment: tuple[int, ...]) -> Quality:
        chosen = zip(names, scored.options.values(), assignment, strict=True)
        return scored.evaluator.quality(coupling.expanded({name: choices[index] for name, choices, index in chosen}))

    def words(kind: str, cost: float) -> str:
        return describe[kind](cost)

    specs, choices_of = list(scored.options), {layer.name: choices for layer, choices in scored.options.items()}
    if not touched:
        return Problem(specs, choices_of, constraints, scored.errors, evaluate, words)
    costs = [_cost_of(limit.kind, table) for limit in budget.limits]
    return CoupledProblem(
        specs,
        choices_of,
        constraints,
        make_factors(layers, scored.options, coupling, costs),
        scored.errors,
        evaluate,
        words,
        followers={name: group.writers[1:] for name, group in coupling.groups.items() if name in choices_of},
    )


def _cost_of(kind: str, table: LatencyTable) -> CostOf:
    """Return what a layer costs under a choice, all its calls together."""
    slope = table.calibration.slope if table.calibration else 1.0
    cost_of: dict[str, CostOf] = {
        "latency": lambda layer, choice: slope * layer.calls * table.layer_us(layer, choice),
        "macs": lambda layer, choice: layer.macs * choice.density(layer),
        "params": lambda layer, choice: layer.weights * choice.density(layer),
        "size": lambda layer, choice: float(table.row(layer, choice).weight_bytes),
    }
    return cost_of[kind]


def _constraint(
    limit: Limit,
    network: tuple[tuple[LayerSpec, ...], frozenset[LayerSpec]],
    options: Mapping[LayerSpec, tuple[Choice, ...]],
    table: LatencyTable,
    dense_us: float,
) -> tuple[Constraint, float]:
    """Return the constraint over the searched layers, and the cost of everything else.

    ``network``: all layers, and those whose cost depends on searched channels, which count in neither.
    """
    layers, touched = network
    cost = _cost_of(limit.kind, table)
    fixed = sum(cost(layer, Dense()) for layer in layers if layer not in options and layer not in touched)
    if limit.kind == "latency":
        fixed += table.calibration.intercept_us if table.calibration else 0.0
        dense = dense_us
    else:
        dense = sum(cost(layer, Dense()) for layer in layers)
    costs = tuple(
        np.zeros(len(choices)) if layer in touched else np.array([cost(layer, choice) for choice in choices])
        for layer, choices in options.items()
    )
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
    digest.update(task.data.train.images[:RECALIBRATION_IMAGES].numpy().tobytes())
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
    if database.channels is not None:
        mask_channels(network.model, database.channels.groups, database.channels.kept(choices))
    return network.model.eval().requires_grad_(True)
