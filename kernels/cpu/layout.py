"""Where things lie: buffer strides, and the tiles that cover a convolution's output. Pure arithmetic, no numba."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.shapes import BLOCK_TILES, CSR_TILES, LANES, vector_registers

Int32s = npt.NDArray[np.int32]

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


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """How a CSR layer sees its input: one plane per channel and stride phase, positions in rows of ``width``.

    Attributes:
        width: Positions from one row to the next.
        phase_positions: Positions of one phase of one channel, a multiple of 16.
        phases: (row phase, column phase) in the order in which they follow each other.
        shifts: Lane-shift groups; 1 if the column shift is part of the entries' offsets.
        tiles: (variant, first position held, first position owned, end of those owned) of every tile.
    """

    width: int
    phase_positions: int
    phases: tuple[tuple[int, int], ...]
    shifts: int
    tiles: tuple[tuple[int, int, int, int], ...]

    @property
    def channel_bytes(self) -> int:
        """Bytes from one channel's planes to the next channel's; never a multiple of 1 KiB."""
        size = 4 * self.phase_positions * len(self.phases)
        return size + 64 if size % 1024 == 0 else size


def tap_shift(layer: LayerSpec, r: int, s: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (row, column) phase and the (row, column) shift in it of a tap."""
    down, right = r * layer.dilation[0], s * layer.dilation[1]
    return (down % layer.stride[0], right % layer.stride[1]), (down // layer.stride[0], right // layer.stride[1])


def plan_planes(layer: LayerSpec, entries: float) -> PlaneLayout:
    """Return the cheapest plane layout for a layer with ``entries`` kept weights per filter."""
    (height, width), (rows, cols) = layer.output_hw, layer.window
    taps = [tap_shift(layer, r, s) for r in range(rows) for s in range(cols)]
    phases = tuple(sorted({phase for phase, _ in taps}))
    down, right = (max(shift[axis] for _, shift in taps) for axis in (0, 1))
    needed = width + right
    # At stride 1 the zeros right of a row are also the zeros left of the next one.
    least = needed - layer.padding[1] if layer.stride == (1, 1) else needed
    least = max(least, 1)
    best: tuple[float, PlaneLayout] | None = None
    for pitch in sorted({least, round_up(least, 8), round_up(needed, LANES)}):
        for horner in {right > 0, False}:
            reach = right if horner else 0
            moves = [shift[0] * pitch + (0 if horner else shift[1]) for _, shift in taps]
            slot = sum(1.0 if move % LANES == 0 else 1.75 for move in moves) / len(moves)
            cost, tiles = _cover_positions(height, width, pitch, reach, entries, slot)
            end = max(first + LANES * CSR_TILES[variant].vectors for variant, first, _, _ in tiles)
            positions = round_up(end + down * pitch + right, LANES)
            layout = PlaneLayout(pitch, positions, phases, right + 1 if horner else 1, tiles)
            if best is None or cost < best[0]:
                best = (cost, layout)
    assert best is not None
    return best[1]


def _cover_positions(
    height: int, width: int, pitch: int, reach: int, entries: float, slot: float
) -> tuple[float, tuple[tuple[int, int, int, int], ...]]:
    """Return predicted cycles per filter and the tiles that cover all outputs of a map laid out in rows of ``pitch``.

    A tile's last ``reach`` positions are spoilt, because their right neighbours are in no register.
    """
    usable = [(v, t) for v, t in enumerate(CSR_TILES) if t.vectors * t.unroll + 2 <= vector_registers() or t.vectors == 1]
    total = (height - 1) * pitch + width

    def following(position: int) -> int:
        """Return the first output position that is not below ``position``."""
        row, col = divmod(position, pitch)
        return position if col < width else (row + 1) * pitch

    def price(vectors: int, unroll: int) -> float:
        loop = (vectors * slot + 1) * LOAD_CYCLES
        loop = max(loop, LATENCY_CYCLES / unroll)
        return entries * loop + (reach + 1) * (2 * vectors + 6) + 4 * vectors + TILE_CYCLES

    costs = {v: price(t.vectors, t.unroll) for v, t in usable}
    best: dict[int, tuple[float, int, int]] = {total: (0.0, -1, -1)}
    starts, seen = [0], {0}
    for start in starts:  # grows: every position where some sequence of tiles can begin
        for _, tile in usable:
            nxt = min(following(start // LANES * LANES + LANES * tile.vectors - reach), total)
            if nxt > start and nxt < total and nxt not in seen:
                seen.add(nxt)
                starts.append(nxt)
    for start in sorted(starts, reverse=True):
        options = []
        for variant, tile in usable:
            nxt = min(following(start // LANES * LANES + LANES * tile.vectors - reach), total)
            if nxt > start:
                options.append((costs[variant] + best[nxt][0], variant, nxt))
        best[start] = min(options)
    tiles, position = [], 0
    while position < total:
        _, variant, nxt = best[position]
        tiles.append((variant, position // LANES * LANES, position, nxt))
        position = nxt
    return best[0][0], tuple(tiles)
