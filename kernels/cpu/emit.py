"""Small vocabulary for writing vector kernels as LLVM IR inside numba intrinsics.

A vector is 16 float32 lanes whatever the machine: LLVM splits it where registers are narrower.
All addresses are 64-bit integers, so that kernels take nothing but integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from autoprune.kernels.cpu.shapes import LANES

I8 = ir.IntType(8)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
VEC = ir.VectorType(F32, LANES)
ZERO = ir.Constant(VEC, [0.0] * LANES)


def i64(value: int) -> ir.Constant:
    """Return the 64-bit constant ``value``."""
    return ir.Constant(I64, value)


def pointer(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """Return the integer ``address`` as a pointer to ``kind``."""
    return b.inttoptr(address, kind.as_pointer())


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type = VEC, align: int = 4) -> ir.Value:
    """Load one ``kind`` from ``address``; vectors may lie at any multiple of 4 bytes."""
    return b.load(pointer(b, address, kind), align=align)


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    """Store ``value`` at ``address``."""
    b.store(value, pointer(b, address, value.type), align=align)


def splat(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """Return the float ``scalar`` in all lanes."""
    one = b.insert_element(ir.Constant(VEC, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(VEC, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def shuffle(b: ir.IRBuilder, first: ir.Value, second: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """Return the chosen lanes of ``first`` (0–15) and ``second`` (16–31)."""
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, LANES), list(lanes)))


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
    """Return ``x * y + total`` with one rounding."""
    kind = ir.FunctionType(VEC, [VEC, VEC, VEC])
    name = f"llvm.fma.v{LANES}f32"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, [x, y, total])


def at_least(b: ir.IRBuilder, value: ir.Value, floor: ir.Value) -> ir.Value:
    """Return the lane-wise maximum; a NaN in ``value`` stays, as it does in torch."""
    return b.select(b.fcmp_ordered("<", value, floor), floor, value)


def at_most(b: ir.IRBuilder, value: ir.Value, cap: ir.Value) -> ir.Value:
    """Return the lane-wise minimum; a NaN in ``value`` stays."""
    return b.select(b.fcmp_ordered(">", value, cap), cap, value)


def cap_of(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Return in all lanes the float32 whose bits an int64 holds."""
    return splat(b, b.bitcast(b.trunc(bits, I32), F32))


def constant(value: float) -> ir.Constant:
    """Return ``value`` in all lanes."""
    return ir.Constant(VEC, [value] * LANES)


def floor_of(b: ir.IRBuilder, relu: ir.Value) -> ir.Value:
    """Return the vector that ``at_least`` needs: zero where ``relu`` is not 0, minus infinity else."""
    return b.select(b.icmp_signed("!=", relu, i64(0)), ZERO, ir.Constant(VEC, [float("-inf")] * LANES))


def loop(
    b: ir.IRBuilder,
    count: ir.Value,
    state: Sequence[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """Emit ``for i in range(count): state = body(i, state)`` with the state in registers; return the final state."""
    entry = b.block
    head, after = b.append_basic_block("body"), b.append_basic_block("after")
    b.cbranch(b.icmp_signed(">", count, i64(0)), head, after)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(i64(0), entry)
    phis = [b.phi(value.type) for value in state]
    for phi, value in zip(phis, state, strict=True):
        phi.add_incoming(value, entry)
    new = body(index, list(phis))
    following = b.add(index, i64(1))
    index.add_incoming(following, b.block)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value, b.block)
    latch = b.block
    b.cbranch(b.icmp_signed("<", following, count), head, after)
    b.position_at_end(after)
    results = []
    for before, value in zip(state, new, strict=True):
        result = b.phi(value.type)
        result.add_incoming(before, entry)
        result.add_incoming(value, latch)
        results.append(result)
    return results


def load_transposed(b: ir.IRBuilder, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the 16 columns of the 16 vectors at the addresses ``rows``, in the four stages x86 has shuffles for."""
    vectors = [load(b, row) for row in rows]
    fours: list[list[ir.Value]] = []
    for g in range(0, LANES, 4):
        pairs = [_unpack(b, vectors[g + i], vectors[g + i + 1], 1, high) for i in (0, 2) for high in (False, True)]
        fours.append([_unpack(b, pairs[h], pairs[h + 2], 2, high) for h in (0, 1) for high in (False, True)])
    columns: list[ir.Value] = [ZERO] * LANES
    for k in range(4):  # fours[g][k] holds rows 4g … 4g+3 of the columns k, k + 4, k + 8, k + 12
        for odd in (0, 1):
            left = _quarters(b, fours[0][k], fours[1][k], odd)
            right = _quarters(b, fours[2][k], fours[3][k], odd)
            columns[k + 4 * odd] = _quarters(b, left, right, 0)
            columns[k + 4 * odd + 8] = _quarters(b, left, right, 1)
    return columns


def _quarters(b: ir.IRBuilder, x: ir.Value, y: ir.Value, odd: int) -> ir.Value:
    """Return every second quarter of ``x`` and ``y``, even or odd ones."""
    return shuffle(b, x, y, [4 * quarter + k for quarter in (odd, odd + 2, odd + 4, odd + 6) for k in range(4)])


def _unpack(b: ir.IRBuilder, x: ir.Value, y: ir.Value, width: int, high: bool) -> ir.Value:
    """Interleave elements of ``width`` lanes from the low or high halves of the quarters of ``x`` and ``y``."""
    lanes = []
    for start in range(2 if high else 0, LANES, 4):
        second = start + LANES
        lanes += [start, second, start + 1, second + 1] if width == 1 else [start, start + 1, second, second + 1]
    return shuffle(b, x, y, lanes)


def kernel(n_args: int, result: types.Type = types.void) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn ``emit(builder, *addresses)`` into an intrinsic of ``n_args`` int64 arguments.

    The arguments that numba infers as other integer types are widened first.
    """

    def decorate(emit: Callable[..., Any]) -> Callable[..., Any]:
        names = ", ".join(f"a{i}" for i in range(n_args))
        signature = result(*[types.int64] * n_args)

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Sequence[ir.Value]) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if result == types.void else value

        space: dict[str, Any] = {"signature": signature, "codegen": codegen}
        exec(f"def {emit.__name__}(typingctx, {names}):\n    return signature, codegen", space)
        function: Callable[..., Any] = intrinsic(space[emit.__name__])
        return function

    return decorate
