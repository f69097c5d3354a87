"""What a pruning method is: a schedule, a score, a projection and a regulariser, driven one optimizer step at a time.

A method sees the gradients before each step and the weights after it. It decides masks; the session applies them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
        straight: Whether gradients pass the mask: removed weights go on learning, and only the forward pass lacks them.
        companions: Vectors (K,) that die with their filter: its bias, the scale and shift of the BatchNorm behind it.
    """

    name: str
    parameter: nn.Parameter
    choice: Choice
    mask: Tensor | None = None
    factor: Tensor | None = None
    straight: bool = False
    companions: list[nn.Parameter] = field(default_factory=list)

    def set_mask(self, mask: Tensor) -> None:
        """Take ``mask`` from now on."""
        self.mask = mask
        self.factor = torch.empty_like(self.parameter, requires_grad=False).copy_(mask)

    def factors(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return every parameter that the mask covers with its 0/1 factor: the weight, then the companions."""
        if self.mask is None or self.factor is None:
            return []
        pairs = [(self.parameter, self.factor)]
        if self.companions:
            alive_K = self.mask.flatten(1).any(1)
            pairs += [(vector, alive_K.to(vector.dtype)) for vector in self.companions]
        return pairs

    def living_score(self) -> Tensor:
        """Return |w| in float32 with −1 at removed weights, which ranks them below every zero that is still alive."""
        score = self.parameter.detach().abs().float()
        return score if self.mask is None else score.masked_fill_(~self.mask, -1.0)


@dataclass(frozen=True, slots=True)
class Clock:
    """Length of a training: an epoch is ``steps_per_epoch`` optimizer steps."""

    steps_per_epoch: int
    epochs: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.steps_per_epoch * self.epochs

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1 or self.epochs < 1:
            raise TrainerError(
                f"steps_per_epoch={self.steps_per_epoch}, epochs={self.epochs}: both must be whole numbers above 0."
            )


def _alone(tensors: Sequence[Tensor]) -> None:
    """Leave decisions as they are: there is one process only."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a session prunes, for methods that touch more than the policy's weights.

    Attributes:
        model: Without wrappers.
        optimizer: Steps its parameters.
        wrapped: Whether training runs it inside a data-parallel wrapper.
        agree: Overwrites boolean tensors by those of the first of several processes. The session does it for masks; a
            method calls it for what else it decides once.
    """

    model: nn.Module
    optimizer: Optimizer
    wrapped: bool = False
    agree: Callable[[Sequence[Tensor]], None] = _alone


@dataclass(frozen=True, slots=True)
class Restart:
    """An epoch at which a method wants the learning-rate schedule to begin anew, at ``scale`` of its height."""

    epoch: int
    scale: float = 1.0


class Method(ABC):
    """One way to reach a policy's masks during training.

    Args:
        layers: All layers that the policy prunes.
        clock: Length of the training.
        settings: The method's own dataclass, a mapping of its fields, or None for the defaults.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[Any]]
    monotone: ClassVar[bool] = True
    """Whether a removed weight never returns."""
    kinds: ClassVar[tuple[type[Choice], ...]] = (Choice,)
    """Kinds of choices that it can execute."""

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        self.layers = layers
        self.clock = clock
        for layer in layers:
            if not isinstance(layer.choice, self.kinds):
                allowed = ", ".join(sorted(kind.kind for kind in self.kinds))
                raise TrainerError(
                    f"trainer '{self.name}' cannot execute {layer.choice.text} of layer '{layer.name}'; it takes: "
                    f"{allowed}. Give --trainer clicktrain or campfire, which take every choice."
                )

    def bind(self, subject: Subject) -> None:
        """Take the model and the optimizer; called once, when the session is made."""
        return

    def observe(self, example: Tensor) -> None:
        """Take one input of the model; called once before the first step, where an input is known by then."""
        return

    @property
    def restarts(self) -> tuple[Restart, ...]:
        """Where the learning-rate schedule begins anew; the built-in loop follows it."""
        return ()

    @property
    def scoring_passes(self) -> float:
        """Dense forward and backward passes spent on scores beside what a step under the masks computes."""
        return 0.0

    def closing(self) -> None:
        """Leave the model as it was given, but for its weights; called by the session's ``finalize``."""
        return

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
        """Take ``state_dict``'s answer; the session gives the layers their masks after this."""


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
