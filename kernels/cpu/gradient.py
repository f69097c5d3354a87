"""What training needs beside the tiles of a forward pass: the weight gradients' tiles, and bfloat16 in and out.

The block gradient is the block tile turned round: the output gradient's vectors (lanes = 16 filters) of rows × columns
pixels stay in registers, and every kept block adds their products with the broadcast input to its own sums in memory.
The gradient of single weights works on planes (lanes = 16 pixels): a run of the output gradient of one filter stays in
registers, and every kept weight adds its products with the same run of one input plane to a vector of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from autoprune.kernels.cpu.emit import F32, I8, I32, I64, VEC, ZERO, fma, i64, kernel, load, loop, pointer, splat, store
from autoprune.kernels.cpu.rows import Field
from autoprune.kernels.cpu.shapes import LANES, VECTOR_BYTES, BlockTile
from autoprune.kernels.cpu.tiles import field, multiples

I16 = ir.IntType(16)
WORDS, HALVES = ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
_CHAINS = 2  # sums in flight per block: one alone would wait for itself


def gradient_tile(tile: BlockTile) -> Callable[..., Any]:
    """Return the intrinsic ``f(row, x, dy, offsets, sums, count)`` of one tile shape.

    ``sums`` holds a vector of 16 filters for each of ``count`` blocks; ``offsets`` are the blocks' places in the input
    (int32 bytes). The row's fields X… and OUT… are those of the input and of the output gradient.
    """
    places = [(r, q) for r in range(tile.rows) for q in range(tile.cols)]

    @kernel(6)
    def gradient(
        b: ir.IRBuilder, row: ir.Value, x: ir.Value, dy: ir.Value, offsets: ir.Value, sums: ir.Value, count: ir.Value
    ) -> None:
        x_rows = multiples(b, field(b, row, Field.X_ROW), tile.rows)
        x_steps = multiples(b, field(b, row, Field.X_STEP), tile.cols)
        y_rows = multiples(b, field(b, row, Field.OUT_ROW), tile.rows)
        y_steps = multiples(b, field(b, row, Field.OUT_STEP), tile.cols)
        vectors = [load(b, b.add(b.add(dy, y_rows[r]), y_steps[q])) for r, q in places]

        def block(index: ir.Value, nothing: list[ir.Value]) -> list[ir.Value]:
            here = b.add(sums, b.mul(index, i64(VECTOR_BYTES)))
            offset = b.sext(load(b, b.add(offsets, b.shl(index, i64(2))), I32), I64)
            chains = [load(b, here), *[ZERO] * (_CHAINS - 1)]
            lines = [pointer(b, b.add(b.add(x, offset), line), I8) for line in x_rows]
            for number, ((r, q), vector) in enumerate(zip(places, vectors, strict=True)):
                place = b.gep(lines[r], [x_steps[q]], source_etype=I8) if q else lines[r]
                value = splat(b, b.load(b.bitcast(place, F32.as_pointer()), align=4))
                chains[number % _CHAINS] = fma(b, vector, value, chains[number % _CHAINS])
            total = chains[0]
            for chain in chains[1:]:
                total = b.fadd(total, chain)
            store(b, total, here)
            return nothing

        loop(b, count, [], block)

    return gradient


def gradient_run(vectors: int) -> Callable[..., Any]:
    """Return the intrinsic ``f(x, dy, offsets, sums, count)`` of a run of ``vectors``.

    ``sums`` holds a vector for each of ``count`` weights, whose lanes are added up at the end; ``offsets`` are the
    weights' places in the input planes (int32 bytes, multiples of a vector); ``dy`` may lie at any float.
    """

    @kernel(5)
    def run(
        b: ir.IRBuilder, x: ir.Value, dy: ir.Value, offsets: ir.Value, sums: ir.Value, count: ir.Value
    ) -> None:
        held = [load(b, b.add(dy, i64(VECTOR_BYTES * v))) for v in range(vectors)]

        def weight(index: ir.Value, nothing: list[ir.Value]) -> list[ir.Value]:
            here = b.add(sums, b.mul(index, i64(VECTOR_BYTES)))
            offset = b.sext(load(b, b.add(offsets, b.shl(index, i64(2))), I32), I64)
            chains = [load(b, here), ZERO] if vectors > 1 else [load(b, here)]
            for v, vector in enumerate(held):
                value = load(b, b.add(b.add(x, offset), i64(VECTOR_BYTES * v)))
                chains[v % _CHAINS] = fma(b, vector, value, chains[v % _CHAINS])
            store(b, b.fadd(*chains) if vectors > 1 else chains[0], here)
            return nothing

        loop(b, count, [], weight)

    return run


@kernel(2)
def widen(b: ir.IRBuilder, out: ir.Value, x: ir.Value) -> None:
    """Write 16 float32 from 16 bfloat16, exactly."""
    words = b.zext(load(b, x, HALVES, 2), WORDS)
    store(b, b.bitcast(b.shl(words, ir.Constant(WORDS, [16] * LANES)), VEC), out)


@kernel(2)
def narrow(b: ir.IRBuilder, out: ir.Value, x: ir.Value) -> None:
    """Write 16 bfloat16 from 16 float32, rounded to nearest, ties to even; a NaN stays one."""
    value = load(b, x)
    words = b.bitcast(value, WORDS)
    odd = b.and_(b.lshr(words, ir.Constant(WORDS, [16] * LANES)), ir.Constant(WORDS, [1] * LANES))
    rounded = b.add(b.add(words, odd), ir.Constant(WORDS, [0x7FFF] * LANES))
    halves = b.lshr(rounded, ir.Constant(WORDS, [16] * LANES))
    is_nan = b.fcmp_unordered("uno", value, value)
    store(b, b.trunc(b.select(is_nan, ir.Constant(WORDS, [0x7FC0] * LANES), halves), HALVES), out, 2)


@kernel(2)
def widen_one(b: ir.IRBuilder, out: ir.Value, x: ir.Value) -> None:
    """Write one float32 from one bfloat16."""
    store(b, b.shl(b.zext(load(b, x, I16, 2), I32), ir.Constant(I32, 16)), out)


@kernel(2)
def narrow_one(b: ir.IRBuilder, out: ir.Value, x: ir.Value) -> None:
    """Write one bfloat16 from one float32, as ``narrow`` does."""
    value = load(b, x, F32)
    word = b.bitcast(value, I32)
    odd = b.and_(b.lshr(word, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    half = b.lshr(b.add(b.add(word, odd), ir.Constant(I32, 0x7FFF)), ir.Constant(I32, 16))
    is_nan = b.fcmp_unordered("uno", value, value)
    store(b, b.trunc(b.select(is_nan, ir.Constant(I32, 0x7FC0), half), I16), out, 2)
