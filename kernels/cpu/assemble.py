"""Turns one operation on buffers into instruction rows: packs weights, computes offsets, plans tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.layout import Strides, cover_map, round_up
from autoprune.kernels.cpu.planes import PlaneLayout, plan_planes
from autoprune.kernels.cpu.memory import Buffer, Memory
from autoprune.kernels.cpu.rows import Field, Op
from autoprune.kernels.cpu.shapes import BLOCK_TILES, CSR_TILES, LANES, vector_registers
from autoprune.kernels.formats import CSR, Blocked, aligned

Row = dict[Field, int]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What follows the sums: ``relu(conv + bias + residual)``, each part optional."""

    relu: bool = False
    residual: Buffer | None = None


@dataclass(frozen=True, slots=True)
class Conv:
    """One convolution as it was added to a program; ``weight`` (K, C, R, S) and ``bias`` (K) float32."""

    x: Buffer
    out: Buffer
    layer: LayerSpec
    weight: Floats
    bias: Floats
    kernel: Literal["dense", "block", "csr"]
    epilogue: Epilogue
    block: int


@dataclass(frozen=True, slots=True)
class Elementwise:
    """``out = x + y``, or a copy without ``y``, rectified if ``relu``."""

    x: Buffer
    y: Buffer | None
    out: Buffer
    relu: bool


@dataclass(frozen=True, slots=True)
class Pool:
    """Maximum or mean over windows; the mean counts padded zeros, as torch does by default."""

    x: Buffer
    out: Buffer
    window: tuple[int, int]
    stride: int
    padding: int
    mean: bool


Operation = Conv | Elementwise | Pool


@dataclass(slots=True)
class Work:
    """Workspace that the rows assembled so far need, per image and per thread."""

    image_bytes: int = 0
    scratch_bytes: int = 0


def assemble(operation: Operation, memory: Memory, work: Work) -> tuple[list[Row], int]:
    """Return the rows of an operation and the bytes of its packed weights."""
    if isinstance(operation, Conv):
        return _csr(operation, memory, work) if operation.kernel == "csr" else _blocks(operation, memory)
    if isinstance(operation, Elementwise):
        return [_elementwise(operation, memory)], 0
    return [_pool(operation, memory)], 0


def transfer(buffer: Buffer, memory: Memory, op: Op) -> Row:
    """Return the row that copies between a buffer and the user's NCHW tensor."""
    strides = memory.strides[buffer.index]
    return {
        Field.OP: op,
        Field.X: memory.at(buffer),
        Field.X_IMAGE: strides.image,
        Field.X_ROW: strides.row,
        Field.X_STEP: strides.pixel,
        Field.CHANNELS: buffer.channels,
        Field.HEIGHT: buffer.height,
        Field.WIDTH: buffer.width,
    }


def _target(op: Op, buffer: Buffer, memory: Memory) -> Row:
    strides = memory.strides[buffer.index]
    return {
        Field.OP: op,
        Field.OUT: memory.at(buffer),
        Field.OUT_IMAGE: strides.image,
        Field.OUT_ROW: strides.row,
        Field.OUT_STEP: strides.pixel,
        Field.HEIGHT: buffer.height,
        Field.WIDTH: buffer.width,
        Field.CHANNELS: round_up(buffer.channels, LANES) // LANES,
    }


def _epilogue(conv: Conv, memory: Memory) -> Row:
    row: Row = {Field.RELU: int(conv.epilogue.relu), Field.BIAS: memory.keep(_padded_bias(conv))}
    residual = conv.epilogue.residual
    if residual is not None:
        strides = memory.strides[residual.index]
        row |= {
            Field.RES: memory.at(residual),
            Field.RES_IMAGE: strides.image,
            Field.RES_ROW: strides.row,
            Field.RES_STEP: strides.pixel,
        }
    return row


def _padded_bias(conv: Conv) -> npt.NDArray[np.generic]:
    bias = aligned((round_up(len(conv.bias), 2 * LANES),), np.float32)
    bias[: len(conv.bias)] = conv.bias
    return bias


