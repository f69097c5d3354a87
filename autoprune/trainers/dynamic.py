"""Dynamic sparse training: sparse from the first step on, units dropped and regrown while it trains.

Every ΔT steps a share α of each layer's living units with the smallest mean |w| is dropped, and as many are grown:

| method | grown where |
|---|---|
| set | at random |
| rigl | the gradient of the whole weight is largest |
| dsr | at random, in the layers where most units survived a threshold common to all layers |

α falls from 0.3 by half a cosine until 75 % of the training, from when on the masks are frozen. Grown weights start at
zero. The policy says how dense each layer is, where the sources take one density for the network; a unit is what the
choice keeps or drops whole, so shares hold. The first step of a training is still dense: its masks are drawn after it.
RigL's own update step does no weight update; here it does, with the old masks.

Sources: Mocanu et al. (SET, arXiv 1707.04780), Evci et al. (RigL, arXiv 1911.11134), Mostafa & Wang (DSR, arXiv
1902.05967).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from autoprune.sparsity.masks import target_of
from autoprune.sparsity.ranking import top_mask
from autoprune.sparsity.units import UNIT_KINDS, unit_mask, unit_size, unit_values
from autoprune.trainers.method import METHODS, Clock, Method, PrunedLayer, State, check_setting, read_settings
from autoprune.trainers.score import seed_of


@dataclass(frozen=True, slots=True)
class DynamicSettings:
    """Parameters of dynamic sparse training.

    Attributes:
        every: ΔT, steps between two exchanges.
        fraction: α, share of the living units that the first exchange moves.
        stop: Share of the training after which masks are frozen.
        seed: Of the first masks and of random growth.
        split: For dsr: the ``policy``'s split over the layers comes back when masks are frozen, or the ``learned`` one
            stays (the total is the policy's either way).
    """

    every: int = 100
    fraction: float = 0.3
    stop: float = 0.75
    seed: int = 0
    split: Literal["policy", "learned"] = "policy"

    def __post_init__(self) -> None:
        name = "dynamic"
        check_setting(name, "every", self.every, self.every >= 1, "1 or more")
        check_setting(name, "fraction", self.fraction, 0 < self.fraction < 1, "above 0 and below 1")
        check_setting(name, "stop", self.stop, 0 < self.stop <= 1, "above 0 and at most 1")
        check_setting(name, "split", self.split, self.split in ("policy", "learned"), "'policy' or 'learned'")


def moved_fraction(step: int, last: int, fraction: float) -> float:
    """Return α(t) = α/2·(1 + cos(πt/T_end)), the share of living units moved at ``step``; 0 from ``last`` on.

    Source: RigL (arXiv 1911.11134) Eq. 1.
    """
    return 0.0 if step >= last else fraction / 2.0 * (1.0 + math.cos(math.pi * step / last))


def exchange(alive_U: Tensor, worth_U: Tensor, growth_U: Tensor, drop: int, count: int) -> Tensor:
    """Return the living units after an exchange, (U,) boolean.

    Args:
        alive_U: Living units.
        worth_U: Mean |w| of each unit.
        growth_U: What a dead unit is grown by; a unit that is dropped now is a candidate like the others.
        drop: Units that die first.
        count: Living units wanted at the end.
    """
    stay = min(count, int(alive_U.sum()) - drop)
    survivors_U = top_mask(worth_U.masked_fill(~alive_U, -1.0)[None], stay)[0] & alive_U
    grown_U = top_mask(growth_U.float().masked_fill(survivors_U, -math.inf)[None], count - int(survivors_U.sum()))[0]
    return survivors_U | (grown_U & ~survivors_U)


class Dynamic(Method):
    """Drop and regrow; subclasses say where units are grown."""

    settings_class: ClassVar[type[Any]] = DynamicSettings
    monotone = False
    kinds = UNIT_KINDS
    needs_gradient: ClassVar[bool] = False

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        super().__init__(layers, clock, settings)
        self.settings = read_settings(DynamicSettings, self.name, settings)
        self.seed = self.settings.seed
        self.last = min(clock.steps - 1, max(1, round(self.settings.stop * clock.steps)))
        self.gradients: dict[str, Tensor] = {}
        self.frozen = False
        self.exchanges = 0

    def phase(self, epoch: int) -> str:
        return "dynamic" if epoch * self.clock.steps_per_epoch < self.last else "frozen"

    def finished(self) -> bool:
        return self.frozen

    def _exchanges(self, step: int) -> bool:
        return 0 < step < self.last and step % self.settings.every == 0

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        if self.needs_gradient and self._exchanges(step):
            for layer in self.layers:
                if layer.parameter.grad is not None:
                    # Whole: the session masks gradients only after this. A loss scale changes no ranking.
                    self.gradients[layer.name] = layer.parameter.grad.detach().abs().float()

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        if step == 0:
            for layer in self.layers:
                self._set(layer, self._draw(layer, 0), self._wanted(layer))
        elif self._exchanges(step):
            self._exchange(step, moved_fraction(step, self.last, self.settings.fraction))
            self.gradients = {}
            self.exchanges += 1
        freeze = step >= self.last and not self.frozen
        if freeze:
            self.frozen = True
            self._close()
        return step == 0 or self._exchanges(step) or freeze

    def _wanted(self, layer: PrunedLayer) -> int:
        return target_of(layer.parameter, layer.choice).units

    def _alive(self, layer: PrunedLayer) -> Tensor:
        assert layer.mask is not None
        return unit_values(layer.mask, layer.choice) > 0.5

    def _worth(self, layer: PrunedLayer) -> Tensor:
        return unit_values(layer.parameter.detach().abs(), layer.choice)

    def _draw(self, layer: PrunedLayer, step: int) -> Tensor:
        """Return a random number per unit, by seed, step and layer: a resumed training draws the same."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, step, layer.name))
        units = len(unit_values(layer.parameter.detach(), layer.choice))
        return torch.rand(units, generator=generator).to(layer.parameter.device)

    def _growth(self, layer: PrunedLayer, step: int) -> Tensor:
        """Return what a layer's dead units are grown by, (U,)."""
        return self._draw(layer, step)

    def _exchange(self, step: int, fraction: float) -> None:
        for layer in self.layers:
            alive_U = self._alive(layer)
            count = int(alive_U.sum())
            drop = int(fraction * count)
            kept_U = exchange(alive_U, self._worth(layer), self._growth(layer, step), drop, count)
            layer.set_mask(unit_mask(kept_U, layer.parameter, layer.choice))

    def _set(self, layer: PrunedLayer, value_U: Tensor, count: int) -> None:
        layer.set_mask(unit_mask(top_mask(value_U[None], count)[0], layer.parameter, layer.choice))

    def _close(self) -> None:
        """Do what freezing the masks needs."""

    def state_dict(self) -> State:
        return {"frozen": self.frozen, "exchanges": self.exchanges}

    def load_state_dict(self, state: State) -> None:
        self.frozen, self.exchanges = bool(state["frozen"]), int(state["exchanges"])


@METHODS.register("set")
class SET(Dynamic):
    """Sparse evolutionary training: random growth; see the module."""

    name = "set"


@METHODS.register("rigl")
class RigL(Dynamic):
    """Growth where the dense gradient is largest; see the module.

    An exchange needs the whole weight gradient, one of a step's three products: a third of a scoring pass each.
    """

    name = "rigl"
    needs_gradient = True

    @property
    def scoring_passes(self) -> float:
        return self.exchanges / 3.0

    def _growth(self, layer: PrunedLayer, step: int) -> Tensor:
        gradient = self.gradients.get(layer.name)
        return self._draw(layer, step) if gradient is None else unit_values(gradient, layer.choice)


@METHODS.register("dsr")
class DSR(Dynamic):
    """Dynamic sparse reparametrisation: density moves between layers whose units are of one size; see the module.

    The source adapts its threshold so that about a fixed share falls below it; here the threshold is that share's
    quantile, exactly.
    """

    name = "dsr"

    def _exchange(self, step: int, fraction: float) -> None:
        for layers in self._families():
            alive = [self._alive(layer) for layer in layers]
            worth = [self._worth(layer) for layer in layers]
            drops = self._drops(alive, worth, fraction)
            survivors = [int(a.sum()) - drop for a, drop in zip(alive, drops, strict=True)]
            grown = shares(sum(drops), survivors, [len(a) - s for a, s in zip(alive, survivors, strict=True)])
            for layer, a, w, drop, left, more in zip(layers, alive, worth, drops, survivors, grown, strict=True):
                kept_U = exchange(a, w, self._draw(layer, step), drop, left + more)
                layer.set_mask(unit_mask(kept_U, layer.parameter, layer.choice))

    def _families(self) -> list[list[PrunedLayer]]:
        families: dict[int, list[PrunedLayer]] = {}
        for layer in self.layers:
            families.setdefault(unit_size(layer.choice, layer.parameter), []).append(layer)
        return list(families.values())

    @staticmethod
    def _drops(alive: Sequence[Tensor], worth: Sequence[Tensor], fraction: float) -> list[int]:
        """Return how many living units of each layer are among the lowest of all; at least one a layer survives."""
        living = [w[a].cpu() for a, w in zip(alive, worth, strict=True)]
        owner = torch.cat([torch.full((len(w),), index) for index, w in enumerate(living)])
        count = int(fraction * len(owner))
        lowest = torch.cat(living).argsort(stable=True)[:count]
        drops = torch.bincount(owner[lowest], minlength=len(living)).tolist()
        return [min(int(drop), len(w) - 1) for drop, w in zip(drops, living, strict=True)]

    def _close(self) -> None:
        if self.settings.split == "learned":
            return
        for layer in self.layers:
            alive_U, count = self._alive(layer), self._wanted(layer)
            kept_U = exchange(alive_U, self._worth(layer), self._draw(layer, self.last), 0, count)
            layer.set_mask(unit_mask(kept_U, layer.parameter, layer.choice))


def shares(total: int, weights: Sequence[int], room: Sequence[int]) -> list[int]:
    """Return ``total`` dealt in proportion to ``weights``, none above its ``room``; what is left goes where room is.

    Args:
        total: At most the sum of ``room``.
        weights: One or more per receiver, not all zero.
        room: Most that each receiver takes.
    """
    whole = sum(weights)
    dealt = [min(free, total * weight // whole) for weight, free in zip(weights, room, strict=True)]
    order = sorted(range(len(dealt)), key=lambda index: (-weights[index], index))
    left = total - sum(dealt)
    while left:
        for index in order:
            if left and dealt[index] < room[index]:
                dealt[index] += 1
                left -= 1
    return dealt
