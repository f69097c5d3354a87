"""Fields that all assembled rows share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoprune.kernels.cpu.layout import round_up
from autoprune.kernels.cpu.memory import Buffer, Memory
from autoprune.kernels.cpu.operations import Conv, Depthwise
from autoprune.kernels.cpu.rows import Field, Op
from autoprune.kernels.cpu.shapes import LANES
from autoprune.kernels.formats import aligned

Row = dict[Field, int]


@dataclass(slots=True)
class Work:
    """Workspace that the rows assembled so far need, per image and per thread."""

    image_bytes: int = 0
    scratch_bytes: int = 0


def target(op: Op, buffer: Buffer, memory: Memory) -> Row:
    """Return the fields that say where an operation writes."""
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


def items(
    listed: npt.NDArray[np.int32], dealt: npt.NDArray[np.int32] | None, memory: Memory
) -> Row:
    """Return the fields of a row's items, and of the threads' bands among them if they are dealt."""
    row: Row = {Field.TILES: memory.keep(listed), Field.N_TILES: len(listed)}
    return row if dealt is None else row | {Field.BANDS: memory.keep(dealt)}


def epilogue(conv: Conv | Depthwise, memory: Memory) -> Row:
    """Return the fields of bias, residual, rectifier and ceiling."""
    row: Row = {
        Field.RELU: int(conv.epilogue.relu),
        Field.CAP: float_bits(conv.epilogue.cap),
        Field.BIAS: memory.keep(memory.once(conv.bias, "bias", lambda: padded(conv.bias))),
    }
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


def padded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    """Return values followed by zeros, to whole pairs of vectors."""
    whole = aligned((round_up(len(values), 2 * LANES),), np.float32)
    whole[: len(values)] = values
    return whole


def float_bits(value: float) -> int:
    """Return the bits of a float32 as a number."""
    return int(np.float32(value).view(np.int32))
