"""SNIP: pruning before training by connection sensitivity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autoprune.sparsity.masks import Balance
from autoprune.sparsity.patterns import PoolKind
from autoprune.trainers.method import METHODS, State, Subject, check_setting, read_settings
from autoprune.trainers.projection import Projection, Rule
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.scheduled import Parts, Scheduled
from autoprune.trainers.score import Saliency


@dataclass(frozen=True, slots=True)
class SNIPSettings:
    """Parameters of SNIP.

    Attributes:
        batches: Batches whose connection sensitivities are summed before the first update; the source takes 1.
        balance: Rank units within the ``layer``, or within each ``filter``.
        pool: Pattern pool of pattern choices.
    """

    batches: int = 1
    balance: Balance = "layer"
    pool: PoolKind = "patdnn"

    def __post_init__(self) -> None:
        check_setting("snip", "batches", self.batches, self.batches >= 1, "1 or more")
        Rule(balance=self.balance, pool=self.pool).check("snip")


@dataclass(frozen=True, slots=True)
class _AtStep:
    """The final sparsity at once, after one step."""

    step: int

    def progress(self, step: int, before: float) -> float:
        return float(step >= self.step)

    def phase(self, epoch: int) -> Literal["pruned"]:
        return "pruned"


@METHODS.register("snip")
class SNIP(Scheduled):
    """Pruning before training by |g·w|.

    The first ``batches`` steps only score: their gradients are taken away before the optimizer sees them, so that the
    masks are those of the first weights. The source ranks over the whole network; here each layer keeps what its
    policy says.
    Source: Lee et al., "SNIP: single-shot network pruning based on connection sensitivity" (arXiv 1810.02340).
    """

    name = "snip"
    settings_class = SNIPSettings

    def make_parts(self, settings: object | None) -> Parts:
        self.settings = read_settings(SNIPSettings, self.name, settings)
        if self.settings.batches >= self.clock.steps:
            raise TrainerError(
                f"snip setting batches={self.settings.batches}: the training has {self.clock.steps} steps; lower it."
            )
        self.subject: Subject | None = None
        rule = Rule(balance=self.settings.balance, pool=self.settings.pool)
        return Parts(_AtStep(self.settings.batches - 1), Projection(rule), Saliency(power=1))

    def bind(self, subject: Subject) -> None:
        self.subject = subject

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        super().before_step(step, scale)
        if step < self.settings.batches:
            parameters: list[nn.Parameter] = [layer.parameter for layer in self.layers]
            if self.subject is not None:
                parameters = [p for group in self.subject.optimizer.param_groups for p in group["params"]]
            for parameter in parameters:
                parameter.grad = None

    def state_dict(self) -> State:
        state = super().state_dict()
        return {**state, "score": {}} if self.finished() else state
