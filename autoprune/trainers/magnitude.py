"""Magnitude pruning: in one shot, in rounds, or gradually."""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.sparsity.masks import Balance
from autoprune.sparsity.patterns import PoolKind
from autoprune.trainers.method import METHODS, Restart, check_setting, read_settings
from autoprune.trainers.penalty import Decay
from autoprune.trainers.projection import Projection, Rule
from autoprune.trainers.schedule import TrainerError, make_era
from autoprune.trainers.scheduled import CubicSchedule, Parts, Scheduled, Staircase


@dataclass(frozen=True, slots=True)
class MagnitudeSettings:
    """Parameters of magnitude pruning.

    Attributes:
        prune_epoch: First epoch that is pruned; None: after 60 % of the epochs.
        rounds: Levels of rising sparsity; 1 is one shot.
        round_epochs: Epochs of retraining between two levels; None shares half of what is left.
        l1, l2: Strength of the penalties on the policy's weights until the last level (the source compares both).
        finetune_lr: Height of the learning-rate schedule that begins anew at the last level, relative to training's;
            the source fine-tunes at 1/10 to 1/100. 0 leaves the schedule alone.
        balance: Rank units within the ``layer``, or within each ``filter``.
        pool: Pattern pool of pattern choices.
    """

    prune_epoch: int | None = None
    rounds: int = 1
    round_epochs: int | None = None
    l1: float = 0.0
    l2: float = 0.0
    finetune_lr: float = 0.1
    balance: Balance = "layer"
    pool: PoolKind = "patdnn"

    def __post_init__(self) -> None:
        name = "magnitude"
        for field in ("l1", "l2", "finetune_lr"):
            check_setting(name, field, getattr(self, field), getattr(self, field) >= 0, "0 or more")
        check_setting(name, "rounds", self.rounds, self.rounds >= 1, "1 or more")
        few = self.round_epochs
        check_setting(name, "round_epochs", few, few is None or few >= 1, "1 or more")
        Rule(balance=self.balance, pool=self.pool).check(name)


def prune_epochs(method: str, epochs: int, first: int | None, rounds: int, apart: int | None) -> tuple[int, ...]:
    """Return the epochs at which the levels of an iterative pruning are reached.

    Args:
        method: Named in errors.
        epochs: Length of the training.
        first: First level; None: after 60 % of the epochs, earlier where the rounds need it.
        rounds: Levels.
        apart: Epochs between two; None shares half of what is left after the first.
    Raises:
        TrainerError: The last level would come after the last epoch began.
    """
    if first is None:
        first = max(0, min(int(0.6 * epochs), epochs - 1 - (rounds - 1) * (apart or 1)))
    if apart is None:
        apart = max(1, (epochs - first) // (2 * max(1, rounds - 1)))
    last = first + (rounds - 1) * apart
    if not 0 <= first <= last < epochs:
        raise TrainerError(
            f"{method}: pruning at epochs {first} to {last}: must lie between 0 and {epochs - 1}, the last of {epochs} "
            "epochs; lower prune_epoch, rounds or round_epochs, or train longer."
        )
    return tuple(range(first, last + 1, apart)) if rounds > 1 else (first,)


@METHODS.register("magnitude")
class Magnitude(Scheduled):
    """Train, prune the lowest |w|, fine-tune; iteratively with ``rounds`` above 1, each level equally much sparser.

    Source: Han et al., "Learning both weights and connections" (arXiv 1506.02626).
    """

    name = "magnitude"
    settings_class = MagnitudeSettings

    def make_parts(self, settings: object | None) -> Parts:
        self.settings = read_settings(MagnitudeSettings, self.name, settings)
        chosen = self.settings
        self.levels = prune_epochs(
            self.name, self.clock.epochs, chosen.prune_epoch, chosen.rounds, chosen.round_epochs
        )
        decay = Decay([layer.parameter for layer in self.layers], chosen.l1, chosen.l2)
        rule = Rule(balance=chosen.balance, pool=chosen.pool)
        return Parts(
            Staircase(self.levels, self.clock),
            Projection(rule),
            regulariser=decay if chosen.l1 > 0 or chosen.l2 > 0 else None,
        )

    @property
    def restarts(self) -> tuple[Restart, ...]:
        if self.settings.finetune_lr == 0 or self.levels[-1] == 0:
            return ()
        return (Restart(self.levels[-1], self.settings.finetune_lr),)

    def regularised(self, step: int) -> bool:
        return self.progress < 1.0


@dataclass(frozen=True, slots=True)
class AGPSettings:
    """Parameters of gradual pruning.

    Attributes:
        era_start: First epoch that is pruned; None: after 30 % of the epochs.
        era_length: Epochs until the final sparsity; None: 30 % of the epochs.
        every: Steps between two recomputations; the source takes about 100.
        exponent: Of the schedule; the source's is cubic.
        balance: Rank units within the ``layer``, or within each ``filter``.
        pool: Pattern pool of pattern choices.
    """

    era_start: int | None = None
    era_length: int | None = None
    every: int = 100
    exponent: float = 3.0
    balance: Balance = "layer"
    pool: PoolKind = "patdnn"

    def __post_init__(self) -> None:
        check_setting("agp", "every", self.every, self.every >= 1, "1 or more")
        check_setting("agp", "exponent", self.exponent, self.exponent > 0, "above 0")
        Rule(balance=self.balance, pool=self.pool).check("agp")


@METHODS.register("agp")
class AGP(Scheduled):
    """Automated gradual pruning: |w| along the cubic schedule, every ~100 steps.

    The source prunes single weights; every other choice goes the same way through its own units.
    Source: Zhu & Gupta, "To prune, or not to prune" (arXiv 1710.01878).
    """

    name = "agp"
    settings_class = AGPSettings

    def make_parts(self, settings: object | None) -> Parts:
        chosen = read_settings(AGPSettings, self.name, settings)
        era = make_era(self.clock.epochs, chosen.era_start, chosen.era_length)
        schedule = CubicSchedule(era, self.clock, chosen.exponent, "step", chosen.every)
        return Parts(schedule, Projection(Rule(balance=chosen.balance, pool=chosen.pool)))
