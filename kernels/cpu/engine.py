"""The compiled loop: runs the instruction rows of a program on images ``first`` … ``last - 1``.

Every step takes its share ``part`` of ``parts`` of the row's units, so that any number of threads computes the very
same units in the very same way. ``lane`` numbers the thread's own scratch memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from autoprune.kernels.cpu.rows import ROW_BYTES, Control, Field, Op
from autoprune.kernels.cpu.select import run_block_tile, run_csr_tile
from autoprune.kernels.cpu.vector import (
    add_vector,
    copy_bytes,
    copy_float,
    exchange,
    fetch_add,
    gather_transposed,
    give_way,
    now_ns,
    pause,
    peek,
    peek32,
    poke,
    pool_vector,
    scatter_transposed,
    watch,
)

SPINS_BEFORE_YIELD = 4000
STOPPED = -1


@njit(nogil=True)
def _get(row: int, field: int) -> int:
    return peek(row + 8 * field)


@njit(nogil=True)
def _block(row: int, first: int, last: int, part: int, parts: int) -> None:
    n_tiles, groups, images = _get(row, Field.N_TILES), _get(row, Field.GROUPS), last - first
    units = groups * images * n_tiles
    low, high = units * part // parts, units * (part + 1) // parts
    wide = 64 * _get(row, Field.VECTORS)
    pointers, entries, weights = _get(row, Field.POINTERS), _get(row, Field.ENTRIES), _get(row, Field.WEIGHTS)
    tiles, bias, residual = _get(row, Field.TILES), _get(row, Field.BIAS), _get(row, Field.RES)
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
                )  # fmt: skip


@njit(nogil=True)
def _planar(row: int, first: int, last: int, part: int, parts: int, lane: int) -> None:
    n_vectors, channels, plane = _get(row, Field.N_VECTORS), _get(row, Field.CHANNELS), _get(row, Field.PLANE)
    work = _get(row, Field.WORK) + lane * _get(row, Field.WORK_THREAD)
    groups = (channels + 15) // 16
    units = (last - first) * groups * n_vectors
    for unit in range(units * part // parts, units * (part + 1) // parts):
        vector, rest = unit % n_vectors, unit // n_vectors
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
def _csr(row: int, first: int, last: int, part: int, parts: int, lane: int, thread: int) -> None:
    n_tiles, groups, images = _get(row, Field.N_TILES), _get(row, Field.GROUPS), last - first
    units = images * n_tiles * groups
    shifts, residual = _get(row, Field.SHIFTS), _get(row, Field.RES)
    pointers, entries = _get(row, Field.POINTERS), _get(row, Field.ENTRIES)
    work = _get(row, Field.WORK) + lane * _get(row, Field.WORK_THREAD)
    scratch = _get(row, Field.SCRATCH) + thread * _get(row, Field.SCRATCH_THREAD)
    for unit in range(units * part // parts, units * (part + 1) // parts):
        group, rest = unit % groups, unit // groups
        tile = _get(row, Field.TILES) + 16 * (rest % n_tiles)
        image = rest // n_tiles
        size = 64 * peek32(tile + 8)
        planes = work + image * _get(row, Field.WORK_IMAGE) + 4 * peek32(tile + 4)
        for f in range(16):
            run_csr_tile(
                peek32(tile), planes, entries, pointers + 4 * shifts * (16 * group + f), shifts, scratch + f * size
            )
        out = _get(row, Field.OUT) + (first + image) * _get(row, Field.OUT_IMAGE) + 64 * group
        res = residual + (first + image) * _get(row, Field.RES_IMAGE) + 64 * group if residual != 0 else 0
        pixels = 4 * peek32(tile + 12)
        for v in range(size // 64):
            scatter_transposed(
                scratch + 64 * v, size, out, _get(row, Field.PIXELS) + pixels + 64 * v,
                res, _get(row, Field.RES_PIXELS) + pixels + 64 * v,
                _get(row, Field.BIAS) + 64 * group, _get(row, Field.RELU),
            )  # fmt: skip


@njit(nogil=True)
def _add(row: int, first: int, last: int, part: int, parts: int) -> None:
    height, relu, y = _get(row, Field.HEIGHT), _get(row, Field.RELU), _get(row, Field.Y)
    width, channels = _get(row, Field.WIDTH), _get(row, Field.CHANNELS)
    units = (last - first) * height
    for unit in range(units * part // parts, units * (part + 1) // parts):
        image, line = first + unit // height, unit % height
        a = _get(row, Field.X) + image * _get(row, Field.X_IMAGE) + line * _get(row, Field.X_ROW)
        b = y + image * _get(row, Field.Y_IMAGE) + line * _get(row, Field.Y_ROW) if y != 0 else 0
        out = _get(row, Field.OUT) + image * _get(row, Field.OUT_IMAGE) + line * _get(row, Field.OUT_ROW)
        for pixel in range(width):
            for c in range(channels):
                b_here = b + pixel * _get(row, Field.STRIDE_W) + 64 * c if y != 0 else 0
                a_here = a + pixel * _get(row, Field.X_STEP) + 64 * c
                add_vector(out + pixel * _get(row, Field.OUT_STEP) + 64 * c, a_here, b_here, relu)


@njit(nogil=True)
def _pool(row: int, first: int, last: int, part: int, parts: int) -> None:
    height, width, channels = _get(row, Field.HEIGHT), _get(row, Field.WIDTH), _get(row, Field.CHANNELS)
    window_h, window_w = _get(row, Field.WINDOW_H), _get(row, Field.WINDOW_W)
    line_bytes, step = _get(row, Field.X_ROW), _get(row, Field.X_STEP)
    mean_of = window_h * window_w if _get(row, Field.MEAN) != 0 else 0
    units = (last - first) * height
    for unit in range(units * part // parts, units * (part + 1) // parts):
        image, line = first + unit // height, unit % height
        top = line * _get(row, Field.STRIDE_H) - _get(row, Field.PAD_H)
        r0, r1 = max(top, 0), min(top + window_h, _get(row, Field.IN_HEIGHT))
        out = _get(row, Field.OUT) + image * _get(row, Field.OUT_IMAGE) + line * _get(row, Field.OUT_ROW)
        x = _get(row, Field.X) + image * _get(row, Field.X_IMAGE) + r0 * line_bytes
        for pixel in range(width):
            left = pixel * _get(row, Field.STRIDE_W) - _get(row, Field.PAD_W)
            q0, q1 = max(left, 0), min(left + window_w, _get(row, Field.IN_WIDTH))
            for c in range(channels):
                to = out + pixel * _get(row, Field.OUT_STEP) + 64 * c
                pool_vector(to, x + q0 * step + 64 * c, r1 - r0, line_bytes, q1 - q0, step, mean_of)


@njit(nogil=True)
def _exchange_user(row: int, user: int, inward: bool, first: int, last: int, part: int, parts: int) -> None:
    """Copy between the user's NCHW tensor at address ``user`` and a buffer (fields X…)."""
    channels, height, width = _get(row, Field.CHANNELS), _get(row, Field.HEIGHT), _get(row, Field.WIDTH)
    step = _get(row, Field.X_STEP)
    units = (last - first) * height
    for unit in range(units * part // parts, units * (part + 1) // parts):
        image, line = first + unit // height, unit % height
        x = _get(row, Field.X) + image * _get(row, Field.X_IMAGE) + line * _get(row, Field.X_ROW)
        outside = user + 4 * ((image * channels * height + line) * width)
        if channels == 1 and step == 4:
            copy_bytes(x if inward else outside, outside if inward else x, 4 * width)
            continue
        for c in range(channels):
            there = outside + 4 * c * height * width
            for pixel in range(width):
                here = x + pixel * step + 4 * c
                if inward:
                    copy_float(here, there + 4 * pixel)
                else:
                    copy_float(there + 4 * pixel, here)


@njit(nogil=True)
def _step(row: int, control: int, first: int, last: int, part: int, parts: int, lane: int, thread: int) -> None:
    op = _get(row, Field.OP)
    if op == Op.BLOCK:
        _block(row, first, last, part, parts)
    elif op == Op.PLANAR:
        _planar(row, first, last, part, parts, lane)
    elif op == Op.CSR:
        _csr(row, first, last, part, parts, lane, thread)
    elif op == Op.ADD:
        _add(row, first, last, part, parts)
    elif op == Op.POOL:
        _pool(row, first, last, part, parts)
    elif op == Op.INPUT:
        _exchange_user(row, peek(control + 8 * Control.SOURCE), True, first, last, part, parts)
    elif op == Op.OUTPUT:
        _exchange_user(row, peek(control + 8 * Control.TARGET), False, first, last, part, parts)


@njit(nogil=True)
def _meet(control: int, threads: int) -> None:
    """Wait until all threads are here."""
    phase = watch(control + 8 * Control.PHASE)
    if fetch_add(control + 8 * Control.ARRIVED, 1) == threads - 1:
        exchange(control + 8 * Control.ARRIVED, 0)
        exchange(control + 8 * Control.PHASE, phase + 1)
        return
    spins = 0
    while watch(control + 8 * Control.PHASE) == phase:
        pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            give_way()


@njit(nogil=True)
def _once(control: int, thread: int, times: int) -> None:
    """Run all rows on all images once; ``times``: where to add every row's nanoseconds, or 0."""
    threads, batch = peek(control + 8 * Control.THREADS), peek(control + 8 * Control.BATCH)
    by_image = peek(control + 8 * Control.BY_IMAGE) != 0
    begin = batch * thread // threads if by_image else 0
    end = batch * (thread + 1) // threads if by_image else batch
    part, parts, lane = (0, 1, thread) if by_image else (thread, threads, 0)
    before = now_ns() if times != 0 else 0
    while begin < end:
        last = min(begin + peek(control + 8 * Control.CHUNK), end)
        for i in range(peek(control + 8 * Control.N_ROWS)):
            row = peek(control + 8 * Control.TABLE) + ROW_BYTES * i
            _step(row, control, begin, last, part, parts, lane, thread)
            if parts > 1:
                _meet(control, threads)
            if times != 0:
                after = now_ns()
                poke(times + 8 * i, peek(times + 8 * i) + after - before)
                before = after
        begin = last
    if by_image and threads > 1:
        _meet(control, threads)


@njit(nogil=True)
def _runs(control: int, thread: int) -> None:
    """Do the runs that the control block asks for, as thread ``thread`` of its team."""
    threads, times = peek(control + 8 * Control.THREADS), peek(control + 8 * Control.TIMES)
    by_row = peek(control + 8 * Control.PROFILE) != 0
    rows = peek(control + 8 * Control.N_ROWS)
    for repeat in range(peek(control + 8 * Control.REPEATS)):
        if times == 0:
            _once(control, thread, 0)
            continue
        if threads > 1:
            _meet(control, threads)
        mine = thread == 0
        before = now_ns()
        _once(control, thread, times + 8 * rows * repeat if by_row and mine else 0)
        if mine and not by_row:
            poke(times + 8 * repeat, now_ns() - before)


@njit(nogil=True)
def _work(control: int, thread: int, seen: int, patience_ns: int) -> int:
    """Serve runs as a worker; return the last one seen when nothing came for ``patience_ns``, or ``STOPPED``."""
    epoch, state = control + 8 * Control.EPOCH, control + 8 * Control.STATE + 64 * thread
    since = now_ns()
    while True:
        if watch(control + 8 * Control.STOP) != 0:
            return STOPPED
        if watch(epoch) != seen:
            seen = watch(epoch)
            _runs(control, thread)
            since = now_ns()
        elif now_ns() - since < patience_ns:
            pause()
        else:
            exchange(state, 1)
            # A run announced in between has either seen the 1 and will wake us, or must be served now.
            if watch(epoch) == seen or exchange(state, 0) == 0:
                return seen
            since = now_ns()


@njit(nogil=True)
def _announce(control: int) -> int:
    """Start a run; return the bits of the workers that sleep and must be woken."""
    fetch_add(control + 8 * Control.EPOCH, 1)
    asleep = 0
    for thread in range(1, peek(control + 8 * Control.THREADS)):
        if exchange(control + 8 * Control.STATE + 64 * thread, 0) != 0:
            asleep |= 1 << thread
    return asleep


def _compile() -> Callable[[int, int, int, int, int], int]:
    """Return the one entry point, cached on disk under the contents of this folder.

    numba watches only the file of the cached function; a closed-over hash makes any change here a new entry.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    stamp = int.from_bytes(digest.digest()[:7], "big")

    @njit("int64(int64, int64, int64, int64, int64)", nogil=True, cache=True)
    def enter(verb: int, control: int, thread: int, seen: int, patience_ns: int) -> Any:
        if verb == 0:
            _runs(control, thread)
            return 0
        if verb == 1:
            return _work(control, thread, seen, patience_ns)
        if verb == 2:
            return _announce(control)
        return stamp

    entry: Callable[[int, int, int, int, int], int] = enter
    return entry


ENTER = _compile()
RUN, WORK, ANNOUNCE, STAMP = 0, 1, 2, 3
