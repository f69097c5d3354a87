"""Where the weight gradients' kernels find what they read, and what their sums are of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.assemble_common import Row
from autoprune.kernels.cpu.assemble_csr import plane_sources
from autoprune.kernels.cpu.layout import gradient_cover, gradient_runs, round_up
from autoprune.kernels.cpu.memory import Buffer, Memory
from autoprune.kernels.cpu.passes import Map
from autoprune.kernels.cpu.planes import PlaneLayout, plan_planes
from autoprune.kernels.cpu.rows import ROW_FIELDS, Field, Op
from autoprune.kernels.cpu.shapes import LANES, VECTOR_BYTES, vector_registers
from autoprune.kernels.formats import CSR, Blocked, aligned

_SLACK = 4096  # runs may read past the last plane


@dataclass(frozen=True, slots=True)
class MapPlace:
    """A map of one image in a worker's workspace: channels-last, with a halo of zeros."""

    memory: Memory
    buffer: Buffer

    def record(self, tensor: Tensor | None) -> list[int]:
        """Return the copying record for a user's (N, C, H, W) channels-last tensor; None leaves the map out."""
        strides = self.memory.strides[self.buffer.index]
        shape = (self.buffer.height, self.buffer.width, self.buffer.channels)
        user, image, half = 0, 0, 0
        if tensor is not None:
            user, half = tensor.data_ptr(), int(tensor.dtype == torch.bfloat16)
            image = int(np.prod(shape)) * tensor.element_size()
        fields = dict.fromkeys(Map, 0) | {
            Map.USER: user, Map.IMAGE: image, Map.HALF: half, Map.WORK: self.memory.at(self.buffer),
            Map.WORK_ROW: strides.row, Map.WORK_STEP: strides.pixel, Map.HEIGHT: shape[0], Map.WIDTH: shape[1],
            Map.CHANNELS: shape[2],
        }  # fmt: skip
        return [fields[name] for name in Map]


class BlockGradient:
    """Sums of the blocks of 16 filters in which a mask keeps a weight, over the maps of one worker.

    Args:
        layer: Of the forward convolution.
        numbered: (K, C, R, S) float32, 0 where the mask drops, else the weight's number from 1 on.
        x: The input in a workspace, haloed by the layer's padding at least.
        dy: The output gradient in one.
    """

    def __init__(self, layer: LayerSpec, numbered: npt.NDArray[np.float32], x: MapPlace, dy: MapPlace) -> None:
        packed = Blocked.pack(numbered, LANES)
        self.index: npt.NDArray[np.int64] = packed.values.astype(np.int64)
        self.sums: npt.NDArray[np.float32] = aligned(packed.values.shape, np.float32)  # type: ignore[assignment]
        self.kept = [packed.row_ptr, self.sums]
        self.rows = np.zeros((1, ROW_FIELDS), np.int64)
        for field, value in self._row(layer, packed, x, dy).items():
            self.rows[0, field] = value

    def collected(self) -> npt.NDArray[np.float32]:
        """Return the gradient in the shape of ``index``."""
        return self.sums

    def _row(self, layer: LayerSpec, packed: Blocked, x: MapPlace, dy: MapPlace) -> Row:
        xs, ys = x.memory.strides[x.buffer.index], dy.memory.strides[dy.buffer.index]
        groups, (height, width) = len(packed.row_ptr) - 1, layer.output_hw
        channel, tap = np.divmod(packed.positions, layer.window[0] * layer.window[1])
        r, s = np.divmod(tap, layer.window[1])
        offsets = r * layer.dilation[0] * xs.row + s * layer.dilation[1] * xs.pixel + 4 * channel
        cover = gradient_cover(height, width, round(len(offsets) / groups), vector_registers())
        variant, row, col = np.array(cover, np.int64).T
        stride = layer.stride
        columns = [variant, row * stride[0] * xs.row + col * stride[1] * xs.pixel, row * ys.row + col * ys.pixel]
        tiles = np.ascontiguousarray(np.stack([*columns, variant], axis=1).astype(np.int32))
        entries = offsets.astype(np.int32)
        self.kept += [tiles, entries]
        return {
            Field.OP: Op.BLOCK,
            Field.X: x.memory.at(x.buffer, -layer.padding[0], -layer.padding[1]),
            Field.X_ROW: stride[0] * xs.row,
            Field.X_STEP: stride[1] * xs.pixel,
            Field.OUT: dy.memory.at(dy.buffer),
            Field.OUT_ROW: ys.row,
            Field.OUT_STEP: ys.pixel,
            Field.TILES: address_of(tiles),
            Field.N_TILES: len(tiles),
            Field.GROUPS: groups,
            Field.POINTERS: address_of(packed.row_ptr),
            Field.ENTRIES: address_of(entries),
            Field.WEIGHTS: address_of(self.sums),
        }


