"""From a choice to a mask: which weights of one layer stay.

Shapes: conv weight ``KCRS`` (filters, channels, window rows, window columns), linear weight ``OI``, which is read as
``KCRS`` with a 1×1 window. P = R·S positions of a window. B, D = number of filter and channel groups of a shared mask.

Every kind removes whole *units*: single weights (fine), blocks of filters at one position (block), tiles (tile), share
groups (pattern), kernels (ck, combined), entries of each window (window) or of each group of input channels (nm),
filters (channels). The number removed is the nominal number rounded down, so the count that stays never falls short of
the nominal one, and at least one unit stays. Of equal scores the lower index stays. The score of a unit is the mean
over its real weights, which ranks as the sum does and lets a short last group (33 filters in blocks of 16) compete
fairly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autoprune.core.choices import CK, NM, Block, Channels, Choice, Combined, Dense, Fine, Pattern, Tile, Window
from autoprune.core.errors import ChoiceError
from autoprune.sparsity.patterns import make_pool, select_patterns
from autoprune.sparsity.ranking import kept_count, top_mask

KernelScore = Literal["sum", "max"]
Balance = Literal["layer", "filter"]


@dataclass(frozen=True, slots=True)
class Target:
    """How much of one layer stays, in the units of its choice.

    Attributes:
        units: Weights, blocks, share groups or kernels kept in the layer, or in each filter (group) when balanced.
        entries: Weights kept in each window (pattern, window and combined) or in each group of m (nm).
    """

    units: int
    entries: int = 0


def make_mask(
    weight: Tensor,
    choice: Choice,
    score: Tensor | None = None,
    *,
    pool: Tensor | None = None,
    kernel_score: KernelScore = "sum",
    balance: Balance = "layer",
) -> Tensor:
    """Return which weights stay under a choice.

    Args:
        weight: (K, C, R, S) or (O, I).
        choice: Any choice that fits the layer.
        score: Elementwise non-negative importance, same shape; |weight| when None.
        pool: (M, R, S) boolean patterns for a pattern choice; PatDNN's pool of the score when None.
        kernel_score: How CK and combined score a kernel: ``sum``, or Campfire's ``max``.
        balance: Rank units within the layer, or within each filter (group), so that all filters keep equally many.
    Returns:
        Boolean mask, same shape and device as ``weight``, contiguous.
    Raises:
        ChoiceError: The weight cannot take the choice.
    """
    check_weight(weight, choice)
    importance = (weight.detach().abs() if score is None else score.detach()).float()
    if importance.shape != weight.shape:
        raise ChoiceError(f"choice '{choice.text}': score is {tuple(importance.shape)}, weight {tuple(weight.shape)}.")
    patterns = None
    if isinstance(choice, Pattern):
        patterns = assign_patterns(importance, choice, pool)
    target = target_of(weight, choice, balance)
    return project(importance, choice, target, patterns=patterns, kernel_score=kernel_score, balance=balance)


def target_of(weight: Tensor, choice: Choice, balance: Balance = "layer") -> Target:
    """Return how many units of the layer, or of each filter (group) when balanced, the choice keeps."""
    k, c = int(weight.shape[0]), int(weight.shape[1])
    p = weight[0, 0].numel()
    if balance == "filter":
        k = 1
    if isinstance(choice, Block):
        return Target(kept_count(math.ceil(k / choice.filters) * c * p, choice.keep))
    if isinstance(choice, Pattern):
        groups = math.ceil(k / choice.share[0]) * math.ceil(c / choice.share[1])
        return Target(kept_count(groups, choice.kernels), choice.entries)
    if isinstance(choice, Fine):
        return Target(kept_count(k * c * p, choice.keep))
    if isinstance(choice, Tile):
        return Target(kept_count(math.ceil(k / choice.size) * math.ceil(c / choice.size), choice.keep))
    if isinstance(choice, CK):
        return Target(kept_count(k * c, choice.keep))
    if isinstance(choice, Window):
        return Target(k * c, min(p, choice.entries))
    if isinstance(choice, Combined):
        entries = kept_count(p, 1.0 - choice.fraction * (1.0 - choice.keep))
        return Target(kept_count(k * c, min(1.0, choice.keep * p / entries)), entries)
    if isinstance(choice, NM):
        return Target(k * c * p, choice.n)
    if isinstance(choice, Channels):
        return Target(choice.width(int(weight.shape[0])))
    return Target(k * c * p)


def project(
    score: Tensor,
    choice: Choice,
    target: Target,
    *,
    patterns: Tensor | None = None,
    kernel_score: KernelScore = "sum",
    balance: Balance = "layer",
) -> Tensor:
    """Return the mask of the ``target`` best units of the choice's kind.

    Args:
        score: (K, C, R, S) or (O, I) float32. Negative marks a dead weight, which ranks below every living one.
        choice: Its kind and shape fields are used; how much stays comes from ``target``.
        target: Units and entries that stay.
        patterns: (B, D, P) boolean, the pattern of each share group; for a pattern choice only. Entries of the
            pattern always stay; more than its size stay while ``target.entries`` is larger.
        kernel_score, balance: See ``make_mask``.
    """
    score = score.contiguous()
    score_KCP = score.reshape(score.shape[0], score.shape[1], -1)
    if isinstance(choice, Dense):
        return torch.ones_like(score, dtype=torch.bool)
    if isinstance(choice, Fine):
        return _fine(score, target, balance)
    if isinstance(choice, Block):
        mask = _groups(score_KCP, (choice.filters, 1), target, balance)
    elif isinstance(choice, Tile):
        mask = _groups(score_KCP, (choice.size, choice.size), target, balance)
    elif isinstance(choice, Pattern):
        if patterns is None:
            raise ChoiceError(f"choice '{choice.text}': project needs the pattern of each share group.")
        mask = _pattern(score_KCP, choice, patterns, target, balance)
    elif isinstance(choice, Window):
        mask = top_mask(score_KCP, target.entries)
    elif isinstance(choice, CK):
        mask = _best(_kernel_scores(score_KCP, kernel_score), target.units, balance)[..., None].expand_as(score_KCP)
    elif isinstance(choice, Combined):
        window_KCP = top_mask(score_KCP, target.entries)
        windowed_KCP = score_KCP.masked_fill(~window_KCP, 0.0)
        value_KC = _kernel_scores(windowed_KCP, kernel_score).masked_fill(score_KCP.amax(-1) < 0, -1.0)
        mask = window_KCP & _best(value_KC, target.units, balance)[..., None]
    elif isinstance(choice, NM):
        mask = _n_of_m(score_KCP, choice.m, target.entries)
    elif isinstance(choice, Channels):
        mask = top_mask(score_KCP.sum((1, 2))[None], target.units)[0, :, None, None].expand_as(score_KCP)
    else:
        raise ChoiceError(f"no mask rule for choice '{choice.text}'.")
    return mask.reshape(score.shape).contiguous()


def choose_pool(score: Tensor, choice: Pattern, kind: str = "patdnn") -> Tensor:
    """Return the layer's pattern pool of a kind of ``POOL_KINDS``, (M, R, S) boolean, from its share groups' scores.

    Args:
        score: (K, C, R, S) float32, non-negative.
        choice: Gives pool size, entries and share.
        kind: Of ``make_pool``.
    """
    group_BDP = group_mean(score.reshape(score.shape[0], score.shape[1], -1), choice.share)
    return make_pool(kind, group_BDP.reshape(-1, *score.shape[2:]), choice.count, choice.entries)


def assign_patterns(score: Tensor, choice: Pattern, pool: Tensor | None = None) -> Tensor:
    """Return the best pattern of every share group, (B, D, P) boolean.

    Args:
        score: (K, C, R, S) float32 importance.
        choice: Gives pool size, entries and share.
        pool: (M, R, S) boolean; PatDNN's pool over the share groups' mean scores when None.
    """
    rows, columns = int(score.shape[2]), int(score.shape[3])
    group_BDP = group_mean(score.reshape(score.shape[0], score.shape[1], -1), choice.share)
    if pool is None:
        pool = choose_pool(score, choice)
    if pool.dim() != 3 or tuple(pool.shape[1:]) != (rows, columns):
        raise ChoiceError(f"choice '{choice.text}': a pool of shape {tuple(pool.shape)} does not fit a 3x3 window.")
    pool_MP = pool.to(score.device).flatten(1)
    return pool_MP[select_patterns(group_BDP, pool_MP)]


def group_mean(value_KCP: Tensor, share: tuple[int, int]) -> Tensor:
    """Return the mean over groups of ``share`` filters × channels, (B, D, P); short last groups over their own size."""
    value = value_KCP
    for dim, size in enumerate(share):
        if size == 1:
            continue
        length = value.shape[dim]
        full = length // size * size
        parts = []
        if full:
            whole = value.narrow(dim, 0, full)
            grouped = whole.reshape(*whole.shape[:dim], full // size, size, *whole.shape[dim + 1 :])
            parts.append(grouped.mean(dim + 1))
        if full < length:
            parts.append(value.narrow(dim, full, length - full).mean(dim, keepdim=True))
        value = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
    return value


def spread(mask_BDP: Tensor, share: tuple[int, int], shape_KC: tuple[int, int]) -> Tensor:
    """Return the group mask repeated over each group's members, (K, C, P)."""
    mask = mask_BDP
    for dim, size in enumerate(share):
        if size > 1:
            mask = mask.repeat_interleave(size, dim=dim).narrow(dim, 0, shape_KC[dim])
    return mask


