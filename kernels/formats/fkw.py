"""FKW, PatDNN's filter-kernel-weight form, for patterns that every kernel chooses by itself.

Legend: K filters, C input channels, R × S window. A *kernel* is one window of one filter and channel; its *pattern* is
which of its R·S weights stay. Kernels that lost all weights are not stored.

Source: PatDNN (ASPLOS 2020), section 5: filter reorder, offset, reorder, index, stride and weight arrays. Two things
differ: filters are ordered over the whole layer by length and then by their number of kernels of each pattern, and the
arrays take the narrowest integers that hold them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from autoprune.core.errors import ChoiceError
from autoprune.kernels.formats.packed import Shape, gather, kept_mask, transposed_weight
from autoprune.kernels.formats.rows import SparseRows

MOST_PATTERNS = 64


@dataclass(frozen=True, slots=True)
class FKW:
    """Kept kernels, filters reordered so that those with like kernels are neighbours.

    Attributes:
        shape: K, C, R, S of the unpacked weight.
        patterns: bool (M, R·S), the patterns in use, in ascending order of their bits.
        order: int32 (K), the filter that each stored row is.
        row_ptr: int32 (K + 1), first kernel of each row.
        stride: unsigned (K, M + 1), where in its row the kernels of each pattern begin, and the row's end.
        channels: unsigned (kernels), input channel of each; ascending inside a row and pattern.
        values: float32 (entries), the kept weights, kernel by kernel in window order.
    """

    shape: Shape
    patterns: npt.NDArray[np.bool_]
    order: npt.NDArray[np.int32]
    row_ptr: npt.NDArray[np.int32]
    stride: npt.NDArray[np.unsignedinteger]
    channels: npt.NDArray[np.unsignedinteger]
    values: npt.NDArray[np.float32]

    @classmethod
    def pack(cls, weight_KCRS: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_] | None = None) -> Self:
        """Pack the weights that ``mask`` (K, C, R, S) keeps; without one, those that are not 0.

        Raises:
            ChoiceError: The kernels use more than 64 patterns.
        """
        k, c, r, s = weight_KCRS.shape
        kept = (weight_KCRS != 0) if mask is None else mask
        patterns, pattern_KC = _patterns(kept.reshape(k, c, r * s))
        counts_KM = (pattern_KC[:, :, None] == np.arange(len(patterns))).sum(1).astype(np.int64)
        order = _reorder(counts_KM, patterns)
        filters, channels = _kernels(pattern_KC, order)
        stride = np.concatenate([np.zeros((k, 1), np.int64), np.cumsum(counts_KM[order], axis=1)], axis=1)
        row_ptr = np.concatenate([[0], np.cumsum(stride[:, -1])]).astype(np.int32)
        packed = cls(
            (k, c, r, s),
            patterns,
            order.astype(np.int32),
            row_ptr,
            stride.astype(np.min_scalar_type(c)),
            channels.astype(np.min_scalar_type(max(c - 1, 0))),
            np.zeros(int(patterns[pattern_KC[filters, channels]].sum()), np.float32),
        )
        return packed.with_weight(weight_KCRS)

    def unpack(self) -> npt.NDArray[np.float32]:
        """Return the (K, C, R, S) float32 weight."""
        flat = np.zeros(int(np.prod(self.shape)), np.float32)
        flat[self.gather_index()] = self.values
        return flat.reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of patterns (a bit a weight, in whole bytes), order, pointers, strides, channels and values."""
        pools = len(self.patterns) * -(-self.patterns.shape[1] // 8)
        arrays = (self.order, self.row_ptr, self.stride, self.channels, self.values)
        return int(pools + sum(array.nbytes for array in arrays))

    @property
    def row_lengths(self) -> npt.NDArray[np.int64]:
        """Entries of each stored row, (K); all equal when every filter kept as many weights."""
        entries: npt.NDArray[np.int64] = self._counts @ self.patterns.sum(1)
        return entries

    @property
    def _counts(self) -> npt.NDArray[np.int64]:
        """Kernels of each row and pattern, (K, M)."""
        edges = self.stride.astype(np.int64)
        return edges[:, 1:] - edges[:, :-1]

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Runs of rows, (first, end), that hold equally many kernels of every pattern."""
        starts = np.flatnonzero((np.diff(self.stride.astype(np.int64), axis=0) != 0).any(axis=1)) + 1
        edges = [0, *starts.tolist(), self.shape[0]]
        return tuple(itertools.pairwise(edges))

    def gather_index(self) -> npt.NDArray[np.int64]:
        """Return the place in the flat KCRS weight of every value, (entries)."""
        window = self.patterns.shape[1]
        counts = self._counts
        pattern = np.repeat(np.tile(np.arange(len(self.patterns)), self.shape[0]), counts.ravel())
        filters = np.repeat(self.order.astype(np.int64), counts.sum(1))
        kernel, tap = np.nonzero(self.patterns[pattern])
        index: npt.NDArray[np.int64] = (
            filters[kernel] * self.shape[1] + self.channels.astype(np.int64)[kernel]
        ) * window + tap
        return index

    def with_weight(self, weight_KCRS: npt.NDArray[np.float32]) -> Self:
        """Return the same kernels with the values of another weight, by one gather."""
        return replace(self, values=gather(weight_KCRS, self.gather_index()))

    def transpose(self) -> Self:
        """Return the input gradient's weight, (C, K, R, S) with turned windows; kept zeros stay kept."""
        mask = transposed_weight(kept_mask(self.shape, self.gather_index()))
        return type(self).pack(transposed_weight(self.unpack()), mask)  # type: ignore[arg-type]

    def rows(self) -> SparseRows:
        """Return what the GPU kernel reads; its entries are in the order of ``values``."""
        return SparseRows.make(self.shape, self.order, self.row_lengths, self.gather_index())


def _patterns(kept_KCP: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return the distinct patterns, (M, P), and each kernel's, (K, C); -1 for a kernel without weights."""
    k, c, p = kept_KCP.shape
    bits = np.packbits(kept_KCP.reshape(-1, p), axis=1)
    distinct, which = np.unique(bits, axis=0, return_inverse=True)
    patterns = np.unpackbits(distinct, axis=1, count=p).astype(bool)
    # The empty pattern, where there is one, sorts first.
    empty = int(len(patterns) > 0 and not patterns[0].any())
    if len(patterns) - empty > MOST_PATTERNS:
        raise ChoiceError(
            f"FKW holds at most {MOST_PATTERNS} patterns, this weight has {len(patterns) - empty}; pack it as CSR."
        )
    return patterns[empty:], which.reshape(k, c).astype(np.int64) - empty


def _reorder(counts_KM: npt.NDArray[np.int64], patterns: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return filters by falling number of weights, then of kernels, then of kernels of each pattern."""
    entries = counts_KM @ patterns.sum(1)
    keys = [-counts_KM[:, m] for m in reversed(range(counts_KM.shape[1]))]
    order: npt.NDArray[np.int64] = np.lexsort([*keys, -counts_KM.sum(1), -entries])
    return order


def _kernels(
    pattern_KC: npt.NDArray[np.int64], order: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return filter and channel of every kept kernel: row by row, inside a row by pattern, then by channel."""
    row, channel = np.nonzero(pattern_KC[order] >= 0)
    pattern = pattern_KC[order[row], channel]
    sort = np.lexsort((channel, pattern, row))
    return order[row[sort]], channel[sort]
