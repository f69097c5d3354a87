"""Least-squares compensation: the kept weights that best reproduce a layer's dense outputs.

For one filter with dense weights ``w`` (a row), kept positions ``m`` and input moments ``H = E[x xᵀ]``, the error
``E[(w'x − wx)²]`` is least at ``w'_m = w_m + H_mm⁻¹ H_mp w_p`` (p: the pruned positions). Filters with one mask share
one factorisation, which is why blocks are cheap.

Sources: Hassibi & Stork, "Optimal brain surgeon" (1993); Frantar & Alistarh, "Optimal brain compression" (2022),
whose greedy removal is replaced here by a given mask and one exact solve.
Shapes: ``W`` (K, D) and masks (K, D) with D = C·R·S in the weight's own order; ``H`` (D, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-3
# Systems above this size are solved one by one; batches of smaller ones take at most so many bytes.
_LARGE = 256
_BATCH_BYTES = 2**28
# Large systems are factorised in float32, at half the cost, and refined until their residual is this small.
_RESIDUAL = 1e-9
_REFINEMENTS = 6


def damped(moments_DD: Tensor) -> Tensor:
    """Return ``H`` float64 with ``DAMPING`` of its mean diagonal added, so that dead inputs leave it invertible."""
    moments = moments_DD.double()
    identity = torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    return moments + identity * (DAMPING * moments.diagonal().mean() + 1e-12)


def compensate(weight_KD: Tensor, mask_KD: Tensor, damped_DD: Tensor, inverse_DD: Tensor) -> Tensor:
    """Return the masked weights (K, D) with the least output error.

    Args:
        weight_KD: Dense weights, float32.
        mask_KD: True where a weight stays.
        damped_DD: ``damped(H)``.
        inverse_DD: Its inverse; whichever of the kept and pruned sets is smaller is solved for.
    """
    weight = weight_KD.double()
    result = torch.zeros_like(weight)
    unique_UD, group_K = torch.unique(mask_KD, dim=0, return_inverse=True)
    few_kept = unique_UD.sum(1) * 2 <= unique_UD.shape[1]
    if len(unique_UD) < len(weight):  # shared masks: one factorisation serves all filters of a group
        for index, mask in enumerate(unique_UD):
            rows = group_K == index
            solve = _solve_kept if few_kept[index] else _solve_pruned
            matrix = damped_DD if few_kept[index] else inverse_DD
            result[rows] = solve(weight[rows], mask, damped_DD, matrix)
        return (result * mask_KD).to(weight_KD.dtype)
    few = few_kept[group_K]
    if few.any():
        result[few] = _solve_rows(weight[few], mask_KD[few], weight[few] @ damped_DD, damped_DD)
    if not few.all():
        rest = ~few
        pruned = weight[rest] * ~mask_KD[rest]
        step = _solve_rows(pruned, ~mask_KD[rest], pruned, inverse_DD)
        result[rest] = weight[rest] - step @ inverse_DD
    return (result * mask_KD).to(weight_KD.dtype)


def _solve_kept(weight: Tensor, mask: Tensor, damped_DD: Tensor, _: Tensor) -> Tensor:
    kept = mask.nonzero().squeeze(1)
    target = (weight @ damped_DD)[:, kept]
    result = torch.zeros_like(weight)
    if len(kept):
        factor = torch.linalg.cholesky(damped_DD[kept][:, kept])
        result[:, kept] = torch.cholesky_solve(target.T, factor).T
    return result


def _solve_pruned(weight: Tensor, mask: Tensor, _: Tensor, inverse_DD: Tensor) -> Tensor:
    pruned = (~mask).nonzero().squeeze(1)
    if not len(pruned):
        return weight
    factor = torch.linalg.cholesky(inverse_DD[pruned][:, pruned])
    step = torch.cholesky_solve(weight[:, pruned].T, factor).T
    return weight - step @ inverse_DD[pruned]


def _solve_rows(weight: Tensor, mask: Tensor, target: Tensor, matrix: Tensor) -> Tensor:
    """Solve ``matrix[m, m] y_m = target_m`` for each row's own set m.

    Small systems are solved in batches, in which unused places are unit rows; large ones one after the other, since a
    batch of them would take gigabytes (512 filters of 4,608 weights: 21 GB).
    """
    counts = mask.sum(1)
    result = torch.zeros_like(weight)
    size = int(counts.max())
    if size == 0:
        return result
    if size > _LARGE:
        return _solve_large(mask, target, matrix)
    rows = max(1, _BATCH_BYTES // (8 * size * size))
    for part in torch.split(torch.arange(len(weight), device=weight.device), rows):
        result[part] = _solve_batch(weight[part], mask[part], target[part], matrix)
    return result


def _solve_large(mask: Tensor, target: Tensor, matrix: Tensor) -> Tensor:
    """Solve large systems by float32 factors and float64 residuals; what does not converge is factorised in float64."""
    single = matrix.float()
    result = torch.zeros_like(target)
    wanted = target * mask
    size = int(mask.sum(1).max())
    for part in torch.arange(len(target), device=target.device).split(max(1, _BATCH_BYTES // (4 * size * size))):
        kept = [row.nonzero().squeeze(1) for row in mask[part]]
        factors = [torch.linalg.cholesky_ex(single.index_select(0, at).index_select(1, at))[0] for at in kept]
        bound = _RESIDUAL * wanted[part].norm(dim=1)
        found, residual = result[part], wanted[part]
        for _ in range(_REFINEMENTS):
            for row, (at, factor) in enumerate(zip(kept, factors, strict=True)):
                step = torch.cholesky_solve(residual[row, at, None].float(), factor).squeeze(1)
                found[row].index_add_(0, at, step.double())
            residual = (wanted[part] - found @ matrix) * mask[part]
            if bool((residual.norm(dim=1) <= bound).all()):
                break
        for row in (~(residual.norm(dim=1) <= bound)).nonzero().flatten().tolist():
            at = kept[row]
            factor = torch.linalg.cholesky(matrix.index_select(0, at).index_select(1, at))
            found[row, at] = torch.cholesky_solve(wanted[part][row, at, None], factor).squeeze(1)
        result[part] = found
    return result


def _solve_batch(weight: Tensor, mask: Tensor, target: Tensor, matrix: Tensor) -> Tensor:
    counts = mask.sum(1)
    size = int(counts.max())
    result = torch.zeros_like(weight)
    order = torch.argsort(~mask, dim=1, stable=True)[:, :size]
    used = torch.arange(size, device=weight.device)[None] < counts[:, None]
    systems = matrix[order[:, :, None], order[:, None, :]]
    both = used[:, :, None] & used[:, None, :]
    systems = torch.where(both, systems, torch.eye(size, dtype=matrix.dtype, device=matrix.device))
    right = torch.where(used, target.gather(1, order), 0.0)
    solution = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(systems)).squeeze(2)
    return result.scatter(1, order, torch.where(used, solution, 0.0))
