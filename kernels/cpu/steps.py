"""The compiled steps: what one instruction row does.

A row's items are tiles, vectors or lines of one image. A thread does either its own band's items, those at the edge
first, or its share ``part`` of ``parts`` of the units that all items make on all images.
"""

from __future__ import annotations

from numba import njit

from autoprune.kernels.cpu.rows import Curve, Field, Op
from autoprune.kernels.cpu.select import run_block_tile, run_csr_tile, run_depthwise_tile
from autoprune.kernels.cpu.vector import (
    copy_bytes,
    copy_float,
    elementwise_vector,
    exchange,
    gather_transposed,
    hard_run,
    leaky_run,
    peek,
    peek32,
    pool_vector,
    scatter_transposed,
    smooth_run,
    transpose_block,
)


@njit(nogil=True)
def _get(row: int, field: int) -> int:
    value: int = peek(row + 8 * field)
    return value


@njit(nogil=True)
def _block(row: int, first: int, last: int, begin: int, end: int, part: int, parts: int) -> None:
    groups, images, n_tiles = _get(row, Field.GROUPS), last - first, end - begin
    units = groups * images * n_tiles
    low, high = units * part // parts, units * (part + 1) // parts
    wide = 64 * _get(row, Field.VECTORS)
    pointers, entries, weights = _get(row, Field.POINTERS), _get(row, Field.ENTRIES), _get(row, Field.WEIGHTS)
    tiles, bias, residual = _get(row, Field.TILES) + 16 * begin, _get(row, Field.BIAS), _get(row, Field.RES)
    for group in range(groups):  # the group's weights stay near while its images pass
        start = peek(pointers + 8 * group)
        count = peek(pointers + 8 * group + 8) - start
        for image in range(images):
            base = (group * images + image) * n_tiles
            x = _get(row, Field.X) + (first + image) * _get(row, Field.X_IMAGE)
            out = _get(row, Field.OUT) + (first + image) * _get(row, Field.OUT_IMAGE) + group * wide
            res = residual + (first + image) * _get(row, Field.RES_IMAGE) + group * wide
            for tile in range(max(low - base, 0), min(high - base, n_tiles)):
                t = tiles + 16 * tile
                here = res + peek32(t + 12) if residual != 0 else 0
                run_block_tile(
                    peek32(t), row, x + peek32(t + 4), out + peek32(t + 8), here,
                    entries + 4 * start, weights + wide * start, count, bias + group * wide,
                )


