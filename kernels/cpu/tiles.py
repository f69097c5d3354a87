"""The two convolution tiles, written as LLVM IR: everything else in this folder moves data to and from them.

Block tile (lanes = 16 filters): for every kept block, load its weights once and multiply them with the broadcast input
of rows × columns output pixels, all sums in registers. CSR tile (lanes = 16 pixels): for every kept weight, multiply a
run of vectors of one input plane. A vector load that crosses a cache line costs two, so the entries of a CSR filter
are grouped by column shift: all loads stay aligned and the sums move one lane between groups, as in Horner's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from autoprune.kernels.cpu.emit import (
    F32,
    I8,
    I32,
    I64,
    ZERO,
    at_least,
    at_most,
    cap_of,
    floor_of,
    fma,
    i64,
    kernel,
    load,
    loop,
    pointer,
    shuffle,
    splat,
    store,
)
from autoprune.kernels.cpu.rows import Field
from autoprune.kernels.cpu.shapes import LANES, VECTOR_BYTES, BlockTile, CsrTile, DepthwiseTile

PAIR = ir.VectorType(F32, 2)
LANE_NUMBERS = ir.VectorType(I32, LANES)


def field(b: ir.IRBuilder, row: ir.Value, name: Field) -> ir.Value:
    """Return a field of the instruction row at address ``row``."""
    return load(b, b.add(row, i64(8 * name)), I64, 8)


def multiples(b: ir.IRBuilder, step: ir.Value, count: int) -> list[ir.Value]:
    """Return 0, step, 2 step, … as odd multiples times powers of two, which x86 addresses scale for free."""
    odd = {k: b.mul(step, i64(k)) for k in range(1, count, 2)}
    result = [i64(0)]
    for k in range(1, count):
        twos = (k & -k).bit_length() - 1
        result.append(b.shl(odd[k >> twos], i64(twos)) if twos else odd[k])
    return result


def _finish(
    b: ir.IRBuilder, row: ir.Value, out: ir.Value, res: ir.Value, tile: BlockTile, sums: list[ir.Value]
) -> None:
    """Add the residual if there is one, apply the floor, store."""
    places = [(r, q, v) for r in range(tile.rows) for q in range(tile.cols) for v in range(tile.vectors)]

    def addresses(base: ir.Value, row_field: Field, step_field: Field) -> list[ir.Value]:
        rows = multiples(b, field(b, row, row_field), tile.rows)
        steps = multiples(b, field(b, row, step_field), tile.cols)
        return [b.add(b.add(base, rows[r]), b.add(steps[q], i64(VECTOR_BYTES * v))) for r, q, v in places]

    def add_residual(_: ir.Value, now: list[ir.Value]) -> list[ir.Value]:
        where = addresses(res, Field.RES_ROW, Field.RES_STEP)
        return [b.fadd(total, load(b, address)) for total, address in zip(now, where, strict=True)]

    has_residual = b.zext(b.icmp_signed("!=", res, i64(0)), I64)
    sums = loop(b, has_residual, sums, add_residual)
    floor, cap = floor_of(b, field(b, row, Field.RELU)), cap_of(b, field(b, row, Field.CAP))
    for total, address in zip(sums, addresses(out, Field.OUT_ROW, Field.OUT_STEP), strict=True):
        store(b, at_most(b, at_least(b, total, floor), cap), address)


def block_tile(tile: BlockTile) -> Callable[..., Any]:
    """Return the intrinsic ``f(row, x, out, res, offsets, weights, count, bias)`` of one tile shape."""
    pixels, width = tile.rows * tile.cols, tile.vectors

    @kernel(8)
    def block(
        b: ir.IRBuilder, row: ir.Value, x: ir.Value, out: ir.Value, res: ir.Value, offsets: ir.Value,
        weights: ir.Value, count: ir.Value, bias: ir.Value,
    ) -> None:
        rows = multiples(b, field(b, row, Field.X_ROW), tile.rows)
        steps = multiples(b, field(b, row, Field.X_STEP), tile.cols)
        start = [load(b, b.add(bias, i64(VECTOR_BYTES * v))) for v in range(width)] * pixels

        def entry(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            offset = b.sext(load(b, b.add(offsets, b.shl(index, i64(2))), I32), I64)
            here = b.add(weights, b.mul(index, i64(VECTOR_BYTES * width)))
            w = [load(b, b.add(here, i64(VECTOR_BYTES * v)), align=VECTOR_BYTES) for v in range(width)]
            new: list[ir.Value] = []
            for r in range(tile.rows):
                line = pointer(b, b.add(b.add(x, offset), rows[r]), I8)
                for q in range(tile.cols):
                    place = b.gep(line, [steps[q]], source_etype=I8) if q else line
                    value = splat(b, b.load(b.bitcast(place, F32.as_pointer()), align=4))
                    new += [fma(b, w[v], value, sums[len(new) + v]) for v in range(width)]
            return new

        def entries(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            first = b.mul(index, i64(tile.unroll))
            size = pixels * width
            return [
                total
                for u in range(tile.unroll)
                for total in entry(b.add(first, i64(u)), sums[u * size : (u + 1) * size])
            ]

        if tile.unroll > 1:
            whole = b.sdiv(count, i64(tile.unroll))
            sums = _total(b, loop(b, whole, start + [ZERO] * (len(start) * (tile.unroll - 1)), entries), len(start))
            done = b.mul(whole, i64(tile.unroll))
            sums = loop(b, b.sub(count, done), sums, lambda index, now: entry(b.add(index, done), now))
        else:
            sums = loop(b, count, start, entry)
        _finish(b, row, out, res, tile, sums)

    return block


def _total(b: ir.IRBuilder, sets: list[ir.Value], size: int) -> list[ir.Value]:
    """Add up the sets of ``size`` partial sums that an unrolled loop leaves."""
    total = sets[:size]
    for first in range(size, len(sets), size):
        total = [b.fadd(x, y) for x, y in zip(total, sets[first : first + size], strict=True)]
    return total


def depthwise_tile(tile: DepthwiseTile) -> Callable[..., Any]:
    """Return the intrinsic ``f(row, x, out, weights, tap_bytes, bias)``: 16 channels of the tile's pixels.

    ``weights`` is the address of the channels' weights of tap 0, ``tap_bytes`` the distance to the next tap's.
    """
    pixels = tile.pixels

    @kernel(6)
    def depthwise(
        b: ir.IRBuilder, row: ir.Value, x: ir.Value, out: ir.Value, weights: ir.Value, tap_bytes: ir.Value,
        bias: ir.Value,
    ) -> None:
        tap_row, tap_step = field(b, row, Field.TAP_ROW), field(b, row, Field.TAP_STEP)
        window_w = i64(tile.columns) if tile.columns else field(b, row, Field.WINDOW_W)

        def known(start: ir.Value, first: ir.Value, now: list[ir.Value]) -> list[ir.Value]:
            new, taps = list(now), [load(b, b.add(first, b.mul(i64(s), tap_bytes))) for s in range(tile.columns)]
            for place, step in enumerate(multiples(b, tap_step, tile.stride * (pixels - 1) + tile.columns)):
                value = load(b, b.add(start, step))
                for s, w in enumerate(taps):
                    p, between = divmod(place - s, tile.stride)
                    if not between and 0 <= p < pixels:
                        new[p] = fma(b, w, value, new[p])
            return new

        def line(r: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            start = b.add(x, b.mul(r, tap_row))
            first = b.add(weights, b.mul(b.mul(r, window_w), tap_bytes))
            if tile.columns:
                return known(start, first, sums)

            def tap(s: ir.Value, now: list[ir.Value]) -> list[ir.Value]:
                w, here = load(b, b.add(first, b.mul(s, tap_bytes))), b.add(start, b.mul(s, tap_step))
                return [fma(b, w, load(b, b.add(here, steps[p])), now[p]) for p in range(pixels)]

            return loop(b, window_w, sums, tap)

        steps = multiples(b, field(b, row, Field.X_STEP), pixels)
        sums = loop(b, field(b, row, Field.WINDOW_H), [load(b, bias)] * pixels, line)
        floor, cap = floor_of(b, field(b, row, Field.RELU)), cap_of(b, field(b, row, Field.CAP))
        places = multiples(b, field(b, row, Field.OUT_STEP), pixels)
        for total, place in zip(sums, places, strict=True):
            store(b, at_most(b, at_least(b, total, floor), cap), b.add(out, place))

    return depthwise


def csr_tile(tile: CsrTile) -> Callable[..., Any]:
    """Return the intrinsic ``f(planes, entries, pointers, shifts, out, more)``: one filter, ``16 · vectors`` positions.

    ``planes`` is the address of the tile's first position in plane 0; ``pointers`` of the filter's int32[shifts + 1].
    ``more`` = 1 adds to what ``out`` holds, 0 overwrites it.
    Entries are pairs {two int32 byte offsets, two float32 weights}; every group holds a multiple of ``step`` of them.
    """
    size = tile.vectors

    @kernel(6)
    def csr(
        b: ir.IRBuilder, planes: ir.Value, entries: ir.Value, pointers: ir.Value, shifts: ir.Value, out: ir.Value,
        more: ir.Value,
    ) -> None:
        def group(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            following = [*sums[1:], ZERO]
            sums = [shuffle(b, x, y, range(1, LANES + 1)) for x, y in zip(sums, following, strict=True)]
            here = b.add(pointers, b.shl(index, i64(2)))
            first = b.sext(load(b, here, I32), I64)
            last = b.sext(load(b, b.add(here, i64(4)), I32), I64)
            start = b.add(entries, b.shl(first, i64(3)))

            def pairs(step: ir.Value, now: list[ir.Value]) -> list[ir.Value]:
                new = list(now)
                for number in range(tile.step):
                    if number % 2 == 0:
                        place = b.add(start, b.add(b.mul(step, i64(8 * tile.step)), i64(8 * number)))
                        offsets, weights = load(b, place, I64, 8), load(b, b.add(place, i64(8)), PAIR, 8)
                    # One load for two offsets, one for two weights: loads are what this loop is short of.
                    offset = b.lshr(offsets, i64(32)) if number % 2 else b.and_(offsets, i64(0xFFFFFFFF))
                    weight = b.shuffle_vector(weights, weights, ir.Constant(LANE_NUMBERS, [number % 2] * LANES))
                    chain = size * (number % tile.unroll)
                    for v in range(size):
                        value = load(b, b.add(b.add(planes, offset), i64(VECTOR_BYTES * v)))
                        new[chain + v] = fma(b, value, weight, new[chain + v])
                return new

            count = b.sdiv(b.sub(last, first), i64(tile.step))
            return _total(b, loop(b, count, sums + [ZERO] * (size * (tile.unroll - 1)), pairs), size)

        def add_previous(_: ir.Value, now: list[ir.Value]) -> list[ir.Value]:
            return [b.fadd(total, load(b, place, align=VECTOR_BYTES)) for total, place in zip(now, places, strict=True)]

        sums = loop(b, shifts, [ZERO] * size, group)
        places = [b.add(out, i64(VECTOR_BYTES * v)) for v in range(size)]
        sums = loop(b, more, sums, add_previous)
        for total, place in zip(sums, places, strict=True):
            store(b, total, place, VECTOR_BYTES)

    return csr
