"""Packed forms of a pruned weight; every kernel reads one of them."""

from autoprune.kernels.formats.cpu import ALIGNMENT, CHANNEL_CHUNK, CSR, Blocked, aligned, traversal
from autoprune.kernels.formats.fkw import FKW
from autoprune.kernels.formats.packed import Packed
from autoprune.kernels.formats.rows import SparseRows

__all__ = [
    "ALIGNMENT",
    "CHANNEL_CHUNK",
    "CSR",
    "FKW",
    "Blocked",
    "Packed",
    "SparseRows",
    "aligned",
    "traversal",
]
