"""NeST: a sparse seed grows connections where the gradient is largest, then magnitude pruning takes it to its size.

Seed: a share of the policy's density, at random. Growth, until a share of the training: every ΔT steps the units with
the largest |dense gradient| join, up to ``peak`` times the policy's density. Pruning: the smallest |w| leave along the
cubic schedule; then the masks are frozen. Grown weights start at zero, where the source gives them a first value made
of their gradient. What the source grows and prunes beside connections, neurons and feature maps, are other choices'
units here.

Source: Dai et al., "NeST: a neural network synthesis tool based on a grow-and-prune paradigm" (arXiv 1711.02017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoprune.sparsity.units import unit_mask, unit_values
from autoprune.trainers.dynamic import Dynamic, exchange
from autoprune.trainers.method import METHODS, Clock, Method, PrunedLayer, check_setting, read_settings
from autoprune.trainers.schedule import Era, TrainerError, cubic_sparsity


@dataclass(frozen=True, slots=True)
class NeSTSettings:
    """Parameters of growing and pruning.

    Attributes:
        seed_share: Density of the seed, relative to the policy's.
        peak: Density at the end of the growth, relative to the policy's; a layer never exceeds its weights.
        grown, pruned: Shares of the training at which growth and pruning end.
        every: ΔT, steps between two changes.
        seed: Of the random seed network.
    """

    seed_share: float = 0.5
    peak: float = 1.5
    grown: float = 0.3
    pruned: float = 0.6
    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_setting("nest", "seed_share", self.seed_share, 0 < self.seed_share <= 1, "above 0 and at most 1")
        check_setting("nest", "peak", self.peak, self.peak >= 1, "1 or more")
        check_setting("nest", "grown", self.grown, 0 <= self.grown <= 1, "between 0 and 1")
        check_setting("nest", "pruned", self.pruned, self.grown <= self.pruned < 1, "between grown and 1")
        check_setting("nest", "every", self.every, self.every >= 1, "1 or more")


@METHODS.register("nest")
class NeST(Dynamic):
    """Grow and prune as a method of a session; see the module.

    A growth step needs the whole weight gradient, one of a step's three products: a third of a scoring pass each.
    """

    name = "nest"
    settings_class = NeSTSettings

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        Method.__init__(self, layers, clock, settings)
        self.chosen = read_settings(NeSTSettings, self.name, settings)
        self.grown = round(self.chosen.grown * clock.steps)
        self.last = max(1, round(self.chosen.pruned * clock.steps))
        if self.last > clock.steps - 1:
            raise TrainerError(f"nest: a training of {clock.steps} steps is too short for it; train longer.")
        self.gradients = {}
        self.frozen = False
        self.exchanges = 0
        self.seed = self.chosen.seed

    @property
    def scoring_passes(self) -> float:
        return self.exchanges / 3.0

    def phase(self, epoch: int) -> str:
        step = epoch * self.clock.steps_per_epoch
        if step < self.grown:
            return "growth"
        return "pruning" if step < self.last else "frozen"

    def _grows(self, step: int) -> bool:
        return 0 < step < self.grown and step % self.chosen.every == 0

    def _exchanges(self, step: int) -> bool:
        return self._grows(step)

    needs_gradient = True

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        if self.frozen:
            return False
        freeze = step >= self.last
        prunes = self.grown <= step and step % self.chosen.every == 0
        if step == 0:
            for layer in self.layers:
                self._set(layer, self._draw(layer, 0), self._count(layer, 0))
        elif self._grows(step):
            for layer in self.layers:
                self._grow(layer, step)
            self.gradients = {}
            self.exchanges += 1
        if freeze or (prunes and step > 0):
            for layer in self.layers:
                self._prune(layer, step)
        self.frozen = freeze
        return step == 0 or self._grows(step) or prunes or freeze

    def _count(self, layer: PrunedLayer, step: int) -> int:
        """Return how many units a layer has after a step."""
        units = len(unit_values(layer.parameter.detach(), layer.choice))
        wanted = self._wanted(layer)
        least = max(1, round(self.chosen.seed_share * wanted))
        most = max(wanted, min(units, round(self.chosen.peak * wanted)))
        if step < self.grown:
            return least + (most - least) * step // self.grown
        if step >= self.last:
            return wanted
        era = Era(self.grown, self.last - self.grown)
        return round(cubic_sparsity(step, era, float(wanted), initial=float(most)))

    def _grow(self, layer: PrunedLayer, step: int) -> None:
        alive_U = self._alive(layer)
        gradient = self.gradients.get(layer.name)
        growth_U = self._draw(layer, step) if gradient is None else unit_values(gradient, layer.choice)
        count = max(int(alive_U.sum()), self._count(layer, step))
        kept_U = exchange(alive_U, self._worth(layer), growth_U, 0, count)
        layer.set_mask(unit_mask(kept_U, layer.parameter, layer.choice))

    def _prune(self, layer: PrunedLayer, step: int) -> None:
        alive_U, count = self._alive(layer), self._count(layer, step)
        if step < self.last:
            count = min(count, int(alive_U.sum()))
        # At the end a seed that hardly grew is below the policy: the rest is drawn at random.
        kept_U = exchange(alive_U, self._worth(layer), self._draw(layer, step), 0, count)
        layer.set_mask(unit_mask(kept_U, layer.parameter, layer.choice))
