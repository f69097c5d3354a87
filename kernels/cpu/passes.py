"""The compiled training pass: image by image from the user's tensors through a workspace and back.

One image's padded input and output stay in the second-level cache, so a pass reads and writes each of the user's
tensors once, whatever its memory format asks of the kernels; bfloat16 becomes float32 on the way in.
"""

from __future__ import annotations

from enum import IntEnum

from numba import njit

from autoprune.kernels.cpu.gradient import narrow, narrow_one, widen, widen_one
from autoprune.kernels.cpu.rows import ROW_BYTES, Field, Op
from autoprune.kernels.cpu.select import run_gradient_run, run_gradient_tile
from autoprune.kernels.cpu.steps import step
from autoprune.kernels.cpu.vector import copy_bytes, copy_float, peek, peek32


class Map(IntEnum):
    """Index of an int64 in the record of a map that is copied between the user's NHWC tensor and the workspace."""

    USER = 0  # address of image 0; 0 leaves the map out
    IMAGE = 1  # bytes from one image of the user's to the next
    HALF = 2  # 1: the user's is bfloat16, 0: float32
    WORK = 3  # address of the first real pixel
    WORK_ROW = 4
    WORK_STEP = 5
    HEIGHT = 6
    WIDTH = 7
    CHANNELS = 8


MAP_FIELDS = 9


class Pass(IntEnum):
    """Index of an int64 in the record of a pass."""

    N_IN = 0
    IN = 1  # address of the records of the maps that come in
    N_ROWS = 2
    ROWS = 3  # address of the instruction rows
    N_OUT = 4
    OUT = 5
    N_GRADIENTS = 6
    GRADIENTS = 7  # address of the gradient rows: BLOCK, or PLANAR twice and CSR


PASS_FIELDS = 8


@njit(nogil=True)
def _copy_run(user: int, work: int, count: int, half: bool, inward: bool) -> None:
    """Copy ``count`` neighbouring values."""
    if not half:
        copy_bytes(work if inward else user, user if inward else work, 4 * count)
        return
    whole = count // 16 * 16
    for start in range(0, whole, 16):
        if inward:
            widen(work + 4 * start, user + 2 * start)
        else:
            narrow(user + 2 * start, work + 4 * start)
    for place in range(whole, count):
        if inward:
            widen_one(work + 4 * place, user + 2 * place)
        else:
            narrow_one(user + 2 * place, work + 4 * place)


@njit(nogil=True)
def _copy_map(record: int, image: int, inward: bool) -> None:
    """Copy one image of a map."""
    user = peek(record + 8 * Map.USER)
    if user == 0:
        return
    half = peek(record + 8 * Map.HALF) != 0
    size = 2 if half else 4
    channels, width = peek(record + 8 * Map.CHANNELS), peek(record + 8 * Map.WIDTH)
    pixel = peek(record + 8 * Map.WORK_STEP)
    user += image * peek(record + 8 * Map.IMAGE)
    for line in range(peek(record + 8 * Map.HEIGHT)):
        work = peek(record + 8 * Map.WORK) + line * peek(record + 8 * Map.WORK_ROW)
        here = user + line * width * channels * size
        if pixel == 4 * channels:
            _copy_run(here, work, width * channels, half, inward)
        elif channels == 1 and not half:
            for q in range(width):
                there = here + 4 * q
                copy_float(work + q * pixel if inward else there, there if inward else work + q * pixel)
        else:
            for q in range(width):
                _copy_run(here + q * channels * size, work + q * pixel, channels, half, inward)


@njit(nogil=True)
def _single_gradient(row: int) -> None:
    """Add one image's share to the vector of every kept weight."""
    shifts, n_runs = peek(row + 8 * Field.SHIFTS), peek(row + 8 * Field.N_TILES)
    pointers, entries = peek(row + 8 * Field.POINTERS), peek(row + 8 * Field.ENTRIES)
    runs, sums, plane = peek(row + 8 * Field.TILES), peek(row + 8 * Field.WEIGHTS), peek(row + 8 * Field.PLANE)
    for f in range(peek(row + 8 * Field.GROUPS)):
        dy = peek(row + 8 * Field.OUT) + f * plane
        for number in range(n_runs):
            variant, first = peek32(runs + 8 * number), 64 * peek32(runs + 8 * number + 4)
            for shift in range(shifts):
                pointer = pointers + 4 * (f * shifts + shift)
                start = peek32(pointer)
                count = peek32(pointer + 4) - start
                if count > 0:
                    run_gradient_run(
                        variant, peek(row + 8 * Field.X) + first, dy + first - 4 * shift, entries + 4 * start,
                        sums + 64 * start, count,
                    )


@njit(nogil=True)
def _gradient(row: int) -> None:
    """Add one image's share to the sums of every kept block."""
    n_tiles, pointers = peek(row + 8 * Field.N_TILES), peek(row + 8 * Field.POINTERS)
    entries, sums = peek(row + 8 * Field.ENTRIES), peek(row + 8 * Field.WEIGHTS)
    tiles, x, dy = peek(row + 8 * Field.TILES), peek(row + 8 * Field.X), peek(row + 8 * Field.OUT)
    for group in range(peek(row + 8 * Field.GROUPS)):
        start = peek(pointers + 8 * group)
        count = peek(pointers + 8 * group + 8) - start
        for tile in range(n_tiles):
            t = tiles + 16 * tile
            run_gradient_tile(
                peek32(t), row, x + peek32(t + 4), dy + peek32(t + 8) + 64 * group,
                entries + 4 * start, sums + 64 * start, count,
            )


@njit(nogil=True)
def run_pass(record: int, first: int, last: int) -> None:
    """Run a pass on images ``first`` … ``last - 1``.

    Args:
        record: Address of the pass; its workspace is used by nobody else meanwhile.
        first, last: Images of the user's tensors.
    """
    for image in range(first, last):
        for index in range(peek(record + 8 * Pass.N_IN)):
            _copy_map(peek(record + 8 * Pass.IN) + 8 * MAP_FIELDS * index, image, True)
        for index in range(peek(record + 8 * Pass.N_ROWS)):
            step(peek(record + 8 * Pass.ROWS) + ROW_BYTES * index, 0, 0, 1, 0, 1, 0, 0, 0, 0)
        for index in range(peek(record + 8 * Pass.N_OUT)):
            _copy_map(peek(record + 8 * Pass.OUT) + 8 * MAP_FIELDS * index, image, False)
        for index in range(peek(record + 8 * Pass.N_GRADIENTS)):
            row = peek(record + 8 * Pass.GRADIENTS) + ROW_BYTES * index
            op = peek(row + 8 * Field.OP)
            if op == Op.BLOCK:
                _gradient(row)
            elif op == Op.CSR:
                _single_gradient(row)
            else:
                step(row, 0, 0, 1, 0, 1, 0, 0, 0, 0)
