"""The tile shapes that are compiled. A vector is 16 float32 lanes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

LANES = 16
VECTOR_BYTES = 4 * LANES


class BlockTile(NamedTuple):
    """Shape of a block tile: output pixels, vectors of 16 filters, and entries in flight."""

    rows: int
    cols: int
    vectors: int
    unroll: int = 1


class CsrTile(NamedTuple):
    """Shape of a CSR tile: vectors of 16 pixels, and sets of sums that entries take in turn."""

    vectors: int
    unroll: int

    @property
    def step(self) -> int:
        """Entries that the loop takes at a time; they are stored in pairs."""
        return max(2, self.unroll)


class DepthwiseTile(NamedTuple):
    """Shape of a depthwise tile: neighbouring pixels of a row, and the window's columns and stride; 0 takes any."""

    pixels: int
    columns: int = 0
    stride: int = 0


# Two flight paths of 4 cycles each want 8 independent sums; narrow tiles get them by unrolling.
BLOCK_TILES = (
    BlockTile(1, 1, 1, 8),
    BlockTile(1, 2, 1, 4),
    BlockTile(1, 4, 1, 2),
    BlockTile(1, 6, 1),
    BlockTile(1, 8, 1),
    BlockTile(1, 14, 1),
    BlockTile(2, 14, 1),
    BlockTile(2, 8, 1),
    BlockTile(3, 8, 1),
    BlockTile(4, 4, 1),
    BlockTile(2, 7, 1),
    BlockTile(3, 7, 1),
    BlockTile(4, 7, 1),
    BlockTile(1, 1, 2, 4),
    BlockTile(1, 2, 2, 2),
    BlockTile(1, 4, 2),
    BlockTile(1, 7, 2),
    BlockTile(2, 7, 2),
    BlockTile(1, 8, 2),
)
# Of the weight gradient: few shapes, for every one costs a second to compile; the more pixels the better.
GRADIENT_TILES = (
    BlockTile(1, 1, 1),
    BlockTile(1, 4, 1),
    BlockTile(1, 8, 1),
    BlockTile(1, 14, 1),
    BlockTile(2, 14, 1),
    BlockTile(1, 7, 1),
    BlockTile(3, 7, 1),
    BlockTile(4, 7, 1),
)
# Vectors of 16 pixels that the gradient of single weights holds at a time.
GRADIENT_RUNS = (1, 4, 7, 13)
# Those that know their window load every input once for all pixels that it belongs to; maps are often 7 · 2ⁿ wide.
DEPTHWISE_TILES = (
    DepthwiseTile(1),
    DepthwiseTile(4),
    DepthwiseTile(8),
    DepthwiseTile(7, 3, 1),
    DepthwiseTile(7, 3, 2),
    DepthwiseTile(7, 5, 1),
    DepthwiseTile(7, 5, 2),
)
CSR_TILES = (
    CsrTile(1, 4),
    CsrTile(2, 4),
    CsrTile(3, 2),
    CsrTile(4, 2),
    CsrTile(5, 2),
    CsrTile(6, 2),
    CsrTile(7, 2),
    CsrTile(8, 1),
    CsrTile(10, 1),
    CsrTile(12, 1),
    CsrTile(13, 1),
    CsrTile(14, 1),
)


@cache
def vector_registers() -> int:
    """Return how many 16-lane vectors the machine's registers hold at once."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 32
    # 16 registers of 8 lanes, or 32 (or 16) of 4.
    return 8


@cache
def has_estimates() -> bool:
    """Return whether 16 lanes of reciprocals to 14 bits, and their powers of two, are one instruction each."""
    from llvmlite import binding
    from numba.core import config

    # Code may be made for a lesser machine than this one.
    return bool(binding.get_host_cpu_features().get("avx512f")) and not vars(config).get("CPU_NAME")
