"""Campfire: regularisation-free structured sparse training (METHODS §1).

Dense until the pruning era; in the era the masks shrink along Eq. 1 by |W|, then they are frozen. A removed weight
never returns.
The source recomputes the mask after every step; at one sparsity that changes nothing (removed weights rank
last, and the count is the same), so here the masks are recomputed when the scheduled sparsity moves: once an epoch, or
every ``every`` steps with ``schedule="step"``.

The way to a choice: ``fine``, ``block`` and ``ck`` keep 1 − s of their units. ``window``, ``combined`` and ``pattern``
have two axes, entries kept in a window and kernels kept in the layer; entries go down evenly to the choice's own
number and kernels make up the rest of the sparsity. Neither axis ever falls below its final value, so the last mask has
exactly the choice's counts. Patterns are assigned once, at the first mask; entries outside one leave by their |W|.

Source: Campfire, arXiv 2001.03253.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from autoprune.core.choices import CK, Block, Choice, Combined, Fine, Pattern, Window
from autoprune.sparsity.masks import Balance, KernelScore, Target, assign_patterns, choose_pool, project, target_of
from autoprune.sparsity.patterns import POOL_KINDS, PoolKind
from autoprune.sparsity.ranking import kept_count
from autoprune.trainers.method import METHODS, Clock, Method, PrunedLayer, State, check_setting, read_settings
from autoprune.trainers.schedule import campfire_phase, cubic_sparsity, make_era


@dataclass(frozen=True, slots=True)
class CampfireSettings:
    """Parameters of Campfire.

    Attributes:
        era_start: e_0, first epoch of the pruning era; None: after 30 % of the epochs.
        era_length: l in epochs; None: 30 % of the epochs.
        exponent: r of Eq. 1.
        schedule: ``epoch`` holds the sparsity inside an epoch as the source does; ``step`` lets it grow every step.
        every: With ``step``, steps between two recomputations.
        kernel_score: A kernel's score: the source's ``max`` |w|, or ``sum``.
        pool: Pattern pool of pattern choices.
        balance: Rank units within the ``layer``, or within each ``filter``.
        inter_epoch: Two-axis choices remove kernels in the first half of the era and window entries in the second
            (the source's weaker variant).
    """

    era_start: int | None = None
    era_length: int | None = None
    exponent: float = 3.0
    schedule: Literal["epoch", "step"] = "epoch"
    every: int = 1
    kernel_score: KernelScore = "max"
    pool: PoolKind = "patdnn"
    balance: Balance = "layer"
    inter_epoch: bool = False

    def __post_init__(self) -> None:
        name = "campfire"
        check_setting(name, "exponent", self.exponent, self.exponent > 0, "above 0")
        check_setting(name, "schedule", self.schedule, self.schedule in ("epoch", "step"), "'epoch' or 'step'")
        check_setting(name, "every", self.every, self.every >= 1, "1 or more")
        check_setting(name, "kernel_score", self.kernel_score, self.kernel_score in ("max", "sum"), "'max' or 'sum'")
        check_setting(name, "pool", self.pool, self.pool in POOL_KINDS, f"one of {', '.join(POOL_KINDS)}")
        check_setting(name, "balance", self.balance, self.balance in ("layer", "filter"), "'layer' or 'filter'")


def target_at(
    weight: Tensor, choice: Choice, progress: float, balance: Balance, *, inter_epoch: bool = False
) -> Target:
    """Return what stays of a layer part of the way to its choice.

    Args:
        weight: (K, C, R, S) or (O, I).
        choice: What is reached at ``progress`` 1.
        progress: Scheduled sparsity over the final sparsity, 0..1.
        balance: As in ``make_mask``.
        inter_epoch: Kernels in the first half of the progress, window entries in the second.
    """
    final = target_of(weight, choice, balance)
    if progress >= 1.0:
        return final
    window = weight[0, 0].numel()
    if isinstance(choice, Fine | Block | CK):
        keep = 1.0 - progress * (1.0 - choice.keep)
        return Target(max(final.units, target_of(weight, replace(choice, keep=keep), balance).units))
    if not isinstance(choice, Window | Combined | Pattern):
        return final
    whole = target_of(weight, _all_units(choice), balance).units
    if inter_epoch:
        kernels = min(1.0, 2.0 * progress)
        entries = max(0.0, 2.0 * progress - 1.0)
        return Target(
            max(final.units, kept_count(whole, 1.0 - kernels * (1.0 - final.units / whole))),
            max(final.entries, kept_count(window, 1.0 - entries * (1.0 - final.entries / window))),
        )
    entries_kept = max(final.entries, kept_count(window, 1.0 - progress * (1.0 - final.entries / window)))
    density = 1.0 - progress * (1.0 - final.units * final.entries / (whole * window))
    units = kept_count(whole, min(1.0, density * window / entries_kept))
    return Target(max(final.units, units), entries_kept)


def _all_units(choice: Window | Combined | Pattern) -> Choice:
    if isinstance(choice, Pattern):
        return replace(choice, kernels=1.0)
    return replace(choice, keep=1.0) if isinstance(choice, Combined) else choice


@METHODS.register("campfire")
class Campfire(Method):
    """Campfire as a method of a session; see the module."""

    name = "campfire"
    settings_class = CampfireSettings

    def __init__(self, layers: list[PrunedLayer], clock: Clock, settings: object | None) -> None:
        super().__init__(layers, clock, settings)
        self.settings = read_settings(CampfireSettings, self.name, settings)
        self.era = make_era(clock.epochs, self.settings.era_start, self.settings.era_length)
        self.progress = 0.0
        self.patterns: dict[str, Tensor] = {}

    def phase(self, epoch: int) -> str:
        return campfire_phase(epoch, self.era)

    def finished(self) -> bool:
        return self.progress >= 1.0

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        progress = self._progress_at(step)
        if progress <= self.progress:
            return False
        self.progress = progress
        for layer in self.layers:
            layer.set_mask(self._mask(layer, progress))
        return True

    def _progress_at(self, step: int) -> float:
        epoch: float = step // self.clock.steps_per_epoch
        if self.settings.schedule == "step" and epoch < self.era.end:
            if step % self.settings.every:
                return self.progress
            epoch = step / self.clock.steps_per_epoch
        return cubic_sparsity(epoch, self.era, 1.0, exponent=self.settings.exponent)

    def _mask(self, layer: PrunedLayer, progress: float) -> Tensor:
        score, choice, options = layer.living_score(), layer.choice, self.settings
        patterns = None
        if isinstance(choice, Pattern):
            if layer.name not in self.patterns:
                self.patterns[layer.name] = assign_patterns(score, choice, choose_pool(score, choice, options.pool))
            patterns = self.patterns[layer.name]
        target = target_at(layer.parameter, choice, progress, options.balance, inter_epoch=options.inter_epoch)
        mask = project(
            score, choice, target, patterns=patterns, kernel_score=options.kernel_score, balance=options.balance
        )
        return mask if layer.mask is None else mask & layer.mask

    def state_dict(self) -> State:
        return {"progress": self.progress, "patterns": dict(self.patterns)}

    def load_state_dict(self, state: State) -> None:
        self.progress = float(state["progress"])
        device = {layer.name: layer.parameter.device for layer in self.layers}
        self.patterns = {name: pattern.to(device[name]) for name, pattern in state["patterns"].items()}
