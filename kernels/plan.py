"""A whole network as one flat list of kernel calls on preallocated buffers.

``build_plan`` traces an eval-mode model, folds every BatchNorm, fuses sums and ReLUs into the convolutions and names
the kernel of each layer; ``Plan.program`` turns that into a compiled program for one batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from autoprune.core.choices import Block, Choice, Dense
from autoprune.kernels.cpu.program import Buffer, Epilogue, Program
from autoprune.kernels.cpu.shapes import LANES
from autoprune.kernels.plan_norms import split_norms
from autoprune.kernels.plan_ops import (
    AddOp,
    CatOp,
    ConvOp,
    CurveOp,
    MulOp,
    NormOp,
    Op,
    PlanRefusal,
    PoolOp,
    Refused,
    ReluOp,
    Value,
    fuse,
    reads,
)
from autoprune.kernels.plan_record import eval_view
from autoprune.kernels.plan_trace import trace_ops

KernelName = Literal["dense", "block", "csr"]

__all__ = ["KernelName", "Plan", "PlanRefusal", "build_plan", "kernel_for"]


def kernel_for(choice: Choice) -> tuple[KernelName, int]:
    """Return the kernel that executes a choice, and its width in filters (16 or 32; used by ``block`` alone)."""
    if choice.kernel == "block":
        return "block", choice.filters if isinstance(choice, Block) else 16
    return ("csr" if choice.kernel == "csr" else "dense"), 16


@dataclass(frozen=True, slots=True)
class Plan:
    """A traced, fused network with a kernel per layer.

    Attributes:
        ops: In order of execution; convolutions carry their folded weights.
        input, output: First and last map.
        output_shape: Shape of the model's output, batch left out.
        kernels: Layer → kernel and block width.
        threads: Threads each program runs on.
    """

    ops: tuple[Op, ...]
    input: Value
    output: Value
    output_shape: tuple[int, ...]
    kernels: Mapping[str, tuple[KernelName, int]]
    threads: int = 1

    @property
    def convs(self) -> tuple[ConvOp, ...]:
        """The convolutions and linear layers, in order of execution."""
        return tuple(op for op in self.ops if isinstance(op, ConvOp))

    @property
    def op_names(self) -> tuple[str, ...]:
        """Name of each operation of a program, in the order of ``Program.profile_us``."""
        return tuple(op.name for op in self.ops)

    @property
    def image_bytes(self) -> int:
        """Bytes of the maps of one image in a program; channels are stored in sixteens."""
        buffers = _Buffers(Program(1), self)
        buffers.take(self.input)
        for position, op in enumerate(self.ops):
            buffers.take(op.out)
            buffers.release(position)
        return sum(
            4 * math.ceil(b.channels / LANES) * LANES * (b.height + 2 * b.halo) * (b.width + 2 * b.halo)
            for b in buffers.made
        )

    def program(self, batch: int, weights: Mapping[str, Tensor] | None = None) -> Program:
        """Return the finished program for one batch size.

        Args:
            batch: Samples a run.
            weights: Replaces ``NAME.weight`` (KCRS) and ``NAME.bias`` of the convolutions that it names.
        """
        program = Program(batch, self.threads)
        buffers = _Buffers(program, self)
        program.set_input(buffers.take(self.input))
        for position, op in enumerate(self.ops):
            self._add(program, buffers, op, weights or {})
            buffers.release(position)
        program.set_output(buffers[self.output])
        program.finish(strips=True)
        return program

    def _add(self, program: Program, buffers: _Buffers, op: Op, weights: Mapping[str, Tensor]) -> None:
        x, out = buffers[op.x], buffers.take(op.out)
        match op:
            case ConvOp():
                kernel, block = self.kernels.get(op.name, ("dense", 16))
                weight = weights.get(f"{op.name}.weight", op.weight_KCRS)
                bias = weights.get(f"{op.name}.bias", op.bias_K)
                residual = None if op.residual is None else buffers[op.residual]
                epilogue = Epilogue(relu=op.relu, residual=residual, cap=op.cap)
                program.conv(x, out, op.shape, weight, bias, kernel, epilogue, block, op.extra)
            case AddOp():
                program.add(x, buffers[op.y], out, op.relu, op.cap)
            case ReluOp():
                program.relu(x, out, op.cap)
            case CurveOp():
                program.curve(x, out, op.curve, op.slope)
            case MulOp():
                program.multiply(x, buffers[op.y], out)
            case CatOp():
                offset = 0
                for part in op.parts:
                    program.place(buffers[part], out, offset)
                    offset += part.channels
            case PoolOp(kind="global"):
                program.global_avg_pool(x, out)
            case PoolOp(kind="max"):
                program.max_pool(x, out, op.kernel, op.stride, op.padding)
            case PoolOp():
                program.avg_pool(x, out, op.kernel, op.stride, op.padding, inside=op.inside)
            case NormOp():
                program.affine(x, out, op.scale_K, op.shift_K, op.relu, op.cap)


class _Buffers:
    """Buffers of a program; one that nobody reads any more serves the next map of its sizes, so caches stay warm."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program = program
        self.halos = _halos(plan.ops)
        self.made: list[Buffer] = []
        self.taken: dict[int, Buffer] = {}
        self.free: dict[tuple[int, int, int, int], list[Buffer]] = {}
        self.dying: dict[int, list[Value]] = {}
        last = {value.index: (at, value) for at, op in enumerate(plan.ops) for value in (op.out, *reads(op))}
        # The input stays: the program writes it before the first operation. The output is read after the last.
        for index, (at, value) in last.items():
            if index not in (plan.input.index, plan.output.index):
                self.dying.setdefault(at, []).append(value)

    def __getitem__(self, value: Value) -> Buffer:
        return self.taken[value.index]

    def _key(self, value: Value) -> tuple[int, int, int, int]:
        return (value.channels, value.height, value.width, self.halos.get(value.index, 0))

    def take(self, value: Value) -> Buffer:
        """Return the buffer a map is written to."""
        spare = self.free.get(self._key(value))
        if not spare:
            self.made.append(self.program.buffer(*self._key(value)))
        self.taken[value.index] = spare.pop() if spare else self.made[-1]
        return self.taken[value.index]

    def release(self, position: int) -> None:
        """Free what was read for the last time by the operation at ``position``."""
        for value in self.dying.get(position, ()):
            self.free.setdefault(self._key(value), []).append(self.taken.pop(value.index))


