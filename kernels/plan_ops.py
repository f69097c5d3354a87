"""The operations a plan is made of, their fusion, and the shape facts of a layer.

Legend: K filters, C input channels, R × S window. A value is a feature map of fixed channels × height × width; a vector
is a 1 × 1 map, and a flattened map keeps its three sizes (flattening moves nothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.recorder import is_depthwise
from autoprune.kernels.cpu.rows import Curve


@dataclass(frozen=True, slots=True)
class PlanRefusal:
    """Why a model cannot run as one flat plan.

    Attributes:
        where: Name of the module or graph node in the way.
        reason: One clause, in the words of a report.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"'{self.where}': {self.reason}"


class Refused(Exception):
    """Carries a refusal out of the tracing of a model; never leaves this package."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.refusal = PlanRefusal(where, reason)


@dataclass(frozen=True, slots=True)
class Value:
    """One feature map, batch left out."""

    index: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class ConvOp:
    """A convolution or linear layer with everything fused into it.

    Attributes:
        name: Dotted module name.
        layer: The layer as the user knows it (a linear stays a linear): key of the latency table.
        shape: The same layer as a convolution: what the kernel runs.
        weight_KCRS, bias_K: float32, BatchNorm folded in.
        residual: Map added before the ReLU.
        cap: What results are cut at, as ReLU6 does.
        extra: Rows and columns of zeros below and right of the map beyond the layer's padding.
    """

    name: str
    layer: LayerSpec
    shape: LayerSpec
    weight_KCRS: Tensor
    bias_K: Tensor | None
    x: Value
    out: Value
    relu: bool = False
    residual: Value | None = None
    cap: float = math.inf
    extra: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class NormOp:
    """An inference BatchNorm, y = scale · x + shift in float64; folded away where it follows a convolution."""

    name: str
    scale_K: Tensor
    shift_K: Tensor
    x: Value
    out: Value
    relu: bool = False
    cap: float = math.inf


@dataclass(frozen=True, slots=True)
class AddOp:
    """Sum of two maps, then ReLU if asked."""

    name: str
    x: Value
    y: Value
    out: Value
    relu: bool = False
    cap: float = math.inf


@dataclass(frozen=True, slots=True)
class ReluOp:
    """ReLU on its own, cut at ``cap``."""

    name: str
    x: Value
    out: Value
    cap: float = math.inf


@dataclass(frozen=True, slots=True)
class CurveOp:
    """Another activation; a leaky one has a slope."""

    name: str
    curve: Curve
    x: Value
    out: Value
    slope: float = 0.0


@dataclass(frozen=True, slots=True)
class MulOp:
    """Product of two maps; ``y`` may have one pixel, as the gates of squeeze-and-excitation have."""

    name: str
    x: Value
    y: Value
    out: Value


@dataclass(frozen=True, slots=True)
class CatOp:
    """Maps side by side in one, channel after channel; all but the last have multiples of 16 channels."""

    name: str
    parts: tuple[Value, ...]
    out: Value

    @property
    def x(self) -> Value:
        """The first map."""
        return self.parts[0]


@dataclass(frozen=True, slots=True)
class PoolOp:
    """Pooling over square windows; ``global`` averages the map to 1 × 1; ``inside`` leaves padding out of means."""

    name: str
    kind: Literal["global", "avg", "max"]
    x: Value
    out: Value
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    inside: bool = False


Op = ConvOp | NormOp | AddOp | ReluOp | PoolOp | CurveOp | MulOp | CatOp


def reads(op: Op) -> tuple[Value, ...]:
    """Return the maps an operation reads, one entry per use."""
    if isinstance(op, AddOp | MulOp):
        return (op.x, op.y)
    if isinstance(op, CatOp):
        return op.parts
    if isinstance(op, ConvOp) and op.residual is not None:
        return (op.x, op.residual)
    return (op.x,)


def padding_of(module: nn.Conv2d) -> tuple[int, int] | None:
    """Return (rows, columns) of zero padding on every side; None where the two sides differ."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return (0, 0)
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(span % 2 for span in spans) else (spans[0] // 2, spans[1] // 2)
    return (int(module.padding[0]), int(module.padding[1]))


def _smaller_sides(module: nn.Conv2d) -> tuple[int, int]:
    """Return (rows, columns) of the smaller of two unequal sides of padding 'same'; PyTorch puts it before the map."""
    rows, columns = (d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return rows, columns


def layer_spec(name: str, module: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int]) -> LayerSpec:
    """Return the shape facts of a ``Conv2d`` or ``Linear``, given the shapes (N, …) it read and wrote."""
    shape = tuple(int(size) for size in module.weight.shape)  # type: ignore[union-attr]
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        # Tokens (N, T, I) run as T independent rows a sample.
        tokens = 1
        for size in input_shape[1:-1]:
            tokens *= int(size)
        return LayerSpec(name, "linear", shape, input_hw=(tokens, 1), output_hw=(tokens, 1), bias=bias)
    assert isinstance(module, nn.Conv2d)
    return LayerSpec(
        name=name,
        op="conv",
        weight_shape=shape,
        stride=(module.stride[0], module.stride[1]),
        padding=padding_of(module) or _smaller_sides(module),
        dilation=(module.dilation[0], module.dilation[1]),
        groups=module.groups,
        input_hw=(int(input_shape[-2]), int(input_shape[-1])),
        output_hw=(int(output_shape[-2]), int(output_shape[-1])),
        bias=bias,
    )


def norm_terms(module: nn.BatchNorm2d | nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return scale and shift of an inference BatchNorm, (K,) float64.

    Raises:
        Refused: It normalises by the batch even in eval mode.
    """
    if module.running_mean is None or module.running_var is None:
        raise Refused(type(module).__name__, "it normalises by the batch's own statistics")
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -module.running_mean.double() * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double()
    return scale, shift


def fuse(ops: Iterable[Op], output: Value) -> tuple[Op, ...]:
    """Fold BatchNorms into their convolutions; fuse sums and ReLUs into the operation before them where it allows.

    A fused operation runs where the last of its parts stood, so everything it reads is there; it may be moved because
    the part that follows is its only reader.
    """
    ops = list(ops)
    uses: dict[int, int] = {output.index: 1}
    for op in ops:
        for value in reads(op):
            uses[value.index] = uses.get(value.index, 0) + 1
    done: dict[int, Op] = {}
    for op in ops:
        own = {value.index: done[value.index] for value in reads(op) if uses[value.index] == 1 and value.index in done}
        fused, absorbed = _fuse_one(op, own)
        if absorbed is not None:
            del done[absorbed]
        done[op.out.index] = fused
    return tuple(done.values())


def _fuse_one(op: Op, own: dict[int, Op]) -> tuple[Op, int | None]:
    """Return ``op`` with the operation it was fused into, and the value that is no longer written.

    Args:
        op: The operation at hand.
        own: Operations that wrote what ``op`` alone reads, by value.
    """
    source = own.get(op.x.index)
    if isinstance(op, NormOp) and isinstance(source, ConvOp) and not source.relu and source.residual is None:
        return _folded(source, op), op.x.index
    if isinstance(op, ReluOp) and isinstance(source, ConvOp | AddOp | NormOp) and not source.relu:
        return replace(source, relu=True, cap=op.cap, out=op.out), op.x.index
    if isinstance(op, AddOp) and op.x is not op.y:
        # Values are numbered in order of execution; the later operand is still warm, so it is tried first.
        for value, other in sorted(((op.x, op.y), (op.y, op.x)), key=lambda pair: -pair[0].index):
            source = own.get(value.index)
            plain = isinstance(source, ConvOp) and not source.relu and source.residual is None
            if isinstance(source, ConvOp) and plain and not is_depthwise(source.shape):
                return replace(source, residual=other, out=op.out), value.index
    return op, None


def _folded(conv: ConvOp, norm: NormOp) -> ConvOp:
    weight = (conv.weight_KCRS.double() * norm.scale_K[:, None, None, None]).float()
    bias = torch.zeros_like(norm.shift_K) if conv.bias_K is None else conv.bias_K.double()
    return replace(conv, weight_KCRS=weight, bias_K=(bias * norm.scale_K + norm.shift_K).float(), out=norm.out)
