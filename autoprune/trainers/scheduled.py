"""A method made of four parts: schedule × score × projection × regulariser.

Most methods of the field are this and nothing else: at some steps the schedule asks for more sparsity, the score ranks
what is alive, the projection turns scores into the choice's mask, and a regulariser adds to the gradients meanwhile.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from autoprune.trainers.method import Clock, Method, PrunedLayer, State
from autoprune.trainers.projection import Projection
from autoprune.trainers.schedule import Era, campfire_phase, cubic_sparsity
from autoprune.trainers.score import Score


class Schedule(Protocol):
    """When sparsity grows."""

    def progress(self, step: int, before: float) -> float:
        """Return the scheduled sparsity over the final one after ``step``, given what is in place already."""
        ...

    def phase(self, epoch: int) -> str:
        """Return the name of the phase in an epoch."""
        ...


class Regulariser(Protocol):
    """What pulls weights while they are trained."""

    def add_gradients(self, scale: float | Tensor = 1.0) -> None:
        """Add the penalty's gradient to each parameter's ``grad``."""
        ...


@dataclass(frozen=True, slots=True)
class CubicSchedule:
    """Eq. 1 over an era.

    Attributes:
        era: e_0 and l.
        clock: Length of the training.
        exponent: r.
        grain: ``epoch`` holds the sparsity inside an epoch, ``step`` lets it grow every ``every`` steps.
        every: Steps between two recomputations.
    """

    era: Era
    clock: Clock
    exponent: float = 3.0
    grain: Literal["epoch", "step"] = "epoch"
    every: int = 1

    def progress(self, step: int, before: float) -> float:
        epoch: float = step // self.clock.steps_per_epoch
        if self.grain == "step" and epoch < self.era.end:
            if step % self.every:
                return before
            epoch = step / self.clock.steps_per_epoch
        return cubic_sparsity(epoch, self.era, 1.0, exponent=self.exponent)

    def phase(self, epoch: int) -> str:
        return campfire_phase(epoch, self.era)


@dataclass(frozen=True, slots=True)
class Staircase:
    """Sparsity in equal steps of kept weights: one shot, or a level at each of several epochs.

    Attributes:
        epochs: Epochs at whose first step the next level is reached; the last level is the final sparsity.
        clock: Length of the training.
    """

    epochs: tuple[int, ...]
    clock: Clock

    def progress(self, step: int, before: float) -> float:
        epoch = step // self.clock.steps_per_epoch
        return sum(epoch >= start for start in self.epochs) / len(self.epochs)

    def phase(self, epoch: int) -> str:
        if epoch < self.epochs[0]:
            return "dense"
        return "rounds" if epoch < self.epochs[-1] else "retrain"


@dataclass(slots=True)
class Parts:
    """What a scheduled method is made of."""

    schedule: Schedule
    projection: Projection
    score: Score = field(default_factory=Score)
    regulariser: Regulariser | None = None


class Scheduled(Method):
    """Masks that shrink along a schedule; a subclass only says of which parts it is made."""

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        super().__init__(layers, clock, settings)
        self.parts = self.make_parts(settings)
        self.progress = 0.0

    @abstractmethod
    def make_parts(self, settings: object | None) -> Parts:
        """Return the method's parts."""

    def phase(self, epoch: int) -> str:
        return self.parts.schedule.phase(epoch)

    def finished(self) -> bool:
        return self.progress >= 1.0

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        if self.progress < 1.0:
            self.parts.score.collect(self.layers, scale)
        if self.parts.regulariser is not None and self.regularised(step):
            self.parts.regulariser.add_gradients(scale)

    def regularised(self, step: int) -> bool:
        """Return whether the regulariser acts in a step."""
        return True

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        progress = self.parts.schedule.progress(step, self.progress)
        if progress <= self.progress:
            return False
        self.progress = progress
        for layer in self.layers:
            layer.set_mask(self.mask(layer))
        return True

    def mask(self, layer: PrunedLayer) -> Tensor:
        """Return a layer's mask at the present progress."""
        return self.parts.projection.mask(layer, self.parts.score.of(layer), self.progress)

    def state_dict(self) -> State:
        return {
            "progress": self.progress,
            "patterns": self.parts.projection.state_dict(),
            "score": self.parts.score.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        self.progress = float(state["progress"])
        devices = {layer.name: layer.parameter.device for layer in self.layers}
        self.parts.projection.load_state_dict(state["patterns"], devices)
        self.parts.score.load_state_dict(state["score"], self.layers)
