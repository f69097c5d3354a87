"""Least-squares compensation: the kept weights that best reproduce a layer's dense outputs.

For one filter with dense weights ``w`` (a row), kept positions ``m`` and input moments ``H = E[x xᵀ]``, the error
``E[(w'x − wx)²]`` is least at ``w'_m = w_m + H_mm⁻¹ H_mp w_p`` (p: the pruned positions). Filters with one mask share
one factorisation, which is why blocks are cheap. Many large masks go together instead, by conjugate gradients, whose
steps are products of whole matrices.

Sources: Hassibi & Stork, "Optimal brain surgeon" (1993); Frantar & Alistarh, "Optimal brain compression" (2022),
whose greedy removal is replaced here by a given mask and one exact solve. That the whole inverse, masked, is a
preconditioner whose residual bounds the rest of the error is ours.
Shapes: ``W`` (K, D) and masks (K, D) with D = C·R·S in the weight's own order; ``H`` (D, D).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

DAMPING = 1e-3
# How far above the least error a row may stay where systems are too large to be factorised one by one.
SLACK = 1e-3
# Systems up to this size are always factorised; batches of them take at most so many bytes.
_SMALL = 256
_BATCH_BYTES = 2**28
# Descending takes some ten products of K·D² at twenty-five times the rate of factorisations of n³/3.
_STEPS_COST = 4
_MOST_STEPS = 200


class Hessian:
    """``H`` of one layer, damped so that dead inputs leave it invertible, and what solving with it needs.

    Args:
        second_DD: ``E[x xᵀ]``; ``DAMPING`` of its mean diagonal is added.
    """

    def __init__(self, second_DD: Tensor) -> None:
        self.matrix_DD = damped(second_DD)

    @cached_property
    def inverse_DD(self) -> Tensor:
        """``H⁻¹``, float64."""
        inverse: Tensor = torch.linalg.inv(self.matrix_DD)
        return inverse

    @cached_property
    def single(self) -> tuple[Tensor, Tensor]:
        """``H`` and its inverse, float32."""
        return self.matrix_DD.float(), self.inverse_DD.float()


def damped(moments_DD: Tensor) -> Tensor:
    """Return ``H`` float64 with ``DAMPING`` of its mean diagonal added, so that dead inputs leave it invertible."""
    moments = moments_DD.double()
    identity = torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    return moments + identity * (DAMPING * moments.diagonal().mean() + 1e-12)


def compensate(
    weight_KD: Tensor, mask_KD: Tensor, hessian: Hessian, slack: float = SLACK, start_KD: Tensor | None = None
) -> Tensor:
    """Return the masked weights (K, D) with the least output error.

    Args:
        weight_KD: Dense weights, float32.
        mask_KD: True where a weight stays.
        hessian: Of the layer's inputs.
        slack: How far above the least error a row may stay, relative to it, where that saves time.
        start_KD: Weights to start from there, such as those of a denser mask; the dense ones unless given.
    """
    weight = weight_KD.double()
    result = torch.zeros_like(weight)
    unique_UD, group_K = torch.unique(mask_KD, dim=0, return_inverse=True)
    kept_U = unique_UD.sum(1)
    few_kept = kept_U * 2 <= unique_UD.shape[1]
    # Whichever of the kept and the pruned weights are fewer are solved for.
    sizes_U = torch.minimum(kept_U, unique_UD.shape[1] - kept_U)
    size = int(sizes_U.max())
    if size > _SMALL and len(unique_UD) * size**3 > _STEPS_COST * len(weight) * weight.shape[1] ** 2:
        result = _descend(weight, mask_KD, hessian, slack, weight_KD if start_KD is None else start_KD)
    elif len(unique_UD) < len(weight):  # shared masks: one factorisation serves all filters of a group
        for index, mask in enumerate(unique_UD):
            rows = group_K == index
            solve = _solve_kept if few_kept[index] else _solve_pruned
            result[rows] = solve(weight[rows], mask, hessian)
    else:
        few = few_kept[group_K]
        if few.any():
            result[few] = _solve_rows(mask_KD[few], weight[few] @ hessian.matrix_DD, hessian.matrix_DD)
        if not few.all():
            pruned = ~mask_KD[~few]
            step = _solve_rows(pruned, weight[~few] * pruned, hessian.inverse_DD)
            result[~few] = weight[~few] - step @ hessian.inverse_DD
    return (result * mask_KD).to(weight_KD.dtype)


def _solve_kept(weight: Tensor, mask: Tensor, hessian: Hessian) -> Tensor:
    kept = mask.nonzero().squeeze(1)
    result = torch.zeros_like(weight)
    if len(kept):
        target = (weight @ hessian.matrix_DD)[:, kept]
        factor = torch.linalg.cholesky(hessian.matrix_DD[kept][:, kept])
        result[:, kept] = torch.cholesky_solve(target.T, factor).T
    return result


def _solve_pruned(weight: Tensor, mask: Tensor, hessian: Hessian) -> Tensor:
    pruned = (~mask).nonzero().squeeze(1)
    if not len(pruned):
        return weight
    factor = torch.linalg.cholesky(hessian.inverse_DD[pruned][:, pruned])
    step = torch.cholesky_solve(weight[:, pruned].T, factor).T
    return weight - step @ hessian.inverse_DD[pruned]


def _solve_rows(mask: Tensor, target: Tensor, matrix: Tensor) -> Tensor:
    """Solve ``matrix[m, m] y_m = target_m`` for each row's own set m, 0 elsewhere; unused places are unit rows."""
    counts_K = mask.sum(1)
    result = torch.zeros_like(target)
    size = int(counts_K.max())
    if size == 0:
        return result
    order_KS = torch.argsort(~mask, dim=1, stable=True)[:, :size]
    used_KS = torch.arange(size, device=mask.device) < counts_K[:, None]
    unit = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    rows = max(1, _BATCH_BYTES // (8 * size * size))
    for part in torch.split(torch.arange(len(mask), device=mask.device), rows):
        order, used = order_KS[part], used_KS[part]
        systems = matrix[order[:, :, None], order[:, None, :]]
        systems = torch.where(used[:, :, None] & used[:, None, :], systems, unit)
        right = torch.where(used, target[part].gather(1, order), 0.0)
        solution = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(systems)).squeeze(2)
        result[part] = result[part].scatter(1, order, torch.where(used, solution, 0.0))
    return result


