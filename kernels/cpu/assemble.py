"""Turns one operation on buffers into instruction rows: packs weights, computes offsets, plans tiles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.assemble_common import Row, Work, epilogue, float_bits, items, padded, target
from autoprune.kernels.cpu.assemble_csr import csr_rows
from autoprune.kernels.cpu.bands import Share, deal
from autoprune.kernels.cpu.layout import Strides, cover_cost, round_up
from autoprune.kernels.cpu.memory import Buffer, Memory
from autoprune.kernels.cpu.operations import Conv, Depthwise, Elementwise, Operation, Pool
from autoprune.kernels.cpu.rows import Field, Op
from autoprune.kernels.cpu.shapes import DEPTHWISE_TILES, LANES, vector_registers
from autoprune.kernels.formats import Blocked, aligned


def assemble(operation: Operation, memory: Memory, work: Work, share: Share) -> tuple[list[Row], int]:
    """Return the rows of an operation and the bytes of its packed weights."""
    if isinstance(operation, Conv):
        if operation.kernel == "csr":
            return csr_rows(operation, memory, work, share)
        return _blocks(operation, memory, share)
    size = 0
    if isinstance(operation, Depthwise):
        row, size = _depthwise(operation, memory)
    else:
        row = _elementwise(operation, memory) if isinstance(operation, Elementwise) else _pool(operation, memory)
    return [row | _lines(operation.out, memory, share)], size


def _lines(buffer: Buffer, memory: Memory, share: Share) -> Row:
    """Return the fields of a row whose items are a buffer's lines of pixels."""
    lines, dealt = deal(share, buffer.height, 1, lambda first, last: (float(last - first), list(range(first, last))))
    return {Field.WAIT: share.wait, Field.MARK: share.mark} | items(np.array(lines, np.int32), dealt, memory)


def transfer(buffer: Buffer, memory: Memory, op: Op, share: Share) -> Row:
    """Return the row that copies between a buffer and the user's NCHW tensor."""
    strides = memory.strides[buffer.index]
    return _lines(buffer, memory, share) | {
        Field.OP: op,
        Field.X: memory.at(buffer),
        Field.X_IMAGE: strides.image,
        Field.X_ROW: strides.row,
        Field.X_STEP: strides.pixel,
        Field.CHANNELS: buffer.channels,
        Field.HEIGHT: buffer.height,
        Field.WIDTH: buffer.width,
    }


def _blocks(conv: Conv, memory: Memory, share: Share) -> tuple[list[Row], int]:
    """Filters in blocks of 32 where the kernel allows it, the remainder in blocks of 16."""
    filters = round_up(conv.weight.shape[0], LANES)
    dense = conv.kernel == "dense"
    # With few registers a wide block leaves room for too few pixels; its halves run as blocks of 16.
    pair = (dense or conv.block == 2 * LANES) and vector_registers() >= 32
    paired = filters // (2 * LANES) * (2 * LANES) if pair else 0
    rows, size = [], 0
    base = target(Op.BLOCK, conv.out, memory) | epilogue(conv, memory)
    for first, last, block in ((0, paired, 2 * LANES), (paired, filters, LANES)):
        if first == last:
            continue
        pack = partial(Blocked.pack, conv.weight[first:last], block, keep_all=dense)
        packed = memory.once(conv.weight, (first, block, dense), pack)
        row = base | _block_row(conv, packed, memory, share)
        for moved in (Field.OUT, Field.BIAS, *((Field.RES,) if conv.epilogue.residual is not None else ())):
            row[moved] += 4 * first
        rows.append(row)
        size += packed.nbytes
    rows[0][Field.WAIT], rows[-1][Field.MARK] = share.wait, share.mark
    return rows, size


def _block_row(conv: Conv, packed: Blocked, memory: Memory, share: Share) -> Row:
    layer, strides = conv.layer, memory.strides[conv.x.index]
    groups, vectors = len(packed.row_ptr) - 1, packed.block // LANES

    def entries() -> npt.NDArray[np.int32]:
        channel, tap = np.divmod(packed.positions, layer.window[0] * layer.window[1])
        r, s = np.divmod(tap, layer.window[1])
        byte = r * layer.dilation[0] * strides.row + s * layer.dilation[1] * strides.pixel + 4 * channel
        return np.asarray(byte, np.int32)

    offsets = memory.once(packed, (strides.row, strides.pixel), entries)
    mean = round(len(offsets) / groups)
    cover, dealt = deal(
        share, conv.out.height, groups, lambda first, last: _cover(first, last, conv.out.width, vectors, mean)
    )
    return items(_block_tiles(conv, memory, cover), dealt, memory) | {
        Field.X: memory.at(conv.x, -layer.padding[0], -layer.padding[1]),
        Field.X_IMAGE: strides.image,
        Field.X_ROW: layer.stride[0] * strides.row,
        Field.X_STEP: layer.stride[1] * strides.pixel,
        Field.GROUPS: groups,
        Field.VECTORS: vectors,
        Field.POINTERS: memory.keep(packed.row_ptr),
        Field.ENTRIES: memory.keep(offsets),
        Field.WEIGHTS: memory.keep(packed.values),
    }


