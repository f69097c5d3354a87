"""Which parts of a tensor stayed when it was shrunk, told by comparing its values before and after.

A dimension's indices are strictly increasing: whoever takes channels out leaves the others in order. Where values do
not tell them apart (a fresh BatchNorm's ones, say) there is no answer rather than a guess.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# One entry a dimension: the numbers that stayed, None where all did.
Kept = tuple[tuple[int, ...] | None, ...]


def kept_of(old: Tensor, new: Tensor) -> Kept | None:
    """Return which indices of each dimension of ``old`` are left in ``new``, or None where the values do not tell.

    Args:
        old: Before.
        new: After; of the same rank and no larger anywhere.
    Returns:
        Indices with ``old[index…] == new`` everywhere. More than two shrunk dimensions are not searched.
    """
    if old.dim() != new.dim() or any(after > before for before, after in zip(old.shape, new.shape, strict=True)):
        return None
    old, new = old.detach().cpu(), new.detach().cpu()
    changed = [dim for dim in range(old.dim()) if old.shape[dim] != new.shape[dim]]
    if not changed:
        return (None,) * old.dim()
    found: dict[int, tuple[int, ...] | None]
    if len(changed) == 1:
        found = {changed[0]: _one(old, new, changed[0])}
    elif len(changed) == 2:
        found = _two(old, new, changed[0], changed[1])
    else:
        return None
    if any(found[dim] is None for dim in changed):
        return None
    kept = tuple(found.get(dim) for dim in range(old.dim()))
    return kept if torch.equal(taken(old, kept), new) else None


def taken(value: Tensor, kept: Kept) -> Tensor:
    """Return what ``kept`` leaves of a tensor."""
    for dim, index in enumerate(kept):
        if index is not None:
            value = value.index_select(dim, torch.tensor(index, dtype=torch.long, device=value.device))
    return value


def agreed(tensors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Kept | None]:
    """Return ``kept_of`` of the tensors of one module; what one of them tells, its companions need not.

    A BatchNorm's mean says which channels stayed even if its weights are all one. A companion whose values were changed
    on the way (a bias that took up constants) shares the indices of the first dimension too.

    Args:
        tensors: Name → before and after.
    """
    found = {name: kept_of(old, new) for name, (old, new) in tensors.items()}
    told: dict[tuple[int, int], tuple[int, ...]] = {}
    for name, (old, new) in tensors.items():
        kept = found[name]
        if kept and kept[0] is not None:
            told.setdefault((len(old), len(new)), kept[0])
    for name, (old, new) in tensors.items():
        if found[name] is None and old.dim() == new.dim() >= 1 and old.shape[1:] == new.shape[1:]:
            first = told.get((len(old), len(new)))
            found[name] = None if first is None else (first, *[None] * (old.dim() - 1))
    return found


def _one(old: Tensor, new: Tensor, dim: int) -> tuple[int, ...] | None:
    """Return the indices of the only dimension that shrank; None if other indices would give the same values."""
    rows_old, rows_new = (v.movedim(dim, 0).flatten(1) if v.dim() > 1 else v[:, None] for v in (old, new))
    ids = _identities(torch.cat([rows_old, rows_new]))
    return _subsequence(ids[: len(rows_old)], ids[len(rows_old) :])


def _subsequence(old: np.ndarray, new: np.ndarray) -> tuple[int, ...] | None:
    """Return where ``new`` lies in ``old`` in order; None if it does not, or in more than one way."""
    first, last = _greedy(old, new), _greedy(old[::-1], new[::-1])
    if first is None or last is None:
        return None
    mirrored = [len(old) - 1 - place for place in reversed(last)]
    return tuple(first) if first == mirrored else None


def _greedy(old: np.ndarray, new: np.ndarray) -> list[int] | None:
    places, start = [], 0
    for wanted in new:
        hits = np.flatnonzero(old[start:] == wanted)
        if len(hits) == 0:
            return None
        places.append(start + int(hits[0]))
        start = places[-1] + 1
    return places


def _two(old: Tensor, new: Tensor, rows: int, columns: int) -> dict[int, tuple[int, ...] | None]:
    """Return the indices of two dimensions that shrank: rows by the cells they share, then columns within them."""
    order = [rows, columns, *(dim for dim in range(old.dim()) if dim not in (rows, columns))]
    cells_old, cells_new = (value.permute(order).flatten(2) if value.dim() > 2 else value.permute(order)[..., None]
                            for value in (old, new))  # fmt: skip
    shape_old, shape_new = cells_old.shape[:2], cells_new.shape[:2]
    flat = torch.cat([cells_old.flatten(0, 1), cells_new.flatten(0, 1)])
    ids = _identities(flat)
    ids[(flat == 0).all(1).numpy()] = -1  # a cell of zeros tells nothing
    ids_old = ids[: shape_old[0] * shape_old[1]].reshape(shape_old)
    ids_new = ids[len(ids) - shape_new[0] * shape_new[1] :].reshape(shape_new)
    owners = _owners(ids_old, ids_new)
    known = [place for place, owner in enumerate(owners) if owner is not None]
    if not known:
        return {rows: None, columns: None}
    own = [owner for owner in owners if owner is not None]
    stacked = np.concatenate([ids_old[own].T, ids_new[known].T])
    column_ids = np.unique(stacked, axis=0, return_inverse=True)[1].ravel()
    across = _subsequence(column_ids[: shape_old[1]], column_ids[shape_old[1] :])
    if across is None:
        return {rows: None, columns: None}
    return {rows: _rows(ids_old[:, list(across)], ids_new), columns: across}


def _owners(ids_old: np.ndarray, ids_new: np.ndarray) -> list[int | None]:
    """Return for each new row the old row that holds most of its cells; None for a row of zeros."""
    order = np.argsort(ids_old, axis=None, kind="stable")
    ordered = ids_old.ravel()[order]
    owners: list[int | None] = []
    for row in ids_new:
        wanted = row[row >= 0]
        if len(wanted) == 0:
            owners.append(None)
            continue
        left, right = np.searchsorted(ordered, wanted, "left"), np.searchsorted(ordered, wanted, "right")
        places = np.concatenate([order[a:b] for a, b in zip(left, right, strict=True)])
        owners.append(int(np.bincount(places // ids_old.shape[1]).argmax()) if len(places) else None)
    return owners


def _rows(ids_old: np.ndarray, ids_new: np.ndarray) -> tuple[int, ...] | None:
    """Return which rows stayed, now that the columns are known."""
    ids = np.unique(np.concatenate([ids_old, ids_new]), axis=0, return_inverse=True)[1].ravel()
    return _subsequence(ids[: len(ids_old)], ids[len(ids_old) :])


def _identities(rows: Tensor) -> np.ndarray:
    """Return a number for each row, equal rows having equal numbers."""
    values = np.ascontiguousarray(rows.float().numpy() if rows.dtype == torch.bfloat16 else rows.numpy())
    whole = values.view([("", values.dtype)] * values.shape[1]).ravel() if values.shape[1] > 1 else values.ravel()
    return np.unique(whole, return_inverse=True)[1].ravel().astype(np.int64)

