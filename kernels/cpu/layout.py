"""Where things lie: buffer strides, and the block tiles that cover an output. Pure arithmetic, no numba."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from autoprune.kernels.cpu.shapes import BLOCK_TILES, GRADIENT_RUNS, GRADIENT_TILES, LANES, BlockTile

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


def cover_map(height: int, width: int, vectors: int, entries: int, registers: int) -> tuple[tuple[int, int, int], ...]:
    """Return (variant, row, column) of the block tiles that cover a map in the least predicted time."""
    return cover_cost(height, width, vectors, entries, registers)[1]


@lru_cache(maxsize=4096)
def cover_cost(
    height: int, width: int, vectors: int, entries: int, registers: int
) -> tuple[float, tuple[tuple[int, int, int], ...]]:
    """Return the predicted cycles for a group of filters, and (variant, row, column) of the tiles that cover a map.

    The map is cut into columns, each as wide as one kind of tile, and every column into tiles from top to bottom.

    Args:
        height, width: Of the output.
        vectors: Vectors of 16 filters in a block.
        entries: Mean kept blocks per group of filters, rounded.
        registers: Vectors that fit into the machine's registers.
    """
    return _cover(height, width, BLOCK_TILES, _prices(vectors, entries, registers))


@lru_cache(maxsize=4096)
def gradient_cover(height: int, width: int, entries: int, registers: int) -> tuple[tuple[int, int, int], ...]:
    """Return (variant, row, column) of the gradient tiles that cover a map in the least predicted time.

    Args:
        height, width: Of the output.
        entries: Mean kept blocks per group of filters, rounded.
        registers: Vectors that fit into the machine's registers.
    """
    prices = {}
    for variant, tile in enumerate(GRADIENT_TILES):
        pixels = tile.rows * tile.cols
        # A vector that finds no register is read again for every block.
        spilt = max(0, pixels - (registers - 3))
        loop = max((pixels + spilt + 2) * LOAD_CYCLES, pixels * FMA_CYCLES) + 1.0
        prices[variant] = entries * loop + TILE_CYCLES + pixels * LOAD_CYCLES
    return _cover(height, width, GRADIENT_TILES, prices)[1]


def gradient_runs(vectors: int, entries: float, registers: int) -> tuple[tuple[int, int], ...]:
    """Return (variant, first vector) of the runs that cover ``vectors`` of a plane in the least predicted time.

    Args:
        vectors: Of 16 pixels.
        entries: Mean kept weights per filter.
        registers: Vectors that fit into the machine's registers.
    """
    pieces = {
        variant: (size, entries * ((size + 3) * LOAD_CYCLES + 1.0) + TILE_CYCLES)
        for variant, size in enumerate(GRADIENT_RUNS)
        if size == 1 or size <= registers - 4
    }
    runs, first = [], 0
    for variant in _fill(vectors, pieces)[1]:
        runs.append((variant, first))
        first += GRADIENT_RUNS[variant]
    return tuple(runs)


def _cover(
    height: int, width: int, shapes: tuple[BlockTile, ...], prices: dict[int, float]
) -> tuple[float, tuple[tuple[int, int, int], ...]]:
    columns = {}
    for cols in {shapes[v].cols for v in prices}:
        pieces = {v: (shapes[v].rows, cost) for v, cost in prices.items() if shapes[v].cols == cols}
        columns[cols] = _fill(height, pieces)
    total, widths = _fill(width, {cols: (cols, cost) for cols, (cost, _) in columns.items()})
    tiles, left = [], 0
    for cols in widths:
        top = 0
        for variant in columns[cols][1]:
            tiles.append((variant, top, left))
            top += shapes[variant].rows
        left += cols
    return total, tuple(sorted(tiles, key=lambda tile: tile[1:]))


def _prices(vectors: int, entries: int, registers: int) -> dict[int, float]:
    """Return the predicted cycles of every tile of ``vectors`` whose sums fit beside the weights and one broadcast."""
    prices = {}
    for variant, tile in enumerate(BLOCK_TILES):
        pixels = tile.rows * tile.cols
        fits = pixels == 1 or pixels * vectors * tile.unroll <= registers - vectors - 1
        if tile.vectors == vectors and fits:
            sums, loads = pixels * vectors * FMA_CYCLES, (pixels + vectors) * LOAD_CYCLES
            loop = max(sums, loads, LATENCY_CYCLES / tile.unroll)
            prices[variant] = entries * loop + TILE_CYCLES + STORE_CYCLES * pixels * vectors
    return prices


def _fill(length: int, pieces: dict[int, tuple[int, float]]) -> tuple[float, list[int]]:
    """Return the cheapest pieces, (length, cost) by name, that add up to ``length``: infinite cost if none do."""
    best: list[tuple[float, int]] = [(0.0, -1)]
    for total in range(1, length + 1):
        options = [(best[total - size][0] + cost, name) for name, (size, cost) in pieces.items() if size <= total]
        best.append(min(options, default=(float("inf"), -1)))
    names: list[int] = []
    while length > 0 and best[length][1] >= 0:
        names.append(best[length][1])
        length -= pieces[names[-1]][0]
    return best[-1][0], sorted(names, reverse=True)
