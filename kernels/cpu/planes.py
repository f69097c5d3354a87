"""How a CSR layer sees its input: planes of pixels, and the runs of positions that its tiles cover. Pure arithmetic.

A plane holds one stride phase of one channel, row after row, ``width`` positions apart. A vector load that crosses a
cache line costs two, so column shifts are left to the tile (see ``tiles``), and row shifts that are no multiple of
16 positions are served by further copies of the plane that start so many positions later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.layout import LATENCY_CYCLES, LOAD_CYCLES, TILE_CYCLES, round_up
from autoprune.kernels.cpu.shapes import CSR_TILES, LANES, vector_registers

Tile = tuple[int, int, int, int]

SPLIT_LOAD = 2.1  # cost of a load that crosses a cache line, in loads
NEAR_BYTES, BLOCK_BYTES = 44 * 1024, 24 * 1024  # planes that are left in one block, and the size of blocks otherwise
BLOCK_ENTRIES = 10  # per filter and shift group in a block
GATHER_CYCLES = 4.0  # to bring one vector of one channel into a plane


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """Layout of a layer's planes.

    Attributes:
        width: Positions from one row to the next.
        positions: Of one plane, a multiple of 16.
        planes: (row phase, column phase, lead) of a channel's planes, in their order; position p of a plane holds
            position p + lead of the phase.
        shifts: Column-shift groups; 1 if the column shift is part of the entries' offsets.
        slot: Predicted cost of a vector load, in loads that cross no cache line.
        tiles: (variant, first position held, first position owned, end of those owned).
    """

    width: int
    positions: int
    planes: tuple[tuple[int, int, int], ...]
    shifts: int
    slot: float
    tiles: tuple[Tile, ...]

    @property
    def channel_bytes(self) -> int:
        """Bytes from one channel's planes to the next channel's; never a multiple of 1 KiB."""
        size = 4 * self.positions * len(self.planes)
        return size + 64 if size % 1024 == 0 else size

    def channel_blocks(self, channels: int, entries: float) -> int:
        """Return into how many blocks to split the input channels, so that a tile's part of a block stays near.

        Args:
            channels: Input channels of the layer.
            entries: Kept weights per filter; blocks with very few are not worth their start.
        """
        tile = max(CSR_TILES[variant].vectors for variant, *_ in self.tiles)
        held = channels * min(self.channel_bytes, len(self.planes) * 4 * (LANES * tile + 2 * self.width))
        if held <= NEAR_BYTES:
            return 1
        return max(1, min(-(-held // BLOCK_BYTES), int(entries / self.shifts / BLOCK_ENTRIES)))

    def cover(self, layer: LayerSpec, entries: float, first: int, last: int) -> tuple[float, list[Tile]]:
        """Return predicted cycles per filter and the tiles that cover the output rows ``first`` … ``last - 1``."""
        return _cover_rows(layer, (first, last), self.width, self.shifts - 1, entries, self.slot)

    def with_tiles(self, layer: LayerSpec, tiles: Sequence[Tile]) -> PlaneLayout:
        """Return the layout with these tiles, its planes as long as they read."""
        return replace(self, tiles=tuple(tiles), positions=_positions(layer, self.width, tiles))

    def vectors(self, layer: LayerSpec, first: int, last: int) -> list[int]:
        """Return the numbers of the plane vectors that the output rows ``first`` … ``last - 1`` read, of all planes."""
        low, high = first * self.width, (last - 1) * self.width + layer.output_hw[1]
        found: set[int] = set()
        for r, s in product(range(layer.window[0]), range(layer.window[1])):
            plane, move, shift = self.place(layer, r, s)
            begin, end = (low + move) // LANES, -(-(high + move + shift) // LANES)
            found |= {plane * (self.positions // LANES) + vector for vector in range(begin, end)}
        return sorted(found)

    def place(self, layer: LayerSpec, r: int, s: int) -> tuple[int, int, int]:
        """Return (plane, position in it, column shift) at which tap (r, s) finds the input of output position 0."""
        phase, (down, right) = tap_shift(layer, r, s)
        move, shift = (down * self.width, right) if self.shifts > 1 else (down * self.width + right, 0)
        lead = move % LANES if (*phase, move % LANES) in self.planes else 0
        return self.planes.index((*phase, lead)), move - lead, shift


def tap_shift(layer: LayerSpec, r: int, s: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (row, column) phase and the (row, column) shift in it of a tap."""
    down, right = r * layer.dilation[0], s * layer.dilation[1]
    return (down % layer.stride[0], right % layer.stride[1]), (down // layer.stride[0], right // layer.stride[1])


def plan_planes(layer: LayerSpec, entries: float) -> PlaneLayout:
    """Return the layout of the least predicted time for a layer with ``entries`` kept weights per filter."""
    return min(_candidates(layer, entries), key=lambda pair: pair[0])[1]


def _candidates(layer: LayerSpec, entries: float) -> Iterator[tuple[float, PlaneLayout]]:
    (height, width), (rows, cols) = layer.output_hw, layer.window
    taps = [tap_shift(layer, r, s) for r in range(rows) for s in range(cols)]
    beside = max(right for _, (_, right) in taps)
    needed = width + beside
    # At stride 1 the zeros right of a row are also the zeros left of the next one.
    least = max(1, needed - layer.padding[1] if layer.stride == (1, 1) else needed)
    for pitch in sorted({least, round_up(least, 8), round_up(needed, LANES)}):
        for by_shift in {beside > 0, False}:
            moves = [(*phase, down * pitch + (0 if by_shift else right)) for phase, (down, right) in taps]
            split = sum(1 for *_, move in moves if move % LANES) / len(moves)
            cost, tiles = {}, {}
            for slot in {1.0, 1.0 + split * (SPLIT_LOAD - 1.0)}:
                reach = beside if by_shift else 0
                cost[slot], tiles[slot] = _cover_rows(layer, (0, height), pitch, reach, entries, slot)
            for copied in {False, split > 0}:
                leads = {(i, j, move % LANES if copied else 0) for i, j, move in moves}
                slot = min(cost) if copied else max(cost)
                positions = _positions(layer, pitch, tiles[slot])
                gather = GATHER_CYCLES * len(leads) * positions / LANES * layer.channels / layer.filters
                layout = PlaneLayout(
                    pitch, positions, tuple(sorted(leads)), beside + 1 if by_shift else 1, slot, tuple(tiles[slot])
                )
                yield cost[slot] + gather, layout


def _positions(layer: LayerSpec, pitch: int, tiles: Sequence[Tile]) -> int:
    """Return the positions of a plane that is read by ``tiles`` at every shift."""
    below, beside = (
        max(tap_shift(layer, r, s)[1][axis] for r in range(layer.window[0]) for s in range(layer.window[1]))
        for axis in (0, 1)
    )
    end = max(first + LANES * CSR_TILES[variant].vectors for variant, first, _, _ in tiles)
    return round_up(end + below * pitch + beside, LANES)


def _cover_rows(
    layer: LayerSpec, rows: tuple[int, int], pitch: int, reach: int, entries: float, slot: float
) -> tuple[float, list[Tile]]:
    """Return predicted cycles per filter and the tiles that cover output rows laid out ``pitch`` positions apart.

    A tile's last ``reach`` positions are spoilt, because their right neighbours are in no register; not those whose
    missing neighbours are all zeros beside the map.
    """
    width = layer.output_hw[1]
    zero_from = layer.input_hw[1] + layer.padding[1] if layer.stride[1] == 1 else pitch + reach
    room = vector_registers() - 2
    usable = [(v, t) for v, t in enumerate(CSR_TILES) if t.vectors * t.unroll <= room or t.vectors == 1]
    begin, total = rows[0] * pitch, (rows[1] - 1) * pitch + width

    def owned_end(start: int, vectors: int) -> int:
        """Return the first output position from ``start`` on that a tile does not serve."""
        end = start // LANES * LANES + LANES * vectors
        position = end - reach
        while position < end and position % pitch < width and position % pitch + end - position >= zero_from:
            position += 1
        row, col = divmod(position, pitch)
        return min(position if col < width else (row + 1) * pitch, total)

    costs = {}
    for variant, tile in usable:
        loop = max((tile.vectors * slot + 1) * LOAD_CYCLES, LATENCY_CYCLES / tile.unroll)
        costs[variant] = entries * loop + (reach + 1) * (0.7 * tile.vectors + 4) + 4 * tile.vectors + TILE_CYCLES
    starts, seen = [begin], {begin, total}
    for start in starts:  # grows: every position where some sequence of tiles can begin
        for following in (owned_end(start, tile.vectors) for _, tile in usable):
            if following > start and following not in seen:
                seen.add(following)
                starts.append(following)
    best: dict[int, tuple[float, int, int]] = {total: (0.0, -1, -1)}
    for start in sorted(starts, reverse=True):
        options = ((v, owned_end(start, tile.vectors)) for v, tile in usable)
        best[start] = min((costs[v] + best[end][0], v, end) for v, end in options if end > start)
    tiles, position = [], begin
    while position < total:
        _, variant, end = best[position]
        tiles.append((variant, position // LANES * LANES, position, end))
        position = end
    return best[begin][0], tiles
