"""Lottery tickets: train, prune a share of what is left, rewind the weights to an early step, train again.

Source: Frankle & Carbin, "The lottery ticket hypothesis" (arXiv 1803.03635); rewinding to a step above 0 for deep
networks after Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis" (arXiv 1912.05671).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autoprune.core.layers import LayerSpec
from autoprune.sparsity.masks import Balance
from autoprune.sparsity.patterns import PoolKind
from autoprune.trainers.method import (
    METHODS,
    Clock,
    Method,
    PrunedLayer,
    Restart,
    State,
    Subject,
    check_setting,
    read_settings,
)
from autoprune.trainers.projection import Projection, Rule
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.score import RandomScore, Score


@dataclass(frozen=True, slots=True)
class LotterySettings:
    """Parameters of iterative magnitude pruning.

    Attributes:
        rewind_step: k, the optimizer step whose weights every round starts from; 0 for small networks.
        fraction: Share of the surviving weights that a round removes.
        rounds: Rounds of pruning; None: as many as ``fraction`` needs for the sparsest layer.
        ticket: ``magnitude``, or the control ``random`` that removes as much at random.
        seed: Of the random control.
        balance: Rank units within the ``layer``, or within each ``filter``.
        pool: Pattern pool of pattern choices.
    """

    rewind_step: int = 0
    fraction: float = 0.2
    rounds: int | None = None
    ticket: Literal["magnitude", "random"] = "magnitude"
    seed: int = 0
    balance: Balance = "layer"
    pool: PoolKind = "patdnn"

    def __post_init__(self) -> None:
        name = "lottery"
        check_setting(name, "rewind_step", self.rewind_step, self.rewind_step >= 0, "0 or more")
        check_setting(name, "fraction", self.fraction, 0 < self.fraction < 1, "above 0 and below 1")
        check_setting(name, "rounds", self.rounds, self.rounds is None or self.rounds >= 1, "1 or more")
        check_setting(name, "ticket", self.ticket, self.ticket in ("magnitude", "random"), "'magnitude' or 'random'")
        Rule(balance=self.balance, pool=self.pool).check(name)


def density_of(layer: PrunedLayer) -> float:
    """Return the nominal density that a layer's choice asks for."""
    shape = tuple(int(size) for size in layer.parameter.shape)
    return layer.choice.density(LayerSpec(layer.name, "conv" if len(shape) == 4 else "linear", shape))


@METHODS.register("lottery")
class Lottery(Method):
    """Iterative magnitude pruning with rewinding, as a method of a session.

    The epochs of the session are shared by R + 1 trainings: R of them end with a pruning and a rewind of every
    parameter and buffer to step k, the last one trains the ticket. Round j leaves max(d, (1 − fraction)^j) of a layer,
    d being its policy's density, so every layer ends at its policy. The learning-rate schedule begins anew after each
    rewind (``restarts``; a loop of one's own does that itself), the optimizer's state is emptied.
    """

    name = "lottery"
    settings_class = LotterySettings

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        super().__init__(layers, clock, settings)
        self.settings = chosen = read_settings(LotterySettings, self.name, settings)
        self.keep = 1.0 - chosen.fraction
        sparsest = min((density_of(layer) for layer in layers), default=self.keep)
        self.rounds = chosen.rounds or max(1, math.ceil(math.log(sparsest) / math.log(self.keep) - 1e-9))
        if chosen.rounds is not None:
            self.keep = min(self.keep, sparsest ** (1.0 / chosen.rounds))
        if self.rounds + 1 > clock.epochs:
            raise TrainerError(
                f"lottery: {self.rounds} rounds and the ticket's training need {self.rounds + 1} epochs, got "
                f"{clock.epochs}; train longer, raise fraction, or lower rounds."
            )
        self.round_epochs = clock.epochs // (self.rounds + 1)
        if chosen.rewind_step >= self.round_epochs * clock.steps_per_epoch:
            raise TrainerError(
                f"lottery setting rewind_step={chosen.rewind_step}: a round has "
                f"{self.round_epochs * clock.steps_per_epoch} steps; lower it."
            )
        self.projection = Projection(Rule(balance=chosen.balance, pool=chosen.pool))
        self.score = RandomScore(chosen.seed) if chosen.ticket == "random" else Score()
        self.subject: Subject | None = None
        self.start: dict[str, Tensor] = {}
        self.done = 0

    def bind(self, subject: Subject) -> None:
        self.subject = subject

    @property
    def restarts(self) -> tuple[Restart, ...]:
        return tuple(Restart(self.round_epochs * number) for number in range(1, self.rounds + 1))

    def phase(self, epoch: int) -> str:
        number = min(self.rounds, epoch // self.round_epochs)
        return "ticket" if number == self.rounds else f"round {number + 1}"

    def finished(self) -> bool:
        return self.done == self.rounds

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        if step == self.settings.rewind_step == 0:
            self._keep_start()  # its weights; running statistics have seen one batch by now

    def _keep_start(self) -> None:
        if self.subject is not None:
            self.start = {name: value.clone() for name, value in self.subject.model.state_dict().items()}

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        if step + 1 == self.settings.rewind_step:
            self._keep_start()
        length = self.round_epochs * self.clock.steps_per_epoch
        if self.finished() or (step + 1) != length * (self.done + 1):
            return False
        self.done += 1
        for layer in self.layers:
            density = density_of(layer)
            left = density if self.finished() else max(density, self.keep**self.done)
            progress = 1.0 if density >= 1.0 else (1.0 - left) / (1.0 - density)
            layer.set_mask(self.projection.mask(layer, self.score.of(layer), progress))
        if self.subject is not None:
            self.subject.model.load_state_dict(self.start)
            self.subject.optimizer.state.clear()
        if self.finished():
            self.start = {}
        return True

    def state_dict(self) -> State:
        return {"done": self.done, "start": dict(self.start), "patterns": self.projection.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.done = int(state["done"])
        devices: dict[str, torch.device] = {layer.name: layer.parameter.device for layer in self.layers}
        self.start = {name: value.clone() for name, value in state["start"].items()}
        self.projection.load_state_dict(state["patterns"], devices)