class SingleGradient:
    """Sums of the single weights that a mask keeps, over the maps of one worker.

    Args:
        layer: Of the forward convolution.
        numbered: As in ``BlockGradient``.
        x: The input in a workspace, haloed by the layer's padding at least.
        dy: The output gradient in one, haloed by a pixel at least: its first is the zero outside of the map.
    """

    def __init__(self, layer: LayerSpec, numbered: npt.NDArray[np.float32], x: MapPlace, dy: MapPlace) -> None:
        packed = CSR.pack(numbered)
        layout = plan_planes(layer, len(packed.values) / layer.filters)
        (height, width), reach = layer.output_hw, layout.shifts - 1
        vectors = -(-((height - 1) * layout.width + width + reach) // LANES)
        self.kept: list[npt.NDArray[np.generic]] = []
        x_planes = self._planar(layer.channels, layout.channel_bytes, x, self._x_sources(layer, x, layout))
        plane = VECTOR_BYTES * (vectors + (1 if VECTOR_BYTES * vectors % 1024 == 0 else 0))
        dy_planes = self._planar(layer.filters, plane, dy, _dy_sources(layer, dy, layout, vectors))
        row = self._row(layer, packed, layout, vectors)
        row |= {Field.X: x_planes[Field.WORK], Field.OUT: dy_planes[Field.WORK], Field.PLANE: plane}
        self.rows = np.zeros((3, ROW_FIELDS), np.int64)
        for number, fields in enumerate((x_planes, dy_planes, row)):
            for field, value in fields.items():
                self.rows[number, field] = value

    def collected(self) -> npt.NDArray[np.float32]:
        """Return the gradient in the shape of ``index``."""
        total: npt.NDArray[np.float32] = self.sums.sum(axis=1)
        return total

    def _x_sources(self, layer: LayerSpec, x: MapPlace, layout: PlaneLayout) -> npt.NDArray[np.int32]:
        return plane_sources(layer, x.buffer, layout, x.memory.strides[x.buffer.index])

    def _planar(self, channels: int, plane: int, place: MapPlace, sources: npt.NDArray[np.int32]) -> Row:
        """Return the row that gathers a map into planes, whose memory begins with a vector of zeros."""
        strides = place.memory.strides[place.buffer.index]
        size = VECTOR_BYTES + plane * round_up(channels, LANES) + _SLACK
        work, sources = aligned((size,), np.uint8), np.ascontiguousarray(sources)
        vectors = np.arange(len(sources) // LANES, dtype=np.int32)
        self.kept += [work, sources, vectors]
        return {
            Field.OP: Op.PLANAR,
            Field.X: place.memory.base[place.buffer.index],
            Field.WORK: address_of(work) + VECTOR_BYTES,
            Field.PLANE: plane,
            Field.PIXELS: address_of(sources),
            Field.TILES: address_of(vectors),
            Field.N_TILES: len(vectors),
            Field.CHANNELS: channels,
            Field.VECTORS: int(strides.pixel % VECTOR_BYTES == 0),
        }

    def _row(self, layer: LayerSpec, packed: CSR, layout: PlaneLayout, vectors: int) -> Row:
        taps = layer.window[0] * layer.window[1]
        channel, tap = np.divmod(packed.positions, taps)
        places = [layout.place(layer, *divmod(t, layer.window[1])) for t in range(taps)]
        plane, move, shift = np.array(places).reshape(-1, 3)[tap].T
        offset = channel * layout.channel_bytes + 4 * (plane * layout.positions + move)
        group = np.repeat(np.arange(layer.filters), np.diff(packed.row_ptr)) * layout.shifts + shift
        order = np.lexsort((offset, group))
        count = np.bincount(group, minlength=layer.filters * layout.shifts)
        pointers = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        entries = np.ascontiguousarray(offset[order].astype(np.int32))
        self.index: npt.NDArray[np.int64] = packed.values[order].astype(np.int64)
        self.sums: npt.NDArray[np.float32] = aligned((max(1, len(order)), LANES), np.float32)[: len(order)]  # type: ignore[assignment]
        runs = np.array(gradient_runs(vectors, len(order) / layer.filters, vector_registers()), np.int32)
        self.kept += [pointers, entries, runs, self.sums]
        return {
            Field.OP: Op.CSR,
            Field.GROUPS: layer.filters,
            Field.SHIFTS: layout.shifts,
            Field.TILES: address_of(runs),
            Field.N_TILES: len(runs),
            Field.POINTERS: address_of(pointers),
            Field.ENTRIES: address_of(entries),
            Field.WEIGHTS: address_of(self.sums),
        }


def _dy_sources(layer: LayerSpec, dy: MapPlace, layout: PlaneLayout, vectors: int) -> npt.NDArray[np.int32]:
    """Return the byte offset in its image of the pixel that every position of a plane of output gradients holds."""
    strides = dy.memory.strides[dy.buffer.index]
    row, col = np.divmod(np.arange(LANES * vectors), layout.width)
    inside = (row < layer.output_hw[0]) & (col < layer.output_hw[1])
    offset = (row + strides.halo) * strides.row + (col + strides.halo) * strides.pixel
    return np.where(inside, offset, 0).astype(np.int32)


def address_of(array: npt.NDArray[np.generic]) -> int:
    """Return where an array's first element lies."""
    return int(array.ctypes.data)