def _halos(ops: Sequence[Op]) -> dict[int, int]:
    """Return the border of zeros that each map needs, by value: the widest padding of the convolutions that read it."""
    halos: dict[int, int] = {}
    for op in ops:
        if isinstance(op, ConvOp):
            sides = (p + more for p, more in zip(op.shape.padding, op.extra, strict=True))
            halos[op.x.index] = max(halos.get(op.x.index, 0), *sides)
    return halos


def build_plan(
    model: nn.Module,
    example: Tensor,
    choices: Mapping[str, Choice],
    kernels: Mapping[str, KernelName] | None = None,
    threads: int = 1,
) -> Plan | PlanRefusal:
    """Return the model as a plan, or why it cannot be one.

    Args:
        model: Left as it is; BatchNorm and dropout are taken as in eval mode.
        example: (N, C, H, W) float32; only its shape matters.
        choices: Layer → choice; layers not named are dense.
        kernels: Layer → kernel, where it shall differ from the choice's own.
        threads: Threads a program runs on.
    """
    try:
        traced = trace_ops(split_norms(eval_view(model)), example)
        ops = fuse(traced.ops, traced.output)
    except Refused as error:
        return error.refusal
    names: dict[str, tuple[KernelName, int]] = {}
    for op in ops:
        if isinstance(op, ConvOp):
            kernel, block = kernel_for(choices.get(op.name, Dense()))
            names[op.name] = ((kernels or {}).get(op.name, kernel), block)
    return Plan(ops, traced.input, traced.output, traced.output_shape, names, threads)
