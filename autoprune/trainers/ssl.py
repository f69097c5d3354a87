"""Structured sparsity learning: a group lasso over whole structures while training, then the weakest leave for good.

λ Σ_groups ‖W_group‖, a group being what the choice removes whole: filters and input channels (channels), the filters of
a block at one position (block: the source's shape-wise groups where a block is as tall as the layer), kernels (ck).

Source: Wen et al., "Learning structured sparsity in deep neural networks" (arXiv 1608.03665).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autoprune.core.choices import CK, Block, Channels
from autoprune.sparsity.masks import Balance
from autoprune.trainers.magnitude import prune_epochs
from autoprune.trainers.method import METHODS, PrunedLayer, Restart, check_setting, read_settings
from autoprune.trainers.penalty import GroupLasso, Term
from autoprune.trainers.projection import Projection, Rule
from autoprune.trainers.scheduled import Parts, Scheduled, Staircase


@dataclass(frozen=True, slots=True)
class SSLSettings:
    """Parameters of structured sparsity learning.

    Attributes:
        prune_epoch: Epoch at which the structures go; None: after 60 % of the epochs.
        lasso: λ.
        finetune_lr: Height of the learning-rate schedule that begins anew at the pruning; 0 leaves it alone.
        balance: Rank units within the ``layer``, or within each ``filter``.
    """

    prune_epoch: int | None = None
    lasso: float = 2.5e-4
    finetune_lr: float = 0.1
    balance: Balance = "layer"

    def __post_init__(self) -> None:
        for field in ("lasso", "finetune_lr"):
            check_setting("ssl", field, getattr(self, field), getattr(self, field) >= 0, "0 or more")
        Rule(balance=self.balance).check("ssl")


def structure_terms(layer: PrunedLayer) -> list[Term]:
    """Return the lasso's terms over all structures of a layer."""
    everything = torch.ones_like(layer.parameter, dtype=torch.bool)
    if isinstance(layer.choice, Channels):
        return [Term(layer.parameter, everything, by="filter"), Term(layer.parameter, everything, by="channel")]
    return [Term(layer.parameter, everything, layer.choice.filters if isinstance(layer.choice, Block) else 1)]


@METHODS.register("ssl")
class SSL(Scheduled):
    """Structured sparsity learning as a method of a session; see the module."""

    name = "ssl"
    settings_class = SSLSettings
    kinds = (Channels, Block, CK)

    def make_parts(self, settings: object | None) -> Parts:
        self.settings = read_settings(SSLSettings, self.name, settings)
        self.levels = prune_epochs(self.name, self.clock.epochs, self.settings.prune_epoch, 1, None)
        terms = [term for layer in self.layers for term in structure_terms(layer)]
        lasso = GroupLasso(terms, self.settings.lasso) if terms and self.settings.lasso > 0 else None
        return Parts(
            Staircase(self.levels, self.clock), Projection(Rule(balance=self.settings.balance)), regulariser=lasso
        )

    @property
    def restarts(self) -> tuple[Restart, ...]:
        if self.settings.finetune_lr == 0 or self.levels[0] == 0:
            return ()
        return (Restart(self.levels[0], self.settings.finetune_lr),)

    def regularised(self, step: int) -> bool:
        return self.progress < 1.0
