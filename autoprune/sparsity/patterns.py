"""Pattern pools and the choice of a pattern per kernel (METHODS §2.2).

P = R·S positions of a window in row-major order; M = patterns in a pool. A pool is an (M, R, S) boolean tensor with the
same number of true entries in each pattern.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from autoprune.core.errors import ChoiceError
from autoprune.core.registry import unknown_name
from autoprune.sparsity.ranking import top_mask

PoolKind = Literal["generic", "dynamic", "patdnn"]
POOL_KINDS: tuple[PoolKind, ...] = ("generic", "dynamic", "patdnn")

# Positions 0..8 of a 3×3 window. Order matters: a pool of 4 or 8 is the beginning of the pool of 12.
_GENERIC: tuple[tuple[int, ...], ...] = (
    (0, 1, 3, 4), (1, 2, 4, 5), (3, 4, 6, 7), (4, 5, 7, 8),  # the 2×2 squares around the centre (Gaussian)
    (1, 3, 4, 5), (1, 3, 4, 7), (1, 4, 5, 7), (3, 4, 5, 7),  # the cross less one arm (Laplacian)
    (0, 1, 2, 4), (0, 3, 4, 6), (2, 4, 5, 8), (4, 6, 7, 8),  # one edge and the centre
)  # fmt: skip


def make_pool(kind: str, score: Tensor, count: int, entries: int) -> Tensor:
    """Return a pattern pool of the named kind, (M, R, S) boolean.

    Args:
        kind: ``generic`` (fixed shapes), ``dynamic`` (ClickTrain, from the layer's importance map) or ``patdnn``.
        score: (G, R, S) float32, non-negative importance of each kernel or share group.
        count: Patterns wanted; fewer come back when the window has fewer.
        entries: Weights kept by each pattern.
    Raises:
        UnknownName: No such kind.
        ChoiceError: The generic pool holds no such patterns.
    """
    window = (int(score.shape[-2]), int(score.shape[-1]))
    flat_GP = score.reshape(-1, window[0] * window[1])
    if kind == "generic":
        return generic_pool(count, entries, window).to(score.device)
    if kind == "dynamic":
        return dynamic_pool(flat_GP.sum(0), count, entries, window)
    if kind == "patdnn":
        return patdnn_pool(flat_GP, count, entries, window)
    raise unknown_name("pattern pool", kind, POOL_KINDS)


def generic_pool(count: int, entries: int = 4, window: tuple[int, int] = (3, 3)) -> Tensor:
    """Return ClickTrain's fixed pool of 4-of-9 patterns, (M, 3, 3) boolean.

    The first four are the 2×2 squares that contain the centre; the source does not name the larger pools' shapes, ours
    continue with the cross less one arm and then an edge with the centre.

    Raises:
        ChoiceError: Not 4 entries of a 3×3 window, or more than 12 patterns.
    """
    if entries != 4 or window != (3, 3) or not 1 <= count <= len(_GENERIC):
        raise ChoiceError(
            f"generic pattern pool: got {count} patterns of {entries} entries in a {window[0]}x{window[1]} window; "
            "it has up to 12 patterns of 4 entries in a 3x3 window. Use pool='patdnn' or 'dynamic'."
        )
    pool_MP = torch.zeros(count, 9, dtype=torch.bool)
    for row, positions in enumerate(_GENERIC[:count]):
        pool_MP[row, list(positions)] = True
    return pool_MP.reshape(count, 3, 3)


def dynamic_pool(importance_P: Tensor, count: int, entries: int, window: tuple[int, int]) -> Tensor:
    """Return the pool of the patterns with the largest importance that contain the two best positions.

    Args:
        importance_P: (P,) importance of each window position, summed over the layer's kernels.
    Source: ClickTrain's dynamic pool; how the candidates are ranked is our reading (METHODS §2.2).
    """
    best = top_mask(importance_P, min(2, entries)).nonzero().flatten().tolist()
    pool_MP = _patterns_with(tuple(best), entries, importance_P.numel()).to(importance_P.device)
    total_M = pool_MP.to(importance_P.dtype) @ importance_P
    return pool_MP[_best_first(total_M, count)].reshape(-1, *window)


def patdnn_pool(score_GP: Tensor, count: int, entries: int, window: tuple[int, int]) -> Tensor:
    """Return the ``count`` most frequent natural patterns, (M, R, S) boolean.

    A kernel's natural pattern is its centre and its ``entries - 1`` largest other positions. Equal frequencies are
    ranked by the layer's total score inside the pattern, then by index.

    Args:
        score_GP: (G, P) importance of each kernel or share group.
    Source: PatDNN's pool as METHODS §2.2 gives it.
    """
    positions = score_GP.shape[1]
    centre = (positions - 1) // 2
    all_MP = _patterns_with((centre,), entries, positions).to(score_GP.device)
    lifted_GP = score_GP.clone()
    lifted_GP[:, centre] = math.inf
    weight_P = 2 ** torch.arange(positions, device=score_GP.device)
    code_G = (top_mask(lifted_GP, entries) * weight_P).sum(1)
    code_M = (all_MP * weight_P).sum(1)
    frequency_M = torch.bincount(code_G, minlength=2**positions)[code_M].double()
    total_M = all_MP.double() @ score_GP.double().sum(0).nan_to_num(0.0)
    # The share of the total is below 1, so it only orders patterns of equal frequency.
    share_M = 0.5 * total_M / total_M.max().clamp_min(torch.finfo(torch.float64).tiny)
    return all_MP[_best_first(frequency_M + share_M, count)].reshape(-1, *window)


def select_patterns(score_GP: Tensor, pool_MP: Tensor) -> Tensor:
    """Return the index of the pattern that keeps the most score, for each kernel or share group.

    Args:
        score_GP: (..., P) importance.
        pool_MP: (M, P) boolean.
    Returns:
        (...) int64; of equal patterns the first.
    """
    return (score_GP.nan_to_num(0.0) @ pool_MP.to(score_GP.dtype).T).argmax(-1)


def _best_first(value_M: Tensor, count: int) -> Tensor:
    return torch.sort(value_M, descending=True, stable=True).indices[:count]


@lru_cache(maxsize=32)
def _patterns_with(fixed: tuple[int, ...], entries: int, positions: int) -> Tensor:
    if not len(fixed) <= entries <= positions:
        raise ChoiceError(f"pattern(entries={entries}): a window of {positions} weights allows 1 to {positions}.")
    free = [position for position in range(positions) if position not in fixed]
    rows = [(*fixed, *more) for more in itertools.combinations(free, entries - len(fixed))]
    pool_MP = torch.zeros(len(rows), positions, dtype=torch.bool)
    for row, chosen in enumerate(rows):
        pool_MP[row, list(chosen)] = True
    return pool_MP
