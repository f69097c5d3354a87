"""Exact top-k masks: the one place where scores are ranked, ties are broken and counts are rounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Fractions such as 0.1 are not exact in binary: (1 - 0.9) * 10 must still remove one unit of ten.
_SLACK = 1e-6


def kept_count(units: int, keep_frac: float) -> int:
    """Return how many of ``units`` stay: what is removed is rounded down, and at least one unit stays."""
    removed = math.floor((1.0 - keep_frac) * units + _SLACK)
    return min(units, max(1, units - removed))


def top_mask(score: Tensor, count: int) -> Tensor:
    """Return a boolean mask of the ``count`` largest scores along the last dimension.

    Exactly ``count`` entries are true in every row whatever the values are: of equal scores the lower index stays,
    and NaN ranks as 0.

    Args:
        score: (..., N) floating point.
        count: 0..N.
    """
    size = score.shape[-1]
    if count >= size:
        return torch.ones_like(score, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    score = torch.nan_to_num(score.detach(), nan=0.0, posinf=math.inf, neginf=-math.inf)
    threshold = _kth_smallest(score, size - count)
    above = score > threshold
    equal = score == threshold
    # No data-dependent branch here: one would stall a GPU on every call.
    missing = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def _kth_smallest(score: Tensor, index: int) -> Tensor:
    if score.is_cuda:  # kthvalue there refuses to run under torch.use_deterministic_algorithms
        return score.sort(dim=-1).values[..., index : index + 1]
    return torch.kthvalue(score, index + 1, dim=-1, keepdim=True).values