def check_weight(weight: Tensor, choice: Choice) -> None:
    """Refuse a weight that cannot take the choice.

    Raises:
        ChoiceError: Naming the choice and the weight's shape.
    """
    shape = tuple(weight.shape)
    if len(shape) not in (2, 4) or 0 in shape:
        raise ChoiceError(f"choice '{choice.text}': weight shape {shape} is neither a conv's nor a linear's.")
    window = shape[2:] if len(shape) == 4 else (1, 1)
    needs_window = isinstance(choice, (Pattern, CK, Window, Combined))
    if isinstance(choice, Pattern) and window != (3, 3):
        raise ChoiceError(f"choice '{choice.text}': needs a 3x3 window, the weight is {shape}.")
    if isinstance(choice, Tile) and len(shape) != 2:
        raise ChoiceError(f"choice '{choice.text}': needs a linear layer, the weight is {shape}.")
    if isinstance(choice, NM) and shape[1] % choice.m:
        raise ChoiceError(f"choice '{choice.text}': input channels must be a multiple of {choice.m}, not {shape[1]}.")
    if needs_window and math.prod(window) == 1:
        raise ChoiceError(f"choice '{choice.text}': needs a window above 1x1, the weight is {shape}.")


def _best(score: Tensor, units: int, balance: Balance) -> Tensor:
    """Rank all of ``score`` at once, or each of its first dimension's rows alone; same shape, boolean."""
    rows = score.flatten(1) if balance == "filter" else score.reshape(1, -1)
    return top_mask(rows, units).reshape(score.shape)


