"""Deep rewiring: every connection keeps the sign it was born with, and one that crosses zero dies.

As many connections as died are born at random, at zero and with a random sign, so the network is as sparse in every
step as at its end. An L1 pull lets the useless ones reach zero; noise on the gradient makes of it the source's random
walk over networks. From 75 % of the training on the masks are frozen.

Source: Bellec et al., "Deep rewiring: training very sparse deep networks" (arXiv 1711.05136).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.core.choices import Fine
from autoprune.sparsity.ranking import top_mask
from autoprune.trainers.dynamic import Dynamic
from autoprune.trainers.method import METHODS, Clock, Method, PrunedLayer, State, check_setting, read_settings
from autoprune.trainers.penalty import Decay
from autoprune.trainers.score import seed_of

_SIGNS, _NOISE = 1_000_000_007, 1_000_000_009  # draws of one step that must differ


@dataclass(frozen=True, slots=True)
class DeepRSettings:
    """Parameters of deep rewiring.

    Attributes:
        l1: Strength of the pull towards zero, the source's α.
        noise: Standard deviation of the noise on every gradient; the source's is √(2T/η) at temperature T.
        every: Steps between two rewirings; the source rewires after each.
        stop: Share of the training after which masks are frozen.
        seed: Of every draw.
    """

    l1: float = 1e-4
    noise: float = 0.0
    every: int = 1
    stop: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("l1", "noise"):
            check_setting("deepr", field, getattr(self, field), getattr(self, field) >= 0, "0 or more")
        check_setting("deepr", "every", self.every, self.every >= 1, "1 or more")
        check_setting("deepr", "stop", self.stop, 0 < self.stop <= 1, "above 0 and at most 1")


@METHODS.register("deepr")
class DeepR(Dynamic):
    """Deep rewiring as a method of a session; its nature is single weights, so it executes ``fine`` choices only."""

    name = "deepr"
    settings_class = DeepRSettings
    kinds = (Fine,)

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        Method.__init__(self, layers, clock, settings)
        self.chosen = read_settings(DeepRSettings, self.name, settings)
        self.seed = self.chosen.seed
        self.last = min(clock.steps - 1, max(1, round(self.chosen.stop * clock.steps)))
        self.decay = Decay([layer.parameter for layer in layers], self.chosen.l1)
        self.signs: dict[str, Tensor] = {}
        self.frozen = False
        self.exchanges = 0

    def _exchanges(self, step: int) -> bool:
        return 0 < step < self.last and step % self.chosen.every == 0

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        if self.frozen:
            return
        self.decay.add_gradients(scale)
        if self.chosen.noise > 0:
            for layer in self.layers:
                if layer.parameter.grad is not None:
                    noise = self._normal(layer, step + _NOISE) * (self.chosen.noise * scale)
                    layer.parameter.grad.add_(noise.to(layer.parameter.grad.dtype))

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        if step == 0:
            for layer in self.layers:
                self._set(layer, self._draw(layer, 0), self._wanted(layer))
                self.signs[layer.name] = _sign(layer.parameter.detach())
        elif self._exchanges(step):
            for layer in self.layers:
                self._rewire(layer, step)
            self.exchanges += 1
        freeze = step >= self.last and not self.frozen
        self.frozen = self.frozen or freeze
        return step == 0 or self._exchanges(step) or freeze

    def _rewire(self, layer: PrunedLayer, step: int) -> None:
        assert layer.mask is not None
        sign, weight = self.signs[layer.name], layer.parameter
        crossed = layer.mask & (weight.detach() * sign < 0)
        survivors = layer.mask & ~crossed
        draw = self._draw(layer, step).reshape(weight.shape)
        born = top_mask(draw.masked_fill(survivors, -1.0).reshape(1, -1), int(crossed.sum())).reshape(weight.shape)
        weight[born] = 0.0
        random_sign = _sign(self._normal(layer, step + _SIGNS))
        self.signs[layer.name] = torch.where(born, random_sign, sign)
        layer.set_mask(survivors | born)

    def _normal(self, layer: PrunedLayer, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, step, layer.name))
        return torch.randn(layer.parameter.shape, generator=generator).to(layer.parameter.device)

    def state_dict(self) -> State:
        return {**super().state_dict(), "signs": dict(self.signs)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        devices = {layer.name: layer.parameter.device for layer in self.layers}
        self.signs = {name: sign.to(devices[name]) for name, sign in state["signs"].items()}


def _sign(value: Tensor) -> Tensor:
    """Return 1 or −1 as int8; 1 for zero."""
    return torch.where(value < 0, -1, 1).to(torch.int8)