def _cover(
    first: int, last: int, width: int, vectors: int, entries: int
) -> tuple[float, list[tuple[int, int, int]]]:
    """Return predicted cycles and the (variant, row, column) of the tiles of output rows ``first`` … ``last - 1``."""
    cost, tiles = cover_cost(last - first, width, vectors, entries, vector_registers())
    return cost, [(variant, first + row, col) for variant, row, col in tiles]


def _block_tiles(conv: Conv, memory: Memory, cover: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.int32]:
    variant, row, col = np.array(cover, np.int64).T
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


def _depthwise(conv: Depthwise, memory: Memory) -> tuple[Row, int]:
    layer, strides = conv.layer, memory.strides[conv.x.index]
    channels, _, rows, columns = conv.weight.shape

    def pack() -> npt.NDArray[np.generic]:
        whole = aligned((rows * columns, round_up(channels, LANES)), np.float32)
        whole[:, :channels] = conv.weight.reshape(channels, -1).T
        return whole

    packed = memory.once(conv.weight, "depthwise", pack)
    variant = _depthwise_variant(layer)
    row = target(Op.DEPTHWISE, conv.out, memory) | epilogue(conv, memory)
    row |= {
        Field.VARIANT: variant,
        Field.VECTORS: DEPTHWISE_TILES[variant].pixels,
        Field.X: memory.at(conv.x, -layer.padding[0], -layer.padding[1]),
        Field.X_IMAGE: strides.image,
        Field.X_ROW: layer.stride[0] * strides.row,
        Field.X_STEP: layer.stride[1] * strides.pixel,
        Field.TAP_ROW: layer.dilation[0] * strides.row,
        Field.TAP_STEP: layer.dilation[1] * strides.pixel,
        Field.WINDOW_H: rows,
        Field.WINDOW_W: columns,
        Field.WEIGHTS: memory.keep(packed),
    }
    return row, packed.nbytes


def _depthwise_variant(layer: LayerSpec) -> int:
    """Return the number of the tile that covers a line fastest: made for the window, or else the widest that fits."""
    width, known = layer.output_hw[1], (layer.window[1], layer.stride[1])
    fits = [variant for variant, tile in enumerate(DEPTHWISE_TILES) if tile.pixels <= width]
    made = [v for v in fits if (DEPTHWISE_TILES[v].columns, DEPTHWISE_TILES[v].stride) == known]
    if made and layer.dilation[1] == 1:
        return made[0]
    return max(fits, key=lambda v: DEPTHWISE_TILES[v].pixels if not DEPTHWISE_TILES[v].columns else 0)


def _elementwise(operation: Elementwise, memory: Memory) -> Row:
    row = target(Op.ADD, operation.out, memory)
    row[Field.OUT] += 4 * operation.offset
    row[Field.CHANNELS] = round_up(operation.x.channels, LANES) // LANES
    x = memory.strides[operation.x.index]
    row |= {Field.X: memory.at(operation.x), Field.X_IMAGE: x.image, Field.X_ROW: x.row, Field.X_STEP: x.pixel}
    if operation.y is not None:
        y = memory.strides[operation.y.index]
        whole = (operation.y.height, operation.y.width) == (operation.x.height, operation.x.width)
        row |= {
            Field.Y: memory.at(operation.y),
            Field.Y_IMAGE: y.image,
            Field.Y_ROW: y.row if whole else 0,
            Field.STRIDE_W: y.pixel if whole else 0,
        }
    if operation.scale is not None and operation.shift is not None:
        row |= {
            Field.SCALE: memory.keep(padded(operation.scale)),
            Field.SHIFT: memory.keep(padded(operation.shift)),
        }
    return row | {
        Field.RELU: int(operation.relu),
        Field.CAP: float_bits(operation.cap),
        Field.TIMES: int(operation.times),
        Field.CURVE: int(operation.curve),
        Field.SLOPE: float_bits(operation.slope),
    }


def _pool(pool: Pool, memory: Memory) -> Row:
    x = memory.strides[pool.x.index]
    row = target(Op.POOL, pool.out, memory)
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
        Field.MEAN: int(pool.mean) + int(pool.mean and pool.inside),
        Field.IN_HEIGHT: pool.x.height,
        Field.IN_WIDTH: pool.x.width,
    }
