"""The last stage: candidate policies are deployed, timed, fine-tuned and compared; one is chosen.

Test data is touched once, for the chosen policy and the dense network, after the choice was made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.core.budget import Budget
from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.coupling import Coupling
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Accuracy, Cost, macs_ratio, params_ratio
from autoprune.core.progress import Progress
from autoprune.core.rundir import RunDir, atomic_path
from autoprune.envs.database import LayerDatabase
from autoprune.envs.network import layer_of, side_by_side
from autoprune.kernels.convert import DeployedModel
from autoprune.search.config import TOLERANCE
from autoprune.search.deploy import Deployer
from autoprune.search.setup import EVALUATION_IMAGES, finetune_recipe, pruned_model
from autoprune.search_spaces.grouped import split_choices
from autoprune.tasks.data import Split
from autoprune.tasks.metrics import own_score, split_accuracy
from autoprune.tasks.task import Task
from autoprune.tasks.weights import load_weights
from autoprune.trainers.finetune import Teacher, finetune, finetune_steps

EVALUATION_BATCH = 50


@dataclass(frozen=True, slots=True)
class Candidate:
    """One policy on its way to the closing table.

    Attributes:
        name: Row name, also part of a file name: ``chosen``'s rivals, baselines, dense.
        proposer: Searcher it came from.
        choices: Layer → choice.
        accuracy: As far as known.
        predicted, measured: Costs; ``measured`` once deployed.
    """

    name: str
    proposer: str
    choices: Mapping[str, Choice]
    predicted: Cost
    measured: Cost | None = None
    accuracy: Accuracy = field(default_factory=Accuracy)

    @property
    def cost(self) -> Cost:
        """Its measured cost, or the predicted one of a network that was not deployed."""
        return self.measured or self.predicted

    @property
    def finalist(self) -> bool:
        """Whether the agent that was asked for proposed it, rather than a baseline."""
        return self.name.startswith("finalist")


def predicted_cost(
    layers: tuple[LayerSpec, ...], choices: Mapping[str, Choice], deployer: Deployer, coupling: Coupling
) -> Cost:
    """Return a policy's cost as the table predicts it, with every layer in the shape that its channels leave it."""
    latency = deployer.table.network_us(coupling.resized(layers, choices), split_choices(choices))
    dense = deployer.references.best_us
    return Cost(
        latency_us=latency,
        dense_latency_us=dense,
        latency_ratio=latency / dense,
        macs_ratio=macs_ratio(layers, choices, coupling),
        params_ratio=params_ratio(layers, choices, coupling),
    )


def kept_masks(model: nn.Module, choices: Mapping[str, Choice]) -> dict[str, Tensor]:
    """Return layer → bool mask of the weights that are not zero, of every layer that a policy makes sparse."""
    return {
        name: layer_of(model, name).weight != 0
        for name, choice in choices.items()
        if not isinstance(choice, Dense | Channels)
    }


def true_ratios(layers: tuple[LayerSpec, ...], model: nn.Module) -> tuple[float, float]:
    """Return MACs and weights that are not zero, over all of them, conv and linear layers."""
    kept = {
        layer.name: int(torch.count_nonzero(layer_of(model, layer.name).weight)) for layer in layers
    }
    macs = sum(kept[layer.name] / layer.weights * layer.macs for layer in layers) / sum(layer.macs for layer in layers)
    return macs, sum(kept.values()) / sum(layer.weights for layer in layers)


def meets(budget: Budget, measured: Cost) -> bool:
    """Return whether a cost keeps the budget, latency within ``TOLERANCE``; size and memory are exact by construction.

    Of a network that cannot be deployed here it is the predicted cost.
    """
    for limit in budget.limits:
        if limit.kind == "latency":
            value = measured.latency_ratio if limit.relative else measured.latency_us
            if value is None or value > limit.value * (1.0 + TOLERANCE):
                return False
        elif limit.relative and limit.kind in ("macs", "params"):
            value = measured.macs_ratio if limit.kind == "macs" else measured.params_ratio
            if value > limit.value + 1e-3:  # nominal counts are rounded to whole weights
                return False
    return True


