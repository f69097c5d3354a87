"""Packed forms of a pruned weight; every kernel reads one of them."""

from autoprune.kernels.formats.cpu import ALIGNMENT, CHANNEL_CHUNK, CSR, Blocked, aligned, traversal

__all__ = ["ALIGNMENT", "CHANNEL_CHUNK", "CSR", "Blocked", "aligned", "traversal"]