def _descend(weight: Tensor, mask: Tensor, hessian: Hessian, slack: float, start: Tensor) -> Tensor:
    """Minimise every row's error by conjugate gradients in float32, preconditioned with the masked inverse.

    ``(H⁻¹)_mm ⪰ (H_mm)⁻¹``, so ``r·z`` of a step is no less than what the error can still fall: a row ends once that is
    below ``slack`` of its error. Rows that do not get there are solved one by one, in float64.
    """
    matrix, inverse = hessian.single
    # A row that keeps everything is the dense one: no error is a share of its own.
    found = (torch.where(mask.all(1, keepdim=True), weight, start.double()) * mask).float()
    gone = weight.float() - found
    slope = gone @ matrix
    error = (gone * slope).sum(1)
    residual = slope * mask
    direction = step = (residual @ inverse) * mask
    gain = (residual * step).sum(1)
    rows = torch.arange(len(weight), device=weight.device)
    kept = mask
    result, done = found.clone(), (gain <= slack * error) & (gain >= 0)
    for _ in range(_MOST_STEPS):
        if bool(done.any()):
            result[rows[done]] = found[done]
            parts = (rows, kept, found, residual, direction, gain, error)
            rows, kept, found, residual, direction, gain, error = (part[~done] for part in parts)
        if not len(rows):
            return result.double()
        curve = (direction @ matrix) * kept
        length = gain / (direction * curve).sum(1)
        found = found + length[:, None] * direction
        residual = residual - length[:, None] * curve
        error = error - length * gain
        step = (residual @ inverse) * kept
        before, gain = gain, (residual * step).sum(1)
        direction = step + (gain / before)[:, None] * direction
        done = (gain <= slack * error) & (gain >= 0)
    solved = result.double()
    for row in rows.tolist():
        solved[row] = _solve_kept(weight[row, None], mask[row], hessian)[0]
    return solved
