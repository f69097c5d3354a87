"""ADMM pruning: weights are pulled towards their projection onto the choice, then masked for good and retrained.

    loss + Σ ρ/2 ‖W − Z + U‖²;   at first  Z = Π(W), U = 0;   every k epochs  Z = Π(W + U),  U += W − Z

Π keeps the entries whose squares sum highest under the choice, which is the nearest tensor that the choice allows: any
kind of choice can be projected onto.

Source: Zhang et al., "A systematic DNN weight pruning framework using ADMM" (arXiv 1804.03294).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.sparsity.masks import Balance
from autoprune.sparsity.patterns import PoolKind
from autoprune.trainers.method import METHODS, Clock, Method, PrunedLayer, State, check_setting, read_settings
from autoprune.trainers.penalty import Pull
from autoprune.trainers.projection import Rule, final_mask
from autoprune.trainers.schedule import clicktrain_phase, make_stages


@dataclass(frozen=True, slots=True)
class ADMMSettings:
    """Parameters of ADMM.

    Attributes:
        warmup_epochs: First epoch with the penalty; None: 20 % of the epochs.
        hard_epoch: First epoch under masks; None: 50 % of the epochs.
        rho: ρ, strength of the pull.
        every: k, epochs between two projections.
        balance: Rank units within the ``layer``, or within each ``filter``.
        pool: Pattern pool of pattern choices, chosen anew at each projection.
    """

    warmup_epochs: int | None = None
    hard_epoch: int | None = None
    rho: float = 1e-3
    every: int = 1
    balance: Balance = "layer"
    pool: PoolKind = "patdnn"

    def __post_init__(self) -> None:
        check_setting("admm", "rho", self.rho, self.rho >= 0, "0 or more")
        check_setting("admm", "every", self.every, self.every >= 1, "1 or more")
        Rule(balance=self.balance, pool=self.pool).check("admm")


@METHODS.register("admm")
class ADMM(Method):
    """ADMM as a method of a session; see the module."""

    name = "admm"
    settings_class = ADMMSettings

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        super().__init__(layers, clock, settings)
        self.settings = read_settings(ADMMSettings, self.name, settings)
        self.stages = make_stages(clock.epochs, self.settings.warmup_epochs, self.settings.hard_epoch)
        self.rule = Rule(balance=self.settings.balance, pool=self.settings.pool)
        self.duals: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}
        self.pull: Pull | None = None
        self.pruned = False

    def phase(self, epoch: int) -> str:
        return {"lasso": "admm"}.get(name := clicktrain_phase(epoch, self.stages), name)

    def finished(self) -> bool:
        return self.pruned

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        if self.pruned:
            return
        epoch, offset = divmod(step, self.clock.steps_per_epoch)
        since = epoch - self.stages.warmup
        if epoch < self.stages.hard and since >= 0 and offset == 0 and since % self.settings.every == 0:
            self._project()
        if self.pull is not None:
            self.pull.add_gradients(scale)

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        if self.pruned or step < self.stages.hard * self.clock.steps_per_epoch:
            return False
        for layer in self.layers:
            layer.set_mask(final_mask(layer, layer.parameter.detach().float().square(), self.rule))
        self.pruned, self.pull = True, None
        self.duals, self.anchors = {}, {}
        return True

    def _project(self) -> None:
        for layer in self.layers:
            shifted = layer.parameter.detach().float().clone()
            first = layer.name not in self.duals
            if not first:
                shifted += self.duals[layer.name]
            projected = shifted * final_mask(layer, shifted.square(), self.rule)
            self.duals[layer.name] = torch.zeros_like(shifted) if first else shifted - projected
            self.anchors[layer.name] = projected - self.duals[layer.name]
        self._make_pull()

    def _make_pull(self) -> None:
        self.pull = Pull([(layer.parameter, self.anchors[layer.name]) for layer in self.layers], self.settings.rho)

    def state_dict(self) -> State:
        return {"pruned": self.pruned, "duals": dict(self.duals), "anchors": dict(self.anchors)}

    def load_state_dict(self, state: State) -> None:
        self.pruned, self.pull = bool(state["pruned"]), None
        devices = {layer.name: layer.parameter.device for layer in self.layers}
        self.duals = {name: value.to(devices[name]) for name, value in state["duals"].items()}
        self.anchors = {name: value.to(devices[name]) for name, value in state["anchors"].items()}
        if self.anchors:
            self._make_pull()
