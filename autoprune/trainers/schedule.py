"""When pruning happens: pure functions of the epoch. Epochs count from 0 and may be fractional."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoprune.core.errors import AutopruneError

CampfirePhase = Literal["dense", "era", "frozen"]
ClickTrainPhase = Literal["warmup", "lasso", "pruned"]


class TrainerError(AutopruneError):
    """Settings that a training of this length cannot follow, or a model that cannot be trained under a policy."""


@dataclass(frozen=True, slots=True)
class Era:
    """The pruning era: its first epoch and its length in epochs; the final sparsity holds from its end on."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """First epoch after the era."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Stages:
    """ClickTrain's two boundaries: dense before ``warmup`` (e_c), hard-pruned from ``hard`` (e_h) on."""

    warmup: int
    hard: int


def cubic_sparsity(epoch: float, era: Era, final: float, *, initial: float = 0.0, exponent: float = 3.0) -> float:
    """Return the scheduled sparsity ``s_f + (s_i − s_f)·(1 − (e − e_0)/l)^r``.

    Args:
        epoch: e; give a whole number for a sparsity that is constant inside an epoch.
        era: e_0 and l; of length 0 the schedule is a step.
        final: s_f, 0..1.
        initial: s_i, the sparsity up to e_0.
        exponent: r.
    Source: Campfire (arXiv 2001.03253) Eq. 1, after Zhu & Gupta (arXiv 1710.01878).
    """
    if epoch >= era.end:
        return final
    if epoch < era.start:
        return initial
    return final + float((initial - final) * (1.0 - (epoch - era.start) / era.length) ** exponent)


def campfire_phase(epoch: int, era: Era) -> CampfirePhase:
    """Return Campfire's phase in an epoch."""
    if epoch < era.start:
        return "dense"
    return "era" if epoch < era.end else "frozen"


def clicktrain_phase(epoch: int, stages: Stages) -> ClickTrainPhase:
    """Return ClickTrain's phase in an epoch."""
    if epoch < stages.warmup:
        return "warmup"
    return "lasso" if epoch < stages.hard else "pruned"


def make_era(epochs: int, start: int | None = None, length: int | None = None) -> Era:
    """Return the era of a training; by default it starts after 30 % of the epochs and takes 30 %.

    The defaults follow the source's 90 and 100 epochs (start 20–40, length 20–30).

    Raises:
        TrainerError: The era would end after the last epoch began, so that the policy's sparsity were never trained.
    """
    last = epochs - 1
    if start is None:
        start = min(int(0.3 * epochs), last if length is None else max(0, last - length))
    if length is None:
        length = max(0, min(max(1, round(0.3 * epochs)), last - start))
    if start < 0 or length < 0 or start + length > last:
        raise TrainerError(
            f"pruning era of epochs {start} to {start + length}: must begin at 0 or later and end by epoch {last}, the "
            f"last of {epochs}; lower era_start or era_length, or train longer."
        )
    return Era(start, length)


def make_stages(epochs: int, warmup: int | None = None, hard: int | None = None) -> Stages:
    """Return ClickTrain's boundaries; by default e_c = 20 % and e_h = 50 % of the epochs.

    The published savings (METHODS §2) imply e_h near half of the training.

    Raises:
        TrainerError: Not 0 ≤ e_c ≤ e_h < epochs.
    """
    last = epochs - 1
    if warmup is None:
        warmup = min(int(0.2 * epochs), last if hard is None else hard)
    if hard is None:
        hard = min(max(warmup + 1, round(0.5 * epochs)), max(last, warmup))
    if not 0 <= warmup <= hard <= last:
        raise TrainerError(
            f"warmup_epochs={warmup}, hard_epoch={hard}: must satisfy 0 <= warmup_epochs <= hard_epoch <= {last}, the "
            f"last of {epochs} epochs."
        )
    return Stages(warmup, hard)
