"""From scores to masks on the way to a choice: what stays at a given progress, and the mask that keeps it.

A choice has one axis or two. ``fine``, ``block``, ``tile``, ``ck`` and ``channels`` keep 1 − s of their units, ``nm``
fewer entries of every group. ``window``, ``combined`` and ``pattern`` have entries kept in a window and units kept in
the layer; entries go down evenly to the choice's own number and units make up the rest of the sparsity. Neither axis
ever falls below its final value, so the last mask has exactly the choice's counts. Patterns are assigned once, at the
first mask; entries outside one leave by their score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from autoprune.core.choices import CK, NM, Block, Channels, Choice, Combined, Fine, Pattern, Tile, Window
from autoprune.sparsity.masks import (
    Balance,
    KernelScore,
    Target,
    assign_patterns,
    choose_pool,
    make_mask,
    project,
    target_of,
)
from autoprune.sparsity.patterns import POOL_KINDS, PoolKind
from autoprune.sparsity.ranking import kept_count
from autoprune.trainers.method import PrunedLayer, State, check_setting
from autoprune.trainers.schedule import TrainerError


@dataclass(frozen=True, slots=True)
class Rule:
    """How units are ranked and in which order the axes of a choice shrink.

    Attributes:
        kernel_score: A kernel's score: ``sum`` over its weights, or Campfire's ``max``.
        balance: Rank units within the ``layer``, or within each ``filter`` (group).
        pool: Pattern pool of pattern choices.
        inter_epoch: Units go in the first half of the progress, window entries in the second.
        max_nonzero: Entries that a window choice keeps at most as soon as pruning begins; None sets no limit.
    """

    kernel_score: KernelScore = "sum"
    balance: Balance = "layer"
    pool: PoolKind = "patdnn"
    inter_epoch: bool = False
    max_nonzero: int | None = None

    def check(self, method: str) -> None:
        """Refuse values that do not exist, in the words of a method's settings.

        Raises:
            TrainerError: Naming the setting.
        """
        check_setting(method, "kernel_score", self.kernel_score, self.kernel_score in ("max", "sum"), "'max' or 'sum'")
        check_setting(method, "balance", self.balance, self.balance in ("layer", "filter"), "'layer' or 'filter'")
        check_setting(method, "pool", self.pool, self.pool in POOL_KINDS, f"one of {', '.join(POOL_KINDS)}")
        limit = self.max_nonzero
        check_setting(method, "max_nonzero", limit, limit is None or limit >= 1, "1 or more")

    def check_layer(self, method: str, layer: PrunedLayer) -> None:
        """Refuse a window choice that keeps more than ``max_nonzero``.

        Raises:
            TrainerError: Naming the layer.
        """
        limit = self.max_nonzero
        if limit is not None and isinstance(layer.choice, Window) and layer.choice.entries > limit:
            raise TrainerError(
                f"{method} setting max_nonzero={limit}: layer '{layer.name}' keeps more by its choice "
                f"{layer.choice.text}; raise max_nonzero or give a policy with fewer entries."
            )


def target_at(weight: Tensor, choice: Choice, progress: float, rule: Rule | None = None) -> Target:
    """Return what stays of a layer part of the way to its choice.

    Args:
        weight: (K, C, R, S) or (O, I).
        choice: What is reached at ``progress`` 1.
        progress: Scheduled sparsity over the final sparsity, 0..1.
        rule: The default ranks within the layer and moves both axes together.
    """
    rule = rule or Rule()
    final = target_of(weight, choice, rule.balance)
    if progress >= 1.0:
        return final
    window = weight[0, 0].numel()
    if isinstance(choice, Fine | Block | Tile | CK | Channels):
        keep = 1.0 - progress * (1.0 - choice.keep)
        return Target(max(final.units, target_of(weight, replace(choice, keep=keep), rule.balance).units))
    if isinstance(choice, NM):
        keep = 1.0 - progress * (1.0 - choice.n / choice.m)
        return Target(final.units, max(final.entries, kept_count(choice.m, keep)))
    if not isinstance(choice, Window | Combined | Pattern):
        return final
    whole = target_of(weight, _all_units(choice), rule.balance).units
    if rule.inter_epoch:
        kernels = min(1.0, 2.0 * progress)
        entries = max(0.0, 2.0 * progress - 1.0)
        return Target(
            max(final.units, kept_count(whole, 1.0 - kernels * (1.0 - final.units / whole))),
            max(final.entries, kept_count(window, 1.0 - entries * (1.0 - final.entries / window))),
        )
    entries_kept = max(final.entries, kept_count(window, 1.0 - progress * (1.0 - final.entries / window)))
    if isinstance(choice, Window):
        limit = window if rule.max_nonzero is None or progress <= 0.0 else rule.max_nonzero
        return Target(final.units, max(final.entries, min(limit, entries_kept)))
    density = 1.0 - progress * (1.0 - final.units * final.entries / (whole * window))
    units = kept_count(whole, min(1.0, density * window / entries_kept))
    return Target(max(final.units, units), entries_kept)


def _all_units(choice: Window | Combined | Pattern) -> Choice:
    if isinstance(choice, Pattern):
        return replace(choice, kernels=1.0)
    return replace(choice, keep=1.0) if isinstance(choice, Combined) else choice


def final_mask(layer: PrunedLayer, score: Tensor, rule: Rule) -> Tensor:
    """Return the mask of the choice itself, patterns chosen anew from the score.

    Args:
        layer: Its choice and weight shape are used.
        score: Shape of the weight, float32, non-negative.
        rule: How units are ranked.
    """
    pool = choose_pool(score, layer.choice, rule.pool) if isinstance(layer.choice, Pattern) else None
    return make_mask(
        layer.parameter, layer.choice, score, pool=pool, kernel_score=rule.kernel_score, balance=rule.balance
    )


class Projection:
    """Masks that only shrink, from a score and the progress; remembers each layer's patterns.

    Args:
        rule: How units are ranked.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.patterns: dict[str, Tensor] = {}

    def mask(self, layer: PrunedLayer, score: Tensor, progress: float) -> Tensor:
        """Return a layer's mask, a subset of the one it has.

        Args:
            layer: With the mask so far.
            score: Shape of the weight, float32; removed weights are below zero.
            progress: Scheduled sparsity over the final sparsity, 0..1.
        """
        choice, rule = layer.choice, self.rule
        patterns = None
        if isinstance(choice, Pattern):
            if layer.name not in self.patterns:
                self.patterns[layer.name] = assign_patterns(score, choice, choose_pool(score, choice, rule.pool))
            patterns = self.patterns[layer.name]
        target = target_at(layer.parameter, choice, progress, rule)
        mask = project(
            score, choice, target, patterns=patterns, kernel_score=rule.kernel_score, balance=rule.balance
        )
        return mask if layer.mask is None else mask & layer.mask

    def state_dict(self) -> State:
        """Return the patterns: layer → (B, D, P)."""
        return dict(self.patterns)

    def load_state_dict(self, state: State, devices: Mapping[str, object]) -> None:
        """Take ``state_dict``'s answer."""
        self.patterns = {name: pattern.to(devices[name]) for name, pattern in state.items()}