def _fine(score: Tensor, target: Target, balance: Balance) -> Tensor:
    if score.dim() == 2 and balance == "layer" and target.units >= score.shape[0]:
        # An output neuron without any weight is a constant: its best weight stays first (Campfire's FC rule).
        best = torch.nan_to_num(score, nan=0.0).argmax(dim=1, keepdim=True)
        score = score.scatter(1, best, math.inf)
    return _best(score, target.units, balance)


def _groups(score_KCP: Tensor, share: tuple[int, int], target: Target, balance: Balance) -> Tensor:
    mask_BDP = _best(group_mean(score_KCP, share), target.units, balance)
    return spread(mask_BDP, share, (score_KCP.shape[0], score_KCP.shape[1]))


def _pattern(score_KCP: Tensor, choice: Pattern, patterns_BDP: Tensor, target: Target, balance: Balance) -> Tensor:
    group_BDP = group_mean(score_KCP, choice.share)
    # A dead group has only negative scores, also inside its pattern, so it stays below every living one.
    alive_BD = _best((group_BDP * patterns_BDP).sum(-1), target.units, balance)
    inside_BDP = patterns_BDP
    if target.entries > choice.entries:
        inside_BDP = top_mask(group_BDP.masked_fill(patterns_BDP, math.inf), target.entries)
    return spread(inside_BDP & alive_BD[..., None], choice.share, (score_KCP.shape[0], score_KCP.shape[1]))


def _n_of_m(score_KCP: Tensor, m: int, n: int) -> Tensor:
    k, c, p = score_KCP.shape
    groups = score_KCP.reshape(k, c // m, m, p).transpose(2, 3)
    return top_mask(groups, n).transpose(2, 3).reshape(k, c, p)


def _kernel_scores(score_KCP: Tensor, kernel_score: KernelScore) -> Tensor:
    return score_KCP.amax(-1) if kernel_score == "max" else score_KCP.sum(-1)