@njit(nogil=True)
def _planar(row: int, first: int, last: int, begin: int, end: int, part: int, parts: int, lane: int) -> None:
    n_vectors, channels, plane = end - begin, _get(row, Field.CHANNELS), _get(row, Field.PLANE)
    work = _get(row, Field.WORK) + lane * _get(row, Field.WORK_THREAD)
    vectors = _get(row, Field.TILES) + 4 * begin
    groups = (channels + 15) // 16
    units = (last - first) * groups * n_vectors
    for unit in range(units * part // parts, units * (part + 1) // parts):
        vector, rest = peek32(vectors + 4 * (unit % n_vectors)), unit // n_vectors
        group, image = rest % groups, rest // groups
        out = work + image * _get(row, Field.WORK_IMAGE) + 16 * group * plane + 64 * vector
        x = _get(row, Field.X) + (first + image) * _get(row, Field.X_IMAGE) + 64 * group
        pixels = _get(row, Field.PIXELS) + 64 * vector
        if _get(row, Field.VECTORS) != 0:
            gather_transposed(out, plane, x, pixels)
        else:  # a buffer of exactly C channels: a vector load would read the next pixel
            for c in range(min(channels - 16 * group, 16)):
                for k in range(16):
                    copy_float(out + c * plane + 4 * k, x + 4 * c + peek32(pixels + 4 * k))


@njit(nogil=True)
def _csr(
    row: int, first: int, last: int, begin: int, end: int, part: int, parts: int, lane: int, thread: int
) -> None:
    groups, images, n_tiles = _get(row, Field.GROUPS), last - first, end - begin
    units = images * n_tiles * groups
    shifts, blocks, residual = _get(row, Field.SHIFTS), _get(row, Field.BLOCKS), _get(row, Field.RES)
    pointers, entries = _get(row, Field.POINTERS), _get(row, Field.ENTRIES)
    work = _get(row, Field.WORK) + lane * _get(row, Field.WORK_THREAD)
    scratch = _get(row, Field.SCRATCH) + thread * _get(row, Field.SCRATCH_THREAD)
    for unit in range(units * part // parts, units * (part + 1) // parts):
        group, rest = unit % groups, unit // groups
        tile = _get(row, Field.TILES) + 16 * (begin + rest % n_tiles)
        image = rest // n_tiles
        size = 64 * peek32(tile + 8)
        planes = work + image * _get(row, Field.WORK_IMAGE) + 4 * peek32(tile + 4)
        for block in range(blocks):
            lists = pointers + 4 * shifts * 16 * (blocks * group + block)
            for f in range(16):
                run_csr_tile(
                    peek32(tile), planes, entries, lists + 4 * shifts * f, shifts, scratch + f * size, min(block, 1)
                )
        out = _get(row, Field.OUT) + (first + image) * _get(row, Field.OUT_IMAGE) + 64 * group
        res = residual + (first + image) * _get(row, Field.RES_IMAGE) + 64 * group if residual != 0 else 0
        pixels = 4 * peek32(tile + 12)
        for v in range(size // 64):
            scatter_transposed(
                scratch + 64 * v, size, out, _get(row, Field.PIXELS) + pixels + 64 * v,
                res, _get(row, Field.RES_PIXELS) + pixels + 64 * v,
                _get(row, Field.BIAS) + 64 * group, _get(row, Field.RELU), _get(row, Field.CAP),
            )


@njit(nogil=True)
def _elementwise(row: int, image: int, line: int) -> None:
    scale, shift = _get(row, Field.SCALE), _get(row, Field.SHIFT)
    relu, y, width, channels = (
        _get(row, Field.RELU), _get(row, Field.Y), _get(row, Field.WIDTH), _get(row, Field.CHANNELS)
    )
    a = _get(row, Field.X) + image * _get(row, Field.X_IMAGE) + line * _get(row, Field.X_ROW)
    b = y + image * _get(row, Field.Y_IMAGE) + line * _get(row, Field.Y_ROW) if y != 0 else 0
    out = _get(row, Field.OUT) + image * _get(row, Field.OUT_IMAGE) + line * _get(row, Field.OUT_ROW)
    for pixel in range(width):
        for c in range(channels):
            b_here = b + pixel * _get(row, Field.STRIDE_W) + 64 * c if y != 0 else 0
            to = out + pixel * _get(row, Field.OUT_STEP) + 64 * c
            elementwise_vector(
                to, a + pixel * _get(row, Field.X_STEP) + 64 * c, b_here, _get(row, Field.TIMES),
                scale + 64 * c if scale != 0 else 0, shift + 64 * c if scale != 0 else 0, relu,
                _get(row, Field.CAP),
            )


@njit(nogil=True)
def _curve(row: int, curve: int, image: int, line: int) -> None:
    pixels, count = _get(row, Field.WIDTH), _get(row, Field.CHANNELS)
    step, out_step = _get(row, Field.X_STEP), _get(row, Field.OUT_STEP)
    x = _get(row, Field.X) + image * _get(row, Field.X_IMAGE) + line * _get(row, Field.X_ROW)
    out = _get(row, Field.OUT) + image * _get(row, Field.OUT_IMAGE) + line * _get(row, Field.OUT_ROW)
    if step == 64 * count and out_step == step:  # pixels lie side by side
        pixels, count = 1, pixels * count
    for pixel in range(pixels):
        to, of = out + pixel * out_step, x + pixel * step
        if curve == Curve.LEAKY:
            leaky_run(to, of, count, _get(row, Field.SLOPE))
        elif curve == Curve.HARDSWISH or curve == Curve.HARDSIGMOID:
            hard_run(to, of, count, 1 if curve == Curve.HARDSWISH else 0)
        else:
            smooth_run(to, of, count, 1 if curve == Curve.SILU else 0)


@njit(nogil=True)
def _depthwise(row: int, image: int, line: int) -> None:
    width, groups = _get(row, Field.WIDTH), _get(row, Field.CHANNELS)
    step, out_step = _get(row, Field.X_STEP), _get(row, Field.OUT_STEP)
    weights, bias = _get(row, Field.WEIGHTS), _get(row, Field.BIAS)
    x = _get(row, Field.X) + image * _get(row, Field.X_IMAGE) + line * _get(row, Field.X_ROW)
    out = _get(row, Field.OUT) + image * _get(row, Field.OUT_IMAGE) + line * _get(row, Field.OUT_ROW)
    variant, size = _get(row, Field.VARIANT), _get(row, Field.VECTORS)
    for c in range(groups):
        for start in range(0, width, size):
            pixel = min(start, width - size)  # the last tile may do pixels of the one before again
            run_depthwise_tile(
                variant, row, x + pixel * step + 64 * c, out + pixel * out_step + 64 * c, weights + 64 * c,
                64 * groups, bias + 64 * c,
            )


@njit(nogil=True)
def _pool(row: int, image: int, line: int) -> None:
    width, channels = _get(row, Field.WIDTH), _get(row, Field.CHANNELS)
    window_h, window_w = _get(row, Field.WINDOW_H), _get(row, Field.WINDOW_W)
    line_bytes, step = _get(row, Field.X_ROW), _get(row, Field.X_STEP)
    kind = _get(row, Field.MEAN)
    top = line * _get(row, Field.STRIDE_H) - _get(row, Field.PAD_H)
    r0, r1 = max(top, 0), min(top + window_h, _get(row, Field.IN_HEIGHT))
    out = _get(row, Field.OUT) + image * _get(row, Field.OUT_IMAGE) + line * _get(row, Field.OUT_ROW)
    x = _get(row, Field.X) + image * _get(row, Field.X_IMAGE) + r0 * line_bytes
    for pixel in range(width):
        left = pixel * _get(row, Field.STRIDE_W) - _get(row, Field.PAD_W)
        q0, q1 = max(left, 0), min(left + window_w, _get(row, Field.IN_WIDTH))
        mean_of = 0 if kind == 0 else window_h * window_w if kind == 1 else (r1 - r0) * (q1 - q0)
        for c in range(channels):
            to = out + pixel * _get(row, Field.OUT_STEP) + 64 * c
            pool_vector(to, x + q0 * step + 64 * c, r1 - r0, line_bytes, q1 - q0, step, mean_of)


@njit(nogil=True)
def _exchange_user(row: int, user: int, inward: bool, image: int, line: int) -> None:
    """Copy a line between the user's tensor at ``user`` (odd: channels-last memory, else NCHW) and a buffer."""
    last_mode = user & 1
    user -= last_mode
    channels, height, width = _get(row, Field.CHANNELS), _get(row, Field.HEIGHT), _get(row, Field.WIDTH)
    step = _get(row, Field.X_STEP)
    x = _get(row, Field.X) + image * _get(row, Field.X_IMAGE) + line * _get(row, Field.X_ROW)
    if last_mode != 0:
        outside = user + 4 * ((image * height + line) * width) * channels
        for pixel in range(width):
            here, there = x + pixel * step, outside + 4 * channels * pixel
            copy_bytes(here if inward else there, there if inward else here, 4 * channels)
        return
    outside = user + 4 * ((image * channels * height + line) * width)
    if channels == 1 and step == 4:
        copy_bytes(x if inward else outside, outside if inward else x, 4 * width)
        return
    whole_c, whole_w = channels // 16 * 16, width // 16 * 16
    plane = 4 * height * width
    for c in range(0, whole_c, 16):
        for pixel in range(0, whole_w, 16):
            here, there = x + pixel * step + 4 * c, outside + c * plane + 4 * pixel
            if inward:
                transpose_block(here, step, there, plane)
            else:
                transpose_block(there, plane, here, step)
    for c in range(channels):
        there = outside + c * plane
        for pixel in range(whole_w if c < whole_c else 0, width):
            here = x + pixel * step + 4 * c
            if inward:
                copy_float(here, there + 4 * pixel)
            else:
                copy_float(there + 4 * pixel, here)


@njit(nogil=True)
def _lines(row: int, user: int, first: int, last: int, begin: int, end: int, part: int, parts: int) -> None:
    """Do this thread's share of a row whose items are lines of pixels."""
    op, lines, count = _get(row, Field.OP), _get(row, Field.TILES) + 4 * begin, end - begin
    units, curve = (last - first) * count, _get(row, Field.CURVE)
    for unit in range(units * part // parts, units * (part + 1) // parts):
        image, line = first + unit // count, peek32(lines + 4 * (unit % count))
        if op == Op.ADD and curve != Curve.NONE:
            _curve(row, curve, image, line)
        elif op == Op.ADD:
            _elementwise(row, image, line)
        elif op == Op.DEPTHWISE:
            _depthwise(row, image, line)
        elif op == Op.POOL:
            _pool(row, image, line)
        else:
            _exchange_user(row, user, op == Op.INPUT, image, line)


@njit(nogil=True)
def _items(
    row: int, user: int, first: int, last: int, begin: int, end: int, part: int, parts: int, lane: int, thread: int
) -> None:
    """Do this thread's share of the row's items ``begin`` … ``end - 1`` on images ``first`` … ``last - 1``."""
    op = _get(row, Field.OP)
    if op == Op.BLOCK:
        _block(row, first, last, begin, end, part, parts)
    elif op == Op.PLANAR:
        _planar(row, first, last, begin, end, part, parts, lane)
    elif op == Op.CSR:
        _csr(row, first, last, begin, end, part, parts, lane, thread)
    else:
        _lines(row, user, first, last, begin, end, part, parts)


@njit(nogil=True)
def step(
    row: int, user: int, first: int, last: int, part: int, parts: int, lane: int, thread: int, told: int, since: int
) -> None:
    """Do this thread's share of one row on images ``first`` … ``last - 1``.

    Args:
        row: Address of the instruction row.
        user: Address of the user's tensor, for rows that copy from or to it.
        first, last: Images.
        part, parts: Which share of how many, where all threads share the units of all items.
        lane: Number of the workspace to use.
        thread: Number of the scratch memory to use.
        told: Address of what this thread has announced; ``since`` is what it held before the run.
    """
    bands = _get(row, Field.BANDS)
    if bands == 0:
        _items(row, user, first, last, 0, _get(row, Field.N_TILES), part, parts, lane, thread)
        return
    own = bands + 16 * thread
    inner = peek32(own + 4)
    _items(row, user, first, last, peek32(own), inner, 0, 1, thread, thread)
    if _get(row, Field.MARK) != 0:
        exchange(told, since + _get(row, Field.MARK))
    _items(row, user, first, last, inner, peek32(own + 8), 0, 1, thread, thread)
