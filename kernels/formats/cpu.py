"""Packed forms of a pruned weight: filter blocks and single weights.

Legend: K filters, C input channels, R × S window; a *position* is ``(c · R + r) · S + s``, the column of a weight in
its filter. A linear weight (out, in) is packed as (out, in, 1, 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from autoprune.kernels.formats.packed import gather, kept_mask, transposed_weight
from autoprune.kernels.formats.rows import SparseRows, launch_order

ALIGNMENT = 64
CHANNEL_CHUNK = 16  # 16 float32 channels are one cache line of a channels-last map


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """Return a zeroed array whose first element lies on a 64-byte boundary."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def traversal(channels: int, window: tuple[int, int]) -> npt.NDArray[np.int32]:
    """Return all positions in the order in which kernels visit them.

    Taps inside chunks of 16 channels: neighbours in the list share cache lines, and a chunk of the input stays in the
    first-level cache for all taps.
    """
    c, tap = np.meshgrid(np.arange(channels), np.arange(window[0] * window[1]), indexing="ij")
    order = np.lexsort((c.ravel() % CHANNEL_CHUNK, tap.ravel(), c.ravel() // CHANNEL_CHUNK))
    positions: npt.NDArray[np.int32] = (c * (window[0] * window[1]) + tap).ravel()[order].astype(np.int32)
    return positions


@dataclass(frozen=True, slots=True)
class Blocked:
    """Kept blocks of ``block`` consecutive filters × one position; the last group is padded with zero filters.

    Attributes:
        shape: K, C, R, S of the unpacked weight.
        block: Filters per block: 16 or 32.
        row_ptr: int64 (groups + 1), first block of each group of filters.
        positions: int32 (blocks), in traversal order inside a group.
        values: float32 (blocks, block), 64-byte aligned.
    """

    shape: tuple[int, int, int, int]
    block: int
    row_ptr: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]

    @classmethod
    def pack(cls, weight_KCRS: npt.NDArray[np.float32], block: int = 16, keep_all: bool = False) -> Self:
        """Pack a masked weight; ``keep_all`` keeps blocks of zeros too (a dense layer)."""
        k, c, r, s = weight_KCRS.shape
        groups = -(-k // block)
        padded = np.zeros((groups * block, c * r * s), np.float32)
        padded[:k] = weight_KCRS.reshape(k, -1)
        blocks = padded.reshape(groups, block, -1)
        order = traversal(c, (r, s))
        kept = np.ones((groups, len(order)), bool) if keep_all else (blocks != 0).any(axis=1)[:, order]
        group, column = np.nonzero(kept)
        values = aligned((len(group), block), np.float32)
        values[:] = blocks[group, :, order[column]]
        row_ptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int64)
        return cls((k, c, r, s), block, row_ptr, order[column], values)  # type: ignore[arg-type]

    def unpack(self) -> npt.NDArray[np.float32]:
        """Return the (K, C, R, S) float32 weight."""
        k, c, r, s = self.shape
        groups = len(self.row_ptr) - 1
        dense = np.zeros((groups, self.block, c * r * s), np.float32)
        group = np.repeat(np.arange(groups), np.diff(self.row_ptr))
        dense[group, :, self.positions] = self.values
        return dense.reshape(groups * self.block, c, r, s)[:k]

    @property
    def nbytes(self) -> int:
        """Bytes of pointers, positions and values."""
        return self.row_ptr.nbytes + self.positions.nbytes + self.values.nbytes

    def gather_index(self) -> npt.NDArray[np.int64]:
        """Return the place in the flat KCRS weight of every value, (blocks, block).

        The zero filters of a short last group have the number of weights, one past the end.
        """
        columns = int(np.prod(self.shape[1:]))
        group = np.repeat(np.arange(len(self.row_ptr) - 1), np.diff(self.row_ptr))
        filters = group[:, None] * self.block + np.arange(self.block)
        index: npt.NDArray[np.int64] = np.where(
            filters < self.shape[0], filters * columns + self.positions[:, None], self.shape[0] * columns
        ).astype(np.int64)
        return index

    def with_weight(self, weight_KCRS: npt.NDArray[np.float32]) -> Self:
        """Return the same blocks with the values of another weight, by one gather."""
        values = aligned(self.values.shape, np.float32)
        values[:] = gather(weight_KCRS, self.gather_index())
        return replace(self, values=values)  # type: ignore[arg-type]

    def transpose(self) -> Self:
        """Return the input gradient's weight, (C, K, R, S) with turned windows, in blocks along its own filters.

        Blocks run along filters, so blocks of the transpose are other sets of weights: they are found anew, and kept
        blocks that hold only zeros are not carried over.
        """
        return type(self).pack(transposed_weight(self.unpack()), self.block)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class CSR:
    """Kept single weights, filter by filter.

    Attributes:
        shape: K, C, R, S of the unpacked weight.
        row_ptr: int32 (K + 1), first entry of each filter.
        positions: int32 (entries), ascending inside a filter.
        values: float32 (entries).
    """

    shape: tuple[int, int, int, int]
    row_ptr: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]

    @classmethod
    def pack(cls, weight_KCRS: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_] | None = None) -> Self:
        """Pack the weights that ``mask`` (K, C, R, S) keeps; without one, those that are not 0."""
        k, c, r, s = weight_KCRS.shape
        flat = weight_KCRS.reshape(k, c * r * s).astype(np.float32)
        row, position = np.nonzero(flat if mask is None else mask.reshape(flat.shape))
        row_ptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=k))]).astype(np.int32)
        return cls((k, c, r, s), row_ptr, position.astype(np.int32), flat[row, position])

    def unpack(self) -> npt.NDArray[np.float32]:
        """Return the (K, C, R, S) float32 weight."""
        k, c, r, s = self.shape
        flat = np.zeros((k, c * r * s), np.float32)
        flat[np.repeat(np.arange(k), np.diff(self.row_ptr)), self.positions] = self.values
        return flat.reshape(k, c, r, s)

    @property
    def nbytes(self) -> int:
        """Bytes of pointers, positions and values."""
        return self.row_ptr.nbytes + self.positions.nbytes + self.values.nbytes

    def gather_index(self) -> npt.NDArray[np.int64]:
        """Return the place in the flat KCRS weight of every entry, (entries)."""
        row = np.repeat(np.arange(self.shape[0], dtype=np.int64), np.diff(self.row_ptr))
        return row * int(np.prod(self.shape[1:])) + self.positions

    def with_weight(self, weight_KCRS: npt.NDArray[np.float32]) -> Self:
        """Return the same entries with the values of another weight, by one gather."""
        return replace(self, values=gather(weight_KCRS, self.gather_index()))

    def transpose(self) -> Self:
        """Return the input gradient's weight, (C, K, R, S) with turned windows; kept zeros stay kept."""
        mask = transposed_weight(kept_mask(self.shape, self.gather_index()))
        return type(self).pack(transposed_weight(self.unpack()), mask)  # type: ignore[arg-type]

    def rows(self) -> SparseRows:
        """Return what the GPU kernel reads: filters by falling length, so that the long ones start first."""
        lengths = np.diff(self.row_ptr)
        order = launch_order(lengths)
        starts = np.repeat(self.row_ptr[:-1][order], lengths[order])
        first = np.repeat(np.cumsum(lengths[order]) - lengths[order], lengths[order])
        entries = starts + np.arange(len(first)) - first
        return SparseRows.make(self.shape, order, lengths[order], self.gather_index()[entries])
