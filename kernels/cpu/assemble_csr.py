"""Turns a convolution with single kept weights into instruction rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.assemble_common import Row, Work, epilogue, items, target
from autoprune.kernels.cpu.bands import Share, deal
from autoprune.kernels.cpu.layout import Strides, round_up
from autoprune.kernels.cpu.memory import Buffer, Memory
from autoprune.kernels.cpu.operations import Conv
from autoprune.kernels.cpu.planes import PlaneLayout, plan_planes
from autoprune.kernels.cpu.rows import Field, Op
from autoprune.kernels.cpu.shapes import CSR_TILES, LANES
from autoprune.kernels.formats import CSR, aligned


def csr_rows(conv: Conv, memory: Memory, work: Work, share: Share) -> tuple[list[Row], int]:
    """Return the rows that gather planes and convolve them, and the bytes of the packed weights."""
    layer, strides = conv.layer, memory.strides[conv.x.index]
    packed = CSR.pack(conv.weight)
    mean = len(packed.values) / len(conv.weight)
    layout = plan_planes(layer, mean)
    groups = round_up(len(conv.weight), LANES) // LANES
    covering, dealt = deal(
        share, conv.out.height, groups * LANES, lambda first, last: layout.cover(layer, mean, first, last)
    )
    layout = layout.with_tiles(layer, covering)
    plane, channels = layout.channel_bytes, round_up(conv.x.channels, LANES)
    work.image_bytes = max(work.image_bytes, plane * channels)
    # The same for every layer, so that a network's workspace is exactly its largest layer's.
    work.scratch_bytes = max(64 * LANES * tile.vectors for tile in CSR_TILES)
    sources = plane_sources(layer, conv.x, layout, strides)
    planar: Row = {
        Field.OP: Op.PLANAR,
        Field.X: memory.base[conv.x.index],
        Field.X_IMAGE: strides.image,
        Field.WORK_IMAGE: plane * channels,
        Field.PLANE: plane,
        Field.PIXELS: memory.keep(sources),
        Field.CHANNELS: conv.x.channels,
        Field.VECTORS: int(strides.pixel % 64 == 0),
        Field.WAIT: share.wait,
    } | _gathers(layer, layout, share, memory)
    blocks = layout.channel_blocks(conv.x.channels, mean)
    pointers, entries = _entries(layer, packed, layout, blocks)
    tiles, pixels = _csr_tiles(conv, layout)
    row = target(Op.CSR, conv.out, memory) | epilogue(conv, memory)
    row |= {
        Field.OUT: memory.base[conv.out.index],
        Field.WAIT: 0 if dealt is not None else share.wait,
        Field.MARK: share.mark,
        Field.GROUPS: groups,
        Field.POINTERS: memory.keep(pointers),
        Field.ENTRIES: memory.keep(entries),
        Field.SHIFTS: layout.shifts,
        Field.BLOCKS: blocks,
        Field.WORK_IMAGE: plane * channels,
        Field.PIXELS: memory.keep(_targets(pixels, memory.strides[conv.out.index])),
    } | items(tiles, dealt, memory)
    residual = conv.epilogue.residual
    if residual is not None:
        row[Field.RES] = memory.base[residual.index]
        row[Field.RES_PIXELS] = memory.keep(_targets(pixels, memory.strides[residual.index]))
    return [planar, row], packed.nbytes


def _gathers(layer: LayerSpec, layout: PlaneLayout, share: Share, memory: Memory) -> Row:
    """Return which vectors of the planes are gathered: all of them, or by every thread what its own rows read."""
    if not share.bands:
        return items(np.arange(len(layout.planes) * layout.positions // LANES, dtype=np.int32), None, memory)
    own = [layout.vectors(layer, band.first, band.last) if band.first < band.last else [] for band in share.bands]
    dealt = np.zeros((len(own), 4), np.int32)
    ends = np.cumsum([len(vectors) for vectors in own])
    dealt[1:, 0] = ends[:-1]
    dealt[:, 1], dealt[:, 2] = dealt[:, 0], ends
    return items(np.array([vector for vectors in own for vector in vectors], np.int32), dealt, memory)


def plane_sources(layer: LayerSpec, x: Buffer, layout: PlaneLayout, strides: Strides) -> npt.NDArray[np.int32]:
    """Return the byte offset in its image of the pixel that every plane position holds."""
    offsets = []
    for down, right, lead in layout.planes:
        row, col = np.divmod(np.arange(layout.positions) + lead, layout.width)
        i = row * layer.stride[0] + down - layer.padding[0]
        j = col * layer.stride[1] + right - layer.padding[1]
        inside = (i >= 0) & (i < x.height) & (j >= 0) & (j < x.width)
        # Everything outside the map is zero; without a halo no output reads such a position.
        offsets.append(np.where(inside, (i + x.halo) * strides.row + (j + x.halo) * strides.pixel, 0))
    return np.concatenate(offsets).astype(np.int32)


def _entries(
    layer: LayerSpec, packed: CSR, layout: PlaneLayout, blocks: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return int32 pointers and pairs {two byte offsets, two weights}.

    Sorted by group of 16 filters, block of input channels, filter, falling column shift.

    Groups are filled up with weights of zero to a multiple of what the tiles take at a time.
    """
    step = max(CSR_TILES[tile[0]].step for tile in layout.tiles)
    filters = round_up(packed.shape[0], LANES)
    channel, tap = np.divmod(packed.positions, layer.window[0] * layer.window[1])
    places = [layout.place(layer, *divmod(t, layer.window[1])) for t in range(layer.window[0] * layer.window[1])]
    plane, move, shift = np.array(places).reshape(-1, 3)[tap].T
    offset = channel * layout.channel_bytes + 4 * (plane * layout.positions + move)
    block = channel * blocks // packed.shape[1]
    filter_group, lane = np.divmod(np.repeat(np.arange(packed.shape[0]), np.diff(packed.row_ptr)), LANES)
    group = ((filter_group * blocks + block) * LANES + lane) * layout.shifts + layout.shifts - 1 - shift
    count = np.bincount(group, minlength=filters * blocks * layout.shifts)
    pointers = np.concatenate([[0], np.cumsum(-(-count // step) * step)])
    order = np.lexsort((offset, group))
    start = np.concatenate([[0], np.cumsum(count)])[:-1]
    index = pointers[group[order]] + np.arange(len(order)) - start[group[order]]
    pairs = aligned((max(int(pointers[-1]) // 2, 1), 2, 2), np.int32)
    pairs[index // 2, 0, index % 2] = offset[order]
    pairs[index // 2, 1, index % 2] = packed.values[order].view(np.int32)
    return pointers.astype(np.int32), pairs  # type: ignore[return-value]


def _csr_tiles(conv: Conv, layout: PlaneLayout) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the tile list and, for every position of every tile, (row, column) of its output pixel or (-1, -1)."""
    tiles, pixels, total = [], [], 0
    for variant, first, begin, end in layout.tiles:
        vectors = CSR_TILES[variant].vectors
        position = np.arange(first, first + LANES * vectors)
        row, col = np.divmod(position, layout.width)
        owned = (position >= begin) & (position < end) & (col < conv.out.width) & (row < conv.out.height)
        pixels.append(np.where(owned[:, None], np.stack([row, col], axis=1), -1))
        tiles.append((variant, first, vectors, total))
        total += LANES * vectors
    return np.array(tiles, np.int32), np.concatenate(pixels)


def _targets(pixels: npt.NDArray[np.int64], strides: Strides) -> npt.NDArray[np.int32]:
    row, col = pixels.T
    offsets = (row + strides.halo) * strides.row + (col + strides.halo) * strides.pixel
    return np.where(row >= 0, offsets, -1).astype(np.int32)
