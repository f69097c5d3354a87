"""Networks for agents that train while they search: short fine-tunes from a kept network, and the family they make.

Every kept network is a safetensors file of the run; one record says how each came about, so that a search which was
killed goes on from the last of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from autoprune.core.choices import Choice
from autoprune.core.rundir import RunDir, write_text
from autoprune.envs.database import LayerDatabase
from autoprune.envs.network import layer_of, recalibrate, side_by_side
from autoprune.search.finals import EVALUATION_BATCH, save_weights
from autoprune.search.netadapt import Member
from autoprune.search.setup import CALIBRATION_IMAGES, EVALUATION_IMAGES, finetune_recipe
from autoprune.tasks.data import DataSet, Split
from autoprune.tasks.metrics import accuracy
from autoprune.tasks.task import Task
from autoprune.tasks.weights import load_weights
from autoprune.trainers.finetune import Teacher, finetune


class Workshop:
    """Makes, trains and keeps the networks of one search.

    Args:
        task: Dense network and data.
        database: Compensated weights of every layer and choice.
        run: Where networks are kept.
        seed: Of order and augmentation.
    """

    def __init__(self, task: Task, database: LayerDatabase, run: RunDir, seed: int) -> None:
        self._task = task
        self._database = database
        self._run = run
        self._seed = seed
        data = task.data
        self._calibration = data.normalize(data.train.images[:CALIBRATION_IMAGES])
        scored, _ = data.judges(EVALUATION_IMAGES)
        self._images, self._labels = data.normalize(scored.images), scored.labels

    def dense(self) -> nn.Module:
        """Return a copy of the dense network."""
        return copy.deepcopy(self._task.model)

    def dense_accuracy(self) -> float:
        """Return the dense network's accuracy on the evaluation images."""
        return accuracy(self._task.model, self._images, self._labels, EVALUATION_BATCH)

    def adapted(
        self, parent: nn.Module, policies: Sequence[Mapping[str, Choice]], changed: Sequence[str], steps: int
    ) -> tuple[list[nn.Module], list[float]]:
        """Return ``parent`` under each policy, one layer changed and fine-tuned for a moment, and the accuracies.

        The changed layer takes its compensated weights from the database, all others go on from the parent's.

        Args:
            parent: Network of the policy before.
            policies: Layer → choice, of each candidate.
            changed: The layer in which each differs from the parent.
            steps: Optimizer steps.
        """
        models = [copy.deepcopy(parent) for _ in policies]
        recipe = replace(finetune_recipe(self._task), epochs=1)
        data, teacher = self._part(steps * recipe.batch_size), Teacher(self._task.model)

        def train(model: nn.Module, choices: Mapping[str, Choice], layer: str) -> float:
            weights = self._database.policy_weights(choices)
            with torch.no_grad():
                for name in self._database.changed_by(layer):
                    if name in weights:
                        layer_of(model, name).weight.copy_(weights[name])
            recalibrate(model, self._calibration)
            masks = {name: weight != 0 for name, weight in weights.items()}
            model.requires_grad_(True)
            finetune(model, teacher, masks, data, recipe, seed=self._seed)
            return accuracy(model, self._images, self._labels, EVALUATION_BATCH)

        with side_by_side() as pool:
            accuracies = list(pool.map(train, models, policies, changed))
        return models, accuracies

    def _part(self, count: int) -> DataSet:
        """Return the data with ``count`` training images drawn by the seed, or all if there are fewer."""
        train = self._task.data.train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self._seed))[:count]
        return replace(self._task.data, train=Split(train.images[order], train.labels[order]))

    def members(self) -> list[Member]:
        """Return the family kept so far; empty when there is none that can be read."""
        try:
            rows = json.loads(self._run.family_record.read_text(encoding="utf-8"))
            return [
                Member(tuple(map(tuple, row["candidates"])), tuple(row["accuracies"]), int(row["winner"]))
                for row in rows
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def keep(self, members: Sequence[Member], model: nn.Module) -> None:
        """Keep the newest network of a family, and the family's record; files of a longer one before it go."""
        save_weights(model, self._run.family(len(members)))
        rows = [
            {"candidates": member.candidates, "accuracies": member.accuracies, "winner": member.winner}
            for member in members
        ]
        write_text(self._run.family_record, json.dumps(rows) + "\n")
        stale = len(members) + 1
        while self._run.family(stale).exists():
            self._run.family(stale).unlink()
            stale += 1

    def load(self, number: int) -> nn.Module:
        """Return the kept network of that number, from 1; 0 is the dense one."""
        model = self.dense()
        if number:
            load_weights(model, self._run.family(number))
        return model
