"""N:M pruning: one shot and retrain (ASP), or learnt from scratch with straight-through gradients (SR-STE).

Both are stated for 2:4 and run every other choice of a policy through its own projection.

Sources: Mishra et al., "Accelerating sparse deep neural networks" (arXiv 2104.08378); Zhou et al., "Learning N:M
fine-grained structured sparse neural networks from scratch" (arXiv 2102.04010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autoprune.sparsity.masks import Balance
from autoprune.sparsity.patterns import PoolKind
from autoprune.trainers.method import METHODS, Clock, Method, PrunedLayer, Restart, State, check_setting, read_settings
from autoprune.trainers.projection import Rule, final_mask
from autoprune.trainers.schedule import TrainerError


@dataclass(frozen=True, slots=True)
class NMSettings:
    """Parameters of N:M training.

    Attributes:
        mode: ``sr-ste``, or ``asp`` for dense training, one-shot pruning and retraining.
        start: First epoch under masks; None: 0 for ``sr-ste``, half of the epochs for ``asp``.
        freeze: Epoch from which ``sr-ste`` keeps its masks and forgets the removed weights; None: never.
        decay: SR-STE's pull on removed weights.
        balance: Rank units within the ``layer``, or within each ``filter``.
        pool: Pattern pool of pattern choices.
    """

    mode: Literal["sr-ste", "asp"] = "sr-ste"
    start: int | None = None
    freeze: int | None = None
    decay: float = 2e-4
    balance: Balance = "layer"
    pool: PoolKind = "patdnn"

    def __post_init__(self) -> None:
        check_setting("nm", "mode", self.mode, self.mode in ("sr-ste", "asp"), "'sr-ste' or 'asp'")
        check_setting("nm", "decay", self.decay, self.decay >= 0, "0 or more")
        Rule(balance=self.balance, pool=self.pool).check("nm")


@METHODS.register("nm")
class NMTraining(Method):
    """ASP and SR-STE as a method of a session.

    SR-STE computes with m⊙W but updates the whole W by ``g + decay·(1 − m)⊙W``: between two steps the parameter holds
    m⊙W, which is what any loop, checkpoint or average sees; the whole W stands in this object and comes back for the
    update alone. Weights may return. ASP's schedule begins anew at the pruning, as its source repeats the training.
    """

    name = "nm"
    settings_class = NMSettings
    monotone = False

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        super().__init__(layers, clock, settings)
        self.settings = read_settings(NMSettings, self.name, settings)
        asp = self.settings.mode == "asp"
        start = self.settings.start
        self.start = (clock.epochs // 2 if asp else 0) if start is None else start
        self.end = clock.epochs if self.settings.freeze is None else self.settings.freeze
        if asp:
            self.end = self.start
        if not 0 <= self.start < clock.epochs or self.end < self.start:
            raise TrainerError(
                f"nm setting start={self.start}, freeze={self.end}: must satisfy 0 <= start <= freeze, start at most "
                f"{clock.epochs - 1}, the last of {clock.epochs} epochs."
            )
        self.rule = Rule(balance=self.settings.balance, pool=self.settings.pool)
        self.dense: dict[str, Tensor] = {}
        self.masked = self.frozen = False

    @property
    def restarts(self) -> tuple[Restart, ...]:
        return (Restart(self.start),) if self.settings.mode == "asp" and self.start > 0 else ()

    def phase(self, epoch: int) -> str:
        if epoch < self.start:
            return "dense"
        return "straight-through" if epoch < self.end else "frozen"

    def finished(self) -> bool:
        return self.masked

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        for layer in self.layers:
            whole = self.dense.get(layer.name)
            if whole is None or layer.mask is None:
                continue
            layer.parameter.copy_(whole)
            if layer.parameter.grad is not None:
                layer.parameter.grad.add_((whole * ~layer.mask) * (self.settings.decay * scale))

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        if self.frozen or step < self.start * self.clock.steps_per_epoch:
            return False
        freeze = step >= self.end * self.clock.steps_per_epoch
        for layer in self.layers:
            self.dense[layer.name] = layer.parameter.detach().clone()
            layer.straight = not freeze
            layer.set_mask(final_mask(layer, layer.parameter.detach().abs().float(), self.rule))
        if freeze:
            self.dense = {}
        self.masked, self.frozen = True, freeze
        return True

    def state_dict(self) -> State:
        return {"dense": dict(self.dense), "masked": self.masked, "frozen": self.frozen}

    def load_state_dict(self, state: State) -> None:
        self.masked, self.frozen = bool(state["masked"]), bool(state["frozen"])
        devices = {layer.name: layer.parameter.device for layer in self.layers}
        self.dense = {name: value.to(devices[name]) for name, value in state["dense"].items()}
        for layer in self.layers:
            layer.straight = layer.name in self.dense