def _blocks(conv: Conv, memory: Memory) -> tuple[list[Row], int]:
    """Filters in blocks of 32 where the kernel allows it, the remainder in blocks of 16."""
    filters = round_up(conv.weight.shape[0], LANES)
    dense = conv.kernel == "dense"
    pair = conv.block == 2 * LANES or (dense and vector_registers() >= 32)
    paired = filters // (2 * LANES) * (2 * LANES) if pair else 0
    rows, size = [], 0
    base = _target(Op.BLOCK, conv.out, memory) | _epilogue(conv, memory)
    for first, last, block in ((0, paired, 2 * LANES), (paired, filters, LANES)):
        if first == last:
            continue
        packed = Blocked.pack(conv.weight[first:last], block, keep_all=dense)
        row = base | _block_row(conv, packed, memory)
        for moved in (Field.OUT, Field.BIAS, *((Field.RES,) if conv.epilogue.residual is not None else ())):
            row[moved] += 4 * first
        rows.append(row)
        size += packed.size_bytes
    return rows, size


def _block_row(conv: Conv, packed: Blocked, memory: Memory) -> Row:
    layer, strides = conv.layer, memory.strides[conv.x.index]
    groups, vectors = len(packed.row_ptr) - 1, packed.block // LANES
    channel, tap = np.divmod(packed.positions, layer.window[0] * layer.window[1])
    r, s = np.divmod(tap, layer.window[1])
    offsets = r * layer.dilation[0] * strides.row + s * layer.dilation[1] * strides.pixel + 4 * channel
    return {
        Field.X: memory.at(conv.x, -layer.padding[0], -layer.padding[1]),
        Field.X_IMAGE: strides.image,
        Field.X_ROW: layer.stride[0] * strides.row,
        Field.X_STEP: layer.stride[1] * strides.pixel,
        Field.TILES: memory.keep(_block_tiles(conv, memory, vectors, round(len(offsets) / groups))),
        Field.N_TILES: len(cover_map(conv.out.height, conv.out.width, vectors, round(len(offsets) / groups))),
        Field.GROUPS: groups,
        Field.VECTORS: vectors,
        Field.POINTERS: memory.keep(packed.row_ptr),
        Field.ENTRIES: memory.keep(offsets.astype(np.int32)),
        Field.WEIGHTS: memory.keep(packed.values),
    }


def _block_tiles(conv: Conv, memory: Memory, vectors: int, entries: int) -> npt.NDArray[np.int32]:
    variant, row, col = np.array(cover_map(conv.out.height, conv.out.width, vectors, entries), np.int64).T
    x, out = memory.strides[conv.x.index], memory.strides[conv.out.index]
    residual = conv.epilogue.residual
    res = memory.strides[residual.index] if residual is not None else Strides(0, 0, 0, 0)
    stride = conv.layer.stride
    columns = [
        variant,
        row * stride[0] * x.row + col * stride[1] * x.pixel,
        row * out.row + col * out.pixel,
        row * res.row + col * res.pixel,
    ]
    return np.ascontiguousarray(np.stack(columns, axis=1).astype(np.int32))


