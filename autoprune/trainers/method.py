"""What a pruning method is: a schedule, a score, a projection and a regulariser, driven one optimizer step at a time.

A method sees the gradients before each step and the weights after it. It decides masks; the session applies them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from autoprune.core import settings as settings_of
from autoprune.core.choices import Choice
from autoprune.core.registry import Registry
from autoprune.trainers.schedule import TrainerError

State = dict[str, Any]
S = TypeVar("S")


@dataclass(slots=True)
class PrunedLayer:
    """One layer under a policy.

    Attributes:
        name: Dotted module name.
        parameter: Its weight, (K, C, R, S) or (O, I).
        choice: Never dense.
        mask: Which weights stay, boolean; None while the layer is still dense.
        factor: The mask in the weight's dtype and memory format.
    """

    name: str
    parameter: nn.Parameter
    choice: Choice
    mask: Tensor | None = None
    factor: Tensor | None = None

    def set_mask(self, mask: Tensor) -> None:
        """Take ``mask`` from now on."""
        self.mask = mask
        self.factor = torch.empty_like(self.parameter, requires_grad=False).copy_(mask)

    def living_score(self) -> Tensor:
        """Return |w| in float32 with −1 at removed weights, which ranks them below every zero that is still alive."""
        score = self.parameter.detach().abs().float()
        return score if self.mask is None else score.masked_fill_(~self.mask, -1.0)


@dataclass(frozen=True, slots=True)
class Clock:
    """Length of a training: an epoch is ``steps_per_epoch`` optimizer steps."""

    steps_per_epoch: int
    epochs: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1 or self.epochs < 1:
            raise TrainerError(
                f"steps_per_epoch={self.steps_per_epoch}, epochs={self.epochs}: both must be whole numbers above 0."
            )


class Method(ABC):
    """One way to reach a policy's masks during training.

    Args:
        layers: All layers that the policy prunes.
        clock: Length of the training.
        settings: The method's own dataclass, a mapping of its fields, or None for the defaults.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[Any]]

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        self.layers = layers
        self.clock = clock

    @abstractmethod
    def phase(self, epoch: int) -> str:
        """Return the name of the phase in an epoch."""

    @abstractmethod
    def finished(self) -> bool:
        """Return whether the policy's final masks are in place."""

    def before_step(self, step: int, scale: float | Tensor) -> None:
        """See the gradients, and add to them.

        Args:
            step: Optimizer steps taken so far.
            scale: By which the gradients are still multiplied (fused optimizers undo a loss scale themselves).
        """
        return

    @abstractmethod
    def after_step(self, step: int) -> bool:
        """Set masks from the updated weights; return whether any was set."""

    @abstractmethod
    def state_dict(self) -> State:
        """Return what a resumed training needs beside the masks: plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Take ``state_dict``'s answer; the layers' masks are already back."""


METHODS: Registry[type[Method]] = Registry("trainer")


def read_settings(cls: type[S], method: str, settings: object | None) -> S:
    """Return the settings of a method from its dataclass, a mapping or None; see ``core.settings``."""
    return settings_of.read_settings(cls, _owner(method), settings)


def parse_settings(method: str, texts: Sequence[str]) -> dict[str, object]:
    """Return a method's settings from ``name=value`` texts, as written on a command line.

    Raises:
        UnknownName: No such method or setting.
        TrainerError: A text without '=', or a value that is no number where one is wanted.
    """
    return settings_of.parse_settings(METHODS.get(method).settings_class, _owner(method), texts)


def check_setting(method: str, name: str, value: object, allowed: bool, want: str) -> None:
    """Refuse a setting's value.

    Raises:
        TrainerError: ``allowed`` is false.
    """
    settings_of.check_setting(_owner(method), name, value, allowed, want)


def _owner(method: str) -> settings_of.Owner:
    return settings_of.Owner("trainer", method, TrainerError)