class Finals:
    """Deploys, times and fine-tunes candidates of one search."""

    def __init__(
        self,
        task: Task,
        layers: tuple[LayerSpec, ...],
        database: LayerDatabase,
        deployer: Deployer,
        run: RunDir,
        progress: Progress,
        seed: int,
    ) -> None:
        self.task = task
        self.layers = layers
        self.database = database
        self.deployer = deployer
        self.recipe = finetune_recipe(task)
        _, self.judged = task.data.judges(EVALUATION_IMAGES)
        self._run = run
        self._progress = progress
        self._seed = seed
        self._teacher = Teacher(task.model)

    @property
    def steps(self) -> int:
        """Optimizer steps of one candidate's fine-tune."""
        return finetune_steps(len(self.task.data.train), self.recipe)

    def time(self, candidates: list[Candidate], models: Mapping[str, nn.Module]) -> list[Candidate]:
        """Return the candidates with their measured cost, all timed in one interleaved run; as they are elsewhere."""
        if not self.deployer.measures:
            self._progress.advance(len(candidates))
            return candidates
        networks: dict[str, DeployedModel] = {}
        for candidate in candidates:
            networks[candidate.name] = self.deployer.deploy(models[candidate.name], candidate.choices)
            self._progress.advance()
        medians, dense_us = self.deployer.compare_us(networks)
        timed = []
        for candidate in candidates:
            macs, params = true_ratios(self.layers, models[candidate.name])
            cost = Cost(
                latency_us=medians[candidate.name],
                dense_latency_us=dense_us,
                latency_ratio=medians[candidate.name] / dense_us,
                macs_ratio=macs,
                params_ratio=params,
            )
            timed.append(replace(candidate, measured=cost))
        return timed

    def pruned(self, candidate: Candidate) -> nn.Module:
        """Return the candidate's network before any training."""
        return pruned_model(self.task, self.database, candidate.choices)

    def tune(self, candidates: list[Candidate]) -> tuple[list[Candidate], dict[str, nn.Module]]:
        """Fine-tune each candidate's network, or load what an earlier session made of it.

        Returns:
            The candidates with their validation accuracies before and after, and name → fine-tuned network.
        """
        untrained = {candidate.name: self.pruned(candidate) for candidate in candidates}
        before = {c.name: self.score(untrained[c.name], c, self.judged) for c in candidates}
        stop = threading.Event()

        def step() -> None:
            if stop.is_set():
                raise _Stopped
            self._progress.advance()

        with side_by_side() as pool:
            try:
                list(pool.map(lambda c: self._finetune(c, untrained[c.name], step), candidates))
            except BaseException:
                stop.set()
                raise
        after = {c.name: self.score(untrained[c.name], c, self.judged) for c in candidates}
        scored = [replace(c, accuracy=Accuracy(pruned=before[c.name], tuned=after[c.name])) for c in candidates]
        return scored, untrained

    def _finetune(self, candidate: Candidate, model: nn.Module, step: Callable[[], None]) -> None:
        path = self._run.tuned(candidate.name)
        if path.exists():
            load_weights(model, path)
            self._progress.advance(self.steps)
            return
        masks = kept_masks(model, candidate.choices) | self.database.parameter_masks(model, candidate.choices)
        finetune(model, self._teacher, masks, self.task.data, self.recipe, seed=self._seed, on_step=step)
        save_weights(model, path)

    def score(self, model: nn.Module, candidate: Candidate, split: Split) -> float:
        """Return the accuracy of the deployed form of ``model``, or what the user's own judge says of it."""
        deployed = self.deployer.deploy(model, candidate.choices)
        if self.task.evaluate is not None:
            return own_score(self.task.evaluate, deployed)
        return split_accuracy(deployed, split, self.task.data, EVALUATION_BATCH)

    def closing_score(self, model: nn.Module, candidate: Candidate) -> float | None:
        """Return the accuracy on the test images; None where the user's own judge has said all there is."""
        return None if self.task.evaluate is not None else self.score(model, candidate, self.task.data.test)


class _Stopped(Exception):
    """Ends the fine-tunes beside one that was interrupted."""


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state dict as safetensors, atomically."""
    state: dict[str, Tensor] = {key: value.contiguous() for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary)