def _csr(conv: Conv, memory: Memory, work: Work) -> tuple[list[Row], int]:
    layer, strides = conv.layer, memory.strides[conv.x.index]
    packed = CSR.pack(conv.weight)
    layout = plan_planes(layer, len(packed.values) / len(conv.weight))
    plane, channels = layout.channel_bytes, round_up(conv.x.channels, LANES)
    work.image_bytes = max(work.image_bytes, plane * channels)
    work.scratch_bytes = max(work.scratch_bytes, max(64 * LANES * CSR_TILES[tile[0]].vectors for tile in layout.tiles))
    sources = _sources(conv, layout, strides)
    planar: Row = {
        Field.OP: Op.PLANAR,
        Field.X: memory.base[conv.x.index],
        Field.X_IMAGE: strides.image,
        Field.WORK_IMAGE: plane * channels,
        Field.PLANE: plane,
        Field.PIXELS: memory.keep(sources),
        Field.N_VECTORS: len(sources) // LANES,
        Field.CHANNELS: conv.x.channels,
        Field.VECTORS: int(strides.pixel % 64 == 0),
    }
    step = max(CSR_TILES[tile[0]].step for tile in layout.tiles)
    pointers, entries = _entries(layer, packed, layout, step)
    tiles, pixels = _csr_tiles(conv, layout)
    row = _target(Op.CSR, conv.out, memory) | _epilogue(conv, memory)
    row |= {
        Field.OUT: memory.base[conv.out.index],
        Field.TILES: memory.keep(tiles),
        Field.N_TILES: len(tiles),
        Field.GROUPS: round_up(len(conv.weight), LANES) // LANES,
        Field.POINTERS: memory.keep(pointers),
        Field.ENTRIES: memory.keep(entries),
        Field.SHIFTS: layout.shifts,
        Field.WORK_IMAGE: plane * channels,
        Field.PIXELS: memory.keep(_targets(pixels, memory.strides[conv.out.index])),
    }
    residual = conv.epilogue.residual
    if residual is not None:
        row[Field.RES] = memory.base[residual.index]
        row[Field.RES_PIXELS] = memory.keep(_targets(pixels, memory.strides[residual.index]))
    return [planar, row], packed.size_bytes


def _sources(conv: Conv, layout: PlaneLayout, strides: Strides) -> npt.NDArray[np.int32]:
    """Return the byte offset in its image of the pixel that every plane position holds."""
    layer, x = conv.layer, conv.x
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
    layer: LayerSpec, packed: CSR, layout: PlaneLayout, step: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return int32 pointers and pairs {two byte offsets, two weights}, sorted by filter and falling column shift.

    Groups are filled up to a multiple of ``step`` entries with weights of zero.
    """
    filters = round_up(packed.shape[0], LANES)
    channel, tap = np.divmod(packed.positions, layer.window[0] * layer.window[1])
    places = [layout.place(layer, *divmod(t, layer.window[1])) for t in range(layer.window[0] * layer.window[1])]
    plane, move, shift = np.array(places).reshape(-1, 3)[tap].T
    offset = channel * layout.channel_bytes + 4 * (plane * layout.positions + move)
    group = np.repeat(np.arange(packed.shape[0]), np.diff(packed.row_ptr)) * layout.shifts
    group += layout.shifts - 1 - shift
    count = np.bincount(group, minlength=filters * layout.shifts)
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


def _elementwise(operation: Elementwise, memory: Memory) -> Row:
    row = _target(Op.ADD, operation.out, memory)
    x = memory.strides[operation.x.index]
    row |= {Field.X: memory.at(operation.x), Field.X_IMAGE: x.image, Field.X_ROW: x.row, Field.X_STEP: x.pixel}
    if operation.y is not None:
        y = memory.strides[operation.y.index]
        row |= {Field.Y: memory.at(operation.y), Field.Y_IMAGE: y.image, Field.Y_ROW: y.row, Field.STRIDE_W: y.pixel}
    return row | {Field.RELU: int(operation.relu)}


def _pool(pool: Pool, memory: Memory) -> Row:
    x = memory.strides[pool.x.index]
    row = _target(Op.POOL, pool.out, memory)
    return row | {
        Field.X: memory.at(pool.x),
        Field.X_IMAGE: x.image,
        Field.X_ROW: x.row,
        Field.X_STEP: x.pixel,
        Field.WINDOW_H: pool.window[0],
        Field.WINDOW_W: pool.window[1],
        Field.STRIDE_H: pool.stride,
        Field.STRIDE_W: pool.stride,
        Field.PAD_H: pool.padding,
        Field.PAD_W: pool.padding,
        Field.MEAN: int(pool.mean),
        Field.IN_HEIGHT: pool.x.height,
        Field.IN_WIDTH: pool.x.width,
    }
