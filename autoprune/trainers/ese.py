"""Load-balanced pruning: every processing element of an accelerator gets equally many weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.core.choices import Fine
from autoprune.sparsity.ranking import kept_count, top_mask
from autoprune.trainers.method import METHODS, PrunedLayer, check_setting, read_settings
from autoprune.trainers.projection import Projection, Rule
from autoprune.trainers.schedule import make_era
from autoprune.trainers.scheduled import CubicSchedule, Parts, Scheduled


@dataclass(frozen=True, slots=True)
class ESESettings:
    """Parameters of load-balanced pruning.

    Attributes:
        elements: N, processing elements; row i goes to element i mod N. The source's accelerator has 32.
        era_start, era_length: As in Campfire; None: after 30 % of the epochs, for 30 %.
    """

    elements: int = 32
    era_start: int | None = None
    era_length: int | None = None

    def __post_init__(self) -> None:
        check_setting("ese", "elements", self.elements, self.elements >= 1, "1 or more")


class DealtProjection(Projection):
    """Single weights, the same sparsity in every processing element's part of the matrix.

    Args:
        elements: N.
    """

    def __init__(self, elements: int) -> None:
        super().__init__(Rule())
        self.elements = elements

    def mask(self, layer: PrunedLayer, score: Tensor, progress: float) -> Tensor:
        assert isinstance(layer.choice, Fine)
        keep_frac = 1.0 - progress * (1.0 - layer.choice.keep)
        rows = score.flatten(1)
        mask = torch.zeros_like(rows, dtype=torch.bool)
        for first in range(min(self.elements, len(rows))):
            part = rows[first :: self.elements]
            count = kept_count(part.numel(), keep_frac)
            mask[first :: self.elements] = top_mask(part.reshape(1, -1), count).reshape(part.shape)
        mask = mask.reshape(score.shape)
        return mask if layer.mask is None else mask & layer.mask


@METHODS.register("ese")
class ESE(Scheduled):
    """Load-balanced pruning along Eq. 1: rows are dealt to N processing elements, each part equally sparse.

    Its nature is single weights, so it executes ``fine`` choices only; the policy's density holds in every element's
    part, rounded up to whole weights there.
    Source: Han et al., "ESE: efficient speech recognition engine" (arXiv 1612.00694).
    """

    name = "ese"
    settings_class = ESESettings
    kinds = (Fine,)

    def make_parts(self, settings: object | None) -> Parts:
        chosen = read_settings(ESESettings, self.name, settings)
        era = make_era(self.clock.epochs, chosen.era_start, chosen.era_length)
        return Parts(CubicSchedule(era, self.clock), DealtProjection(chosen.elements))
