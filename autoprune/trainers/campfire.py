"""Campfire: regularisation-free structured sparse training (METHODS §1).

Dense until the pruning era; in the era the masks shrink along Eq. 1 by |W|, then they are frozen. A removed weight
never returns.
The source recomputes the mask after every step; at one sparsity that changes nothing (removed weights rank
last, and the count is the same), so here the masks are recomputed when the scheduled sparsity moves: once an epoch, or
every ``every`` steps with ``schedule="step"``. How each kind of choice is approached is told in ``projection``.

Source: Campfire, arXiv 2001.03253.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from autoprune.sparsity.masks import Balance, KernelScore
from autoprune.sparsity.patterns import PoolKind
from autoprune.trainers.method import METHODS, check_setting, read_settings
from autoprune.trainers.projection import Projection, Rule
from autoprune.trainers.schedule import make_era
from autoprune.trainers.scheduled import CubicSchedule, Parts, Scheduled


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
        max_nonzero: Weights that a window choice keeps at most in a kernel as soon as the sparsity rises; the
            source fixes a maximum for its hardware, 2 by its table of true sparsities.
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
    max_nonzero: int | None = None

    def __post_init__(self) -> None:
        name = "campfire"
        check_setting(name, "exponent", self.exponent, self.exponent > 0, "above 0")
        check_setting(name, "schedule", self.schedule, self.schedule in ("epoch", "step"), "'epoch' or 'step'")
        check_setting(name, "every", self.every, self.every >= 1, "1 or more")
        self.rule.check(name)

    @property
    def rule(self) -> Rule:
        """How units are ranked."""
        return Rule(self.kernel_score, self.balance, self.pool, self.inter_epoch, self.max_nonzero)


def window_entries(sparsity: float, window: int = 9, max_nonzero: int | None = None) -> int:
    """Return how many weights a window choice keeps for a nominal sparsity: ``min(max, floor(window·(1 − s)))``, ≥ 1.

    The true sparsity is higher than the nominal one by the rounding: .48, .58, .69, .84 of the source's whole network
    at .2, .4, .6, .8 agree with a maximum of 2 (METHODS §1).

    Args:
        sparsity: Nominal, 0..1.
        window: Weights of a kernel.
        max_nonzero: The source's maximum; None sets none.
    """
    entries = max(1, math.floor(window * (1.0 - sparsity) + 1e-6))
    return entries if max_nonzero is None else min(max_nonzero, entries)


@METHODS.register("campfire")
class Campfire(Scheduled):
    """Campfire as a method of a session; see the module."""

    name = "campfire"
    settings_class = CampfireSettings

    def make_parts(self, settings: object | None) -> Parts:
        chosen = read_settings(CampfireSettings, self.name, settings)
        for layer in self.layers:
            chosen.rule.check_layer(self.name, layer)
        era = make_era(self.clock.epochs, chosen.era_start, chosen.era_length)
        schedule = CubicSchedule(era, self.clock, chosen.exponent, chosen.schedule, chosen.every)
        return Parts(schedule, Projection(chosen.rule))
