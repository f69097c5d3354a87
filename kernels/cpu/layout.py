"""Where things lie: buffer strides, and the block tiles that cover an output. Pure arithmetic, no numba."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from autoprune.kernels.cpu.shapes import BLOCK_TILES, LANES, vector_registers

# Cycles, measured on Zen 5: a broadcast or vector load .58, an FMA .5, and what a tile costs around its loop.
LOAD_CYCLES, FMA_CYCLES, LATENCY_CYCLES, TILE_CYCLES, STORE_CYCLES = 0.58, 0.5, 4.0, 20.0, 1.2


def round_up(value: int, unit: int) -> int:
    """Return the least multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


@dataclass(frozen=True, slots=True)
class Strides:
    """Bytes from one pixel, row and image of a buffer to the next, and where its first real pixel lies."""

    pixel: int
    row: int
    image: int
    halo: int

    @classmethod
    def of(cls, channels: int, height: int, width: int, halo: int, exact: bool) -> Strides:
        """Lay out a buffer; ``exact`` stores C channels per pixel instead of the next multiple of 16."""
        stored = channels if exact else round_up(channels, LANES)
        if not exact and stored % 256 == 0:
            stored += LANES  # pixels a multiple of 1 KiB apart compete for the same few cache sets
        row = 4 * stored * (width + 2 * halo)
        return cls(4 * stored, row, row * (height + 2 * halo), halo)

    def at(self, row: int, col: int) -> int:
        """Return the byte offset of a pixel in its image; (0, 0) is the first real one."""
        return (row + self.halo) * self.row + (col + self.halo) * self.pixel


@lru_cache(maxsize=4096)
def cover_map(height: int, width: int, vectors: int, entries: int) -> tuple[tuple[int, int, int], ...]:
    """Return (variant, row, column) of the block tiles that cover a map in the least predicted time.

    Args:
        height, width: Of the output.
        vectors: Vectors of 16 filters in a block.
        entries: Mean kept blocks per group of filters, rounded.
    """
    usable = []
    for variant, tile in enumerate(BLOCK_TILES):
        pixels = tile.rows * tile.cols
        if tile.vectors != vectors or (pixels > 1 and pixels * vectors * tile.unroll > tile_budget(vectors)):
            continue
        loads = (pixels + vectors) * LOAD_CYCLES
        loop = max(pixels * vectors * FMA_CYCLES, loads, LATENCY_CYCLES / tile.unroll)
        usable.append((variant, tile, entries * loop + TILE_CYCLES + STORE_CYCLES * pixels * vectors))

    @lru_cache(maxsize=None)
    def column(cols: int, rows_left: int) -> tuple[float, tuple[int, ...]]:
        if rows_left == 0:
            return 0.0, ()
        best: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for variant, tile, cycles in usable:
            if tile.cols == cols and tile.rows <= rows_left:
                rest, tiles = column(cols, rows_left - tile.rows)
                best = min(best, (cycles + rest, (variant, *tiles)))
        return best

    @lru_cache(maxsize=None)
    def plane(cols_left: int) -> tuple[float, tuple[int, ...]]:
        if cols_left == 0:
            return 0.0, ()
        best: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for cols in {tile.cols for _, tile, _ in usable if tile.cols <= cols_left}:
            rest, columns = plane(cols_left - cols)
            best = min(best, (column_cost(cols) + rest, (cols, *columns)))
        return best

    @lru_cache(maxsize=None)
    def column_cost(cols: int) -> float:
        for rows in range(0, height, 64):  # fills the cache bottom-up, so that the recursion stays shallow
            column(cols, rows)
        return column(cols, height)[0]

    for cols in range(0, width, 64):
        plane(cols)
    tiles, left = [], 0
    for cols in plane(width)[1]:
        top = 0
        for variant in column(cols, height)[1]:
            tiles.append((variant, top, left))
            top += BLOCK_TILES[variant].rows
        left += cols
    return tuple(sorted(tiles, key=lambda tile: tile[1:]))


def tile_budget(vectors: int) -> int:
    """Return how many sums a tile may keep in registers beside ``vectors`` weights and one broadcast."""
    return vector_registers() - vectors - 1
