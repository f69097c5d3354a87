"""Rows of single weights in the order in which a GPU kernel takes them: what FKW and CSR are lowered to.

The kernel reads one coded position per weight. FKW stores fewer indices (one per kernel), but a program reads its
filter's indices once for hundreds of pixels: they are not what bounds it, and one loop serves every mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from autoprune.kernels.formats.packed import Shape

# A code is channel · 64 + row · 8 + column of the window.
WINDOW_LIMIT = 8


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Kept weights, filter by filter.

    Attributes:
        shape: K, C, R, S of the unpacked weight; R and S at most 8.
        order: int32 (K), the filter that each row is.
        row_ptr: int32 (K + 1), first entry of each row.
        code: int32 (entries), input channel · 64 + window row · 8 + window column.
        gather_index: int64 (entries), index into the flat KCRS weight.
    """

    shape: Shape
    order: npt.NDArray[np.int32]
    row_ptr: npt.NDArray[np.int32]
    code: npt.NDArray[np.int32]
    gather_index: npt.NDArray[np.int64]

    @classmethod
    def make(
        cls,
        shape: Shape,
        order: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer],
        gather_index: npt.NDArray[np.int64],
    ) -> Self:
        """Build rows from the filter and the number of entries of each row, and the entries in row order."""
        _, c, r, s = shape
        channel, window_row, column = np.unravel_index(gather_index % (c * r * s), (c, r, s))
        code = (channel * WINDOW_LIMIT + window_row) * WINDOW_LIMIT + column
        row_ptr = np.concatenate([[0], np.cumsum(lengths)])
        return cls(
            shape, order.astype(np.int32), row_ptr.astype(np.int32), code.astype(np.int32), gather_index.copy()
        )

    @property
    def longest(self) -> int:
        """Entries of the longest row."""
        return int(np.diff(self.row_ptr).max(initial=0))

    def transpose(self) -> tuple[SparseRows, npt.NDArray[np.int64]]:
        """Return the rows of the input gradient's weight, and the entries of these rows in the order of those.

        ``values[permutation]`` are the values of the transposed rows: the index is fixed while the mask is.
        """
        k, c, r, s = self.shape
        filters, channel, row, column = np.unravel_index(self.gather_index, self.shape)
        flat = np.ravel_multi_index((channel, filters, r - 1 - row, s - 1 - column), (c, k, r, s))
        lengths = np.bincount(channel, minlength=c)
        order = launch_order(lengths)
        rank = np.empty(c, np.int64)
        rank[order] = np.arange(c)
        permutation: npt.NDArray[np.int64] = np.lexsort((flat, rank[channel]))
        return SparseRows.make((c, k, r, s), order, lengths[order], flat[permutation].astype(np.int64)), permutation


def launch_order(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return rows by falling length, equal ones as they come (Sputnik's row swizzle: no long row starts last)."""
    order: npt.NDArray[np.int64] = np.argsort(-lengths.astype(np.int64), kind="stable")
    return order
