"""Vector and machine primitives: transposes, pooling windows, raw memory, atomics, clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from autoprune.kernels.cpu.emit import (
    I8,
    I32,
    I64,
    VEC,
    ZERO,
    at_least,
    at_most,
    cap_of,
    constant,
    floor_of,
    fma,
    i64,
    kernel,
    load,
    load_transposed,
    loop,
    pointer,
    splat,
    store,
)
from autoprune.kernels.cpu.shapes import LANES, VECTOR_BYTES, has_estimates

_ALL = ir.Constant(ir.IntType(LANES), -1)  # lanes that count, of instructions with a mask


@kernel(1, types.int64)
def peek(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Read an int64."""
    return load(b, address, I64, 8)


@kernel(1, types.int64)
def peek32(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Read an int32."""
    return b.sext(load(b, address, I32), I64)


@kernel(2)
def poke(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write an int64."""
    store(b, value, address, 8)


@kernel(2)
def copy_float(b: ir.IRBuilder, target: ir.Value, source: ir.Value) -> None:
    """Copy one float32."""
    store(b, load(b, source, I32), target)


@kernel(3)
def copy_bytes(b: ir.IRBuilder, target: ir.Value, source: ir.Value, size: ir.Value) -> None:
    """Copy ``size`` bytes between areas that do not overlap."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I8.as_pointer(), I64, ir.IntType(1)])
    name = "llvm.memcpy.p0.p0.i64"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    b.call(function, [pointer(b, target, I8), pointer(b, source, I8), size, ir.Constant(ir.IntType(1), 0)])


@kernel(8)
def elementwise_vector(
    b: ir.IRBuilder, out: ir.Value, x: ir.Value, y: ir.Value, times: ir.Value, scale: ir.Value, shift: ir.Value,
    relu: ir.Value, cap: ir.Value,
) -> None:
    """Write one vector: x · scale + shift, then + y (or · y where ``times``), floor and ceiling; address 0: absent."""

    def optional(address: ir.Value, otherwise: ir.Value) -> ir.Value:
        absent = b.icmp_signed("==", address, i64(0))
        return b.select(absent, otherwise, load(b, b.select(absent, x, address)))

    value = load(b, x)
    scaled = fma(b, value, optional(scale, ZERO), optional(shift, ZERO))
    value = b.select(b.icmp_signed("==", scale, i64(0)), value, scaled)
    by = b.icmp_signed("!=", times, i64(0))
    value = b.select(by, b.fmul(value, optional(y, constant(1.0))), b.fadd(value, optional(y, ZERO)))
    store(b, at_most(b, at_least(b, value, floor_of(b, relu)), cap_of(b, cap)), out)


def _each(
    b: ir.IRBuilder, out: ir.Value, x: ir.Value, count: ir.Value, of: Callable[[ir.Value], ir.Value]
) -> None:
    """Write ``of`` each of ``count`` vectors that lie side by side."""

    def body(index: ir.Value, nothing: list[ir.Value]) -> list[ir.Value]:
        place = b.mul(index, i64(VECTOR_BYTES))
        store(b, of(load(b, b.add(x, place))), b.add(out, place))
        return nothing

    loop(b, count, [], body)


@kernel(4)
def hard_run(b: ir.IRBuilder, out: ir.Value, x: ir.Value, count: ir.Value, swish: ir.Value) -> None:
    """Write the hard sigmoid of ``count`` vectors, times themselves where ``swish`` is not 0."""
    by = b.icmp_signed("!=", swish, i64(0))

    def of(value: ir.Value) -> ir.Value:
        gate = at_most(b, at_least(b, b.fadd(value, constant(3.0)), ZERO), constant(6.0))
        gate = b.fmul(gate, constant(1.0 / 6.0))
        return b.select(by, b.fmul(value, gate), gate)

    _each(b, out, x, count, of)


@kernel(4)
def smooth_run(b: ir.IRBuilder, out: ir.Value, x: ir.Value, count: ir.Value, swish: ir.Value) -> None:
    """Write the sigmoid of ``count`` vectors, times themselves where ``swish`` is not 0."""
    by = b.icmp_signed("!=", swish, i64(0))

    def of(value: ir.Value) -> ir.Value:
        gate = _reciprocal(b, b.fadd(constant(1.0), _exp(b, b.fsub(ZERO, value))))
        return b.select(by, b.fmul(value, gate), gate)

    _each(b, out, x, count, of)


@kernel(4)
def leaky_run(b: ir.IRBuilder, out: ir.Value, x: ir.Value, count: ir.Value, slope: ir.Value) -> None:
    """Write ``count`` vectors, what is negative times the float32 whose bits ``slope`` holds."""
    factor = cap_of(b, slope)
    _each(b, out, x, count, lambda value: b.select(b.fcmp_ordered("<", value, ZERO), b.fmul(value, factor), value))


# e to the power of −ln(2)/2 … ln(2)/2 by a minimax polynomial, relative error 8e-8 before rounding.
_EXP = (1.0000000716546629, 0.9999996919905825, 0.49998894851349224, 0.1666757473192447, 0.04191538198060613,
        0.008297654866370643)  # fmt: skip


def _call(b: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic that returns a vector."""
    kind = ir.FunctionType(VEC, [value.type for value in values])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), values)


