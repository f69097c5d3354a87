"""What the layers still to come can be brought down to: the least costs that some completion really has.

With one constraint that is one number per suffix. With several, the least of each may belong to different
completions, so that each suffix keeps a front of cost vectors, none of which is worse than another in every part.

Shapes: L layers, C choices (ragged), D constraints, P points of a front.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_FRONT = 512
_PAIRWISE = 1500


def cheapest_suffixes(
    costs_LCD: Sequence[npt.NDArray[np.float64]], limits_D: npt.NDArray[np.float64]
) -> list[npt.NDArray[np.float64]]:
    """Return L + 1 fronts; front l, (P, D), holds cost sums of layers l, l + 1, … that no other sum undercuts.

    A front that would exceed 512 points is thinned. What stays are sums of real completions, extended from kept
    points only, so that a prefix which one of them completes never runs into a dead end.

    Args:
        costs_LCD: Per layer (C, D).
        limits_D: Positive; the scale on which the constraints are weighed when a front is thinned.
    """
    fronts = [np.zeros((1, len(limits_D)))]
    for costs_CD in reversed(costs_LCD):
        sums_PD = (fronts[-1][:, None, :] + undominated(costs_CD)[None, :, :]).reshape(-1, len(limits_D))
        fronts.append(_thin(sums_PD, limits_D))
    return fronts[::-1]


def undominated(points_PD: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the points that no other point undercuts or equals in every part, each once, ordered by the first part."""
    if points_PD.shape[1] == 1:
        return np.asarray(points_PD.min(axis=0, keepdims=True))
    points_PD = np.unique(points_PD, axis=0)
    if points_PD.shape[1] == 2:
        # Sorted by the first part, a point stays exactly when it lowers the least second part so far.
        least_P = np.minimum.accumulate(points_PD[:, 1])
        keep_P = np.append(True, points_PD[1:, 1] < least_P[:-1])
        return np.asarray(points_PD[keep_P])
    below_PP = (points_PD[None, :, :] <= points_PD[:, None, :]).all(axis=2)
    return np.asarray(points_PD[below_PP.sum(axis=1) == 1])


def _thin(points_PD: npt.NDArray[np.float64], limits_D: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    constraints = points_PD.shape[1]
    if constraints <= 2 or len(points_PD) <= _PAIRWISE:
        points_PD = undominated(points_PD)
    if len(points_PD) <= _FRONT:
        return points_PD
    # The least points under many weightings of the constraints: the corners, and an even spread between them.
    weights_WD = np.random.default_rng(0).dirichlet(np.full(constraints, 0.5), size=_FRONT // 2)
    weights_WD = np.concatenate([np.eye(constraints), weights_WD])
    keep = (points_PD / limits_D @ weights_WD.T).argmin(axis=0)
    spread = np.linspace(0, len(points_PD) - 1, _FRONT // 2).astype(np.int64)
    return np.asarray(points_PD[np.unique(np.concatenate([keep, spread]))])


def useful_rows(
    errors_LC: Sequence[npt.NDArray[np.float64]], costs_LCD: Sequence[npt.NDArray[np.float64]]
) -> list[npt.NDArray[np.int64]]:
    """Return per layer the choices that no other undercuts in error and every cost at once, by rising first cost.

    A policy made of the others can be bettered layer by layer, as far as single-layer errors tell; and where a choice
    is left out, one that costs no more in anything stays, so that whatever could be reached still can.

    Args:
        errors_LC: Per layer (C,); non-finite ones count as very large.
        costs_LCD: Per layer (C, D).
    """
    kept = []
    for error_C, costs_CD in zip(errors_LC, costs_LCD, strict=True):
        points = np.concatenate([costs_CD, np.where(np.isfinite(error_C), error_C, 1e9)[:, None]], axis=1)
        not_above_CC = (points[:, None, :] <= points[None, :, :]).all(axis=2)
        below_CC = (points[:, None, :] < points[None, :, :]).any(axis=2) & not_above_CC
        # Of exact twins only the first stays.
        twin_CC = np.triu((points[:, None, :] == points[None, :, :]).all(axis=2), k=1)
        keep = np.flatnonzero(~(below_CC | twin_CC).any(axis=0))
        kept.append(keep[np.argsort(costs_CD[keep, 0], kind="stable")])
    return kept