def _reciprocal(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return 1 / x of every lane, relative error below 2e-7; a division takes three times as long."""
    if not has_estimates():
        return b.fdiv(constant(1.0), x)
    guess = _call(b, "llvm.x86.avx512.rcp14.ps.512", x, ZERO, _ALL)
    return b.fmul(guess, fma(b, b.fsub(ZERO, x), guess, constant(2.0)))


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return e to the power of every lane, relative error about 2e-7; arguments are cut at ±87."""
    x = at_most(b, at_least(b, x, constant(-87.0)), constant(87.0))
    power = _call(b, f"llvm.nearbyint.v{LANES}f32", b.fmul(x, constant(1.4426950408889634)))
    rest = fma(b, power, constant(-0.693145751953125), x)
    rest = fma(b, power, constant(-1.428606820309417e-06), rest)
    total: ir.Value = constant(_EXP[-1])
    for factor in reversed(_EXP[:-1]):
        total = fma(b, total, rest, constant(factor))
    if has_estimates():
        return _call(b, "llvm.x86.avx512.mask.scalef.ps.512", total, power, ZERO, _ALL, ir.Constant(I32, 4))
    # 2 to a whole power is put together from its bits.
    whole = ir.VectorType(I32, LANES)
    bits = b.add(b.fptosi(power, whole), ir.Constant(whole, [127] * LANES))
    return b.fmul(total, b.bitcast(b.shl(bits, ir.Constant(whole, [23] * LANES)), VEC))


@kernel(4)
def transpose_block(b: ir.IRBuilder, out: ir.Value, out_bytes: ir.Value, x: ir.Value, x_bytes: ir.Value) -> None:
    """Write the 16 columns of 16 vectors, ``x_bytes`` apart, as vectors ``out_bytes`` apart."""
    columns = load_transposed(b, [b.add(x, b.mul(x_bytes, i64(k))) for k in range(LANES)])
    for k, column in enumerate(columns):
        store(b, column, b.add(out, b.mul(out_bytes, i64(k))))


@kernel(7)
def pool_vector(
    b: ir.IRBuilder, out: ir.Value, x: ir.Value, rows: ir.Value, row_bytes: ir.Value, cols: ir.Value,
    col_bytes: ir.Value, mean_of: ir.Value,
) -> None:
    """Write one vector: the maximum of a window, or its sum divided by ``mean_of`` where that is above 0."""
    is_mean = b.icmp_signed(">", mean_of, i64(0))
    start = b.select(is_mean, ZERO, ir.Constant(VEC, [float("-inf")] * LANES))

    def line(r: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        base = b.add(x, b.mul(r, row_bytes))

        def pixel(q: ir.Value, now: list[ir.Value]) -> list[ir.Value]:
            value = load(b, b.add(base, b.mul(q, col_bytes)))
            return [b.select(is_mean, b.fadd(now[0], value), at_least(b, value, now[0]))]

        return loop(b, cols, state, pixel)

    total = loop(b, rows, [start], line)[0]
    divisor = splat(b, b.sitofp(mean_of, ir.FloatType()))
    store(b, b.select(is_mean, b.fdiv(total, divisor), total), out)


@kernel(4)
def gather_transposed(b: ir.IRBuilder, out: ir.Value, out_bytes: ir.Value, x: ir.Value, pixels: ir.Value) -> None:
    """Write 16 channels of the 16 pixels at byte offsets ``pixels`` (int32) as 16 rows, ``out_bytes`` apart."""
    offsets = [b.sext(load(b, b.add(pixels, i64(4 * k)), I32), I64) for k in range(LANES)]
    columns = load_transposed(b, [b.add(x, offset) for offset in offsets])
    for k, column in enumerate(columns):
        store(b, column, b.add(out, b.mul(out_bytes, i64(k))), VECTOR_BYTES)


@kernel(9)
def scatter_transposed(
    b: ir.IRBuilder, x: ir.Value, x_bytes: ir.Value, out: ir.Value, pixels: ir.Value, res: ir.Value,
    res_pixels: ir.Value, bias: ir.Value, relu: ir.Value, cap: ir.Value,
) -> None:
    """Write 16 rows of 16 pixels, ``x_bytes`` apart, to the pixels at byte offsets ``pixels`` (int32, -1: nowhere).

    Bias (16 channels), residual (``res`` = 0: none), floor and ceiling are applied on the way.
    """
    columns = load_transposed(b, [b.add(x, b.mul(x_bytes, i64(k))) for k in range(LANES)])
    start = load(b, bias)
    floor, ceiling = floor_of(b, relu), cap_of(b, cap)
    has_residual = b.icmp_signed("!=", res, i64(0))
    for k, column in enumerate(columns):
        offset = b.sext(load(b, b.add(pixels, i64(4 * k)), I32), I64)
        with b.if_then(b.icmp_signed(">=", offset, i64(0))):
            total = b.fadd(column, start)
            plain = b.block
            with b.if_then(has_residual):
                place = b.add(res, b.sext(load(b, b.add(res_pixels, i64(4 * k)), I32), I64))
                more = b.fadd(total, load(b, place))
                added = b.block
            value = b.phi(VEC)
            value.add_incoming(total, plain)
            value.add_incoming(more, added)
            store(b, at_most(b, at_least(b, value, floor), ceiling), b.add(out, offset))


@kernel(2, types.int64)
def fetch_add(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    """Add to an int64 atomically and return what it was."""
    return b.atomic_rmw("add", pointer(b, address, I64), value, "seq_cst")


@kernel(2, types.int64)
def exchange(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    """Replace an int64 atomically and return what it was."""
    return b.atomic_rmw("xchg", pointer(b, address, I64), value, "seq_cst")


@kernel(1, types.int64)
def watch(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Read an int64 that other threads write."""
    return b.load_atomic(pointer(b, address, I64), "seq_cst", 8)


def _extern(b: ir.IRBuilder, name: str, result: ir.Type, kinds: list[ir.Type]) -> Any:
    return b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, kinds), name)


@kernel(0)
def pause(b: ir.IRBuilder) -> None:
    """Tell the core that this is a spin loop; nothing on machines without such an instruction."""
    if b.module.triple.startswith(("x86_64", "i386", "i686")):
        b.call(_extern(b, "llvm.x86.sse2.pause", ir.VoidType(), []), [])


@kernel(0)
def give_way(b: ir.IRBuilder) -> None:
    """Let another thread have the core."""
    b.call(_extern(b, "sched_yield", I32, []), [])


@kernel(0, types.int64)
def now_ns(b: ir.IRBuilder) -> ir.Value:
    """Return the monotonic clock in nanoseconds."""
    with b.goto_entry_block():
        place = b.alloca(ir.ArrayType(I64, 2))
    base = b.bitcast(place, I64.as_pointer())
    b.call(_extern(b, "clock_gettime", I32, [I32, I64.as_pointer()]), [ir.Constant(I32, 1), base])
    seconds = b.load(base, align=8)
    rest = b.load(b.gep(base, [i64(1)], source_etype=I64), align=8)
    return b.add(b.mul(seconds, i64(1_000_000_000)), rest)
