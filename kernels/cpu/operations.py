"""The operations a program can hold, and what must be true of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.memory import Buffer
from autoprune.kernels.cpu.rows import Curve
from autoprune.kernels.cpu.shapes import LANES

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What follows the sums: ``min(relu(conv + bias + residual), cap)``, each part optional."""

    relu: bool = False
    residual: Buffer | None = None
    cap: float = math.inf


@dataclass(frozen=True, slots=True)
class Conv:
    """One convolution as it was added to a program; ``weight`` (K, C, R, S) and ``bias`` (K) float32.

    Attributes:
        extra: Rows and columns of zeros below and right of the map beyond the layer's padding.
    """

    x: Buffer
    out: Buffer
    layer: LayerSpec
    weight: Floats
    bias: Floats
    kernel: Literal["dense", "block", "csr"]
    epilogue: Epilogue
    block: int
    extra: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Depthwise:
    """A convolution of every channel by itself; ``weight`` (C, 1, R, S) and ``bias`` (C) float32; no residual."""

    x: Buffer
    out: Buffer
    layer: LayerSpec
    weight: Floats
    bias: Floats
    epilogue: Epilogue
    extra: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """``out = min(relu(x · scale + shift + y), cap)``, each part optional, or ``out = curve(x)``.

    Attributes:
        y: Another map of the same size; where ``times``, multiplied instead of added, and it may be 1×1.
        scale, shift: (C) float32.
        slope: Of a leaky curve.
        offset: First channel of ``out`` that is written, a multiple of 16; ``out`` may have more channels than ``x``.
    """

    x: Buffer
    y: Buffer | None
    out: Buffer
    relu: bool = False
    cap: float = math.inf
    times: bool = False
    curve: Curve = Curve.NONE
    slope: float = 0.0
    scale: Floats | None = None
    shift: Floats | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """Maximum or mean over windows; the mean counts padded zeros, as torch does by default, or leaves them out.

    Windows that reach over the far edges, as torch's ceil mode has them, are cut there.
    """

    x: Buffer
    out: Buffer
    window: tuple[int, int]
    stride: int
    padding: int
    mean: bool
    inside: bool = False


Operation = Conv | Depthwise | Elementwise | Pool


def floats(tensor: torch.Tensor) -> Floats:
    """Return a tensor as a float32 array of its own."""
    array: Floats = tensor.detach().to("cpu", torch.float32).contiguous().numpy().copy()
    return array


def check_same(name: str, *buffers: Buffer) -> None:
    """Raise ModelError unless all maps have one size."""
    shapes = [(b.channels, b.height, b.width) for b in buffers]
    if len(set(shapes)) > 1:
        raise ModelError(f"{name}: maps differ in size: {shapes}.")


def check_elementwise(name: str, operation: Elementwise) -> None:
    """Raise ModelError unless the maps' sizes fit together."""
    x, y, out, offset = operation.x, operation.y, operation.out, operation.offset
    if y is not None and not (operation.times and (y.channels, y.height, y.width) == (x.channels, 1, 1)):
        check_same(name, x, y)
    if (x.height, x.width) != (out.height, out.width) or offset + x.channels > out.channels or offset % LANES:
        raise ModelError(f"{name}: maps differ in size: {x} → {out} from channel {offset}, a multiple of {LANES}.")
    if offset + x.channels < out.channels and x.channels % LANES:
        raise ModelError(f"{name}: {x.channels} channels before others must be a multiple of {LANES}.")


def check_conv(conv: Conv | Depthwise) -> None:
    """Raise ModelError unless weight, layer and buffers fit together and a kernel can do it."""
    layer, x, out = conv.layer, conv.x, conv.out
    k, c, *window = conv.weight.shape
    if isinstance(conv, Depthwise):
        c = k
    size = tuple(
        (length + 2 * p + more - d * (w - 1) - 1) // s + 1
        for length, p, more, d, w, s in zip(
            (x.height, x.width), layer.padding, conv.extra, layer.dilation, window, layer.stride, strict=True
        )
    )
    halo = max(p + more for p, more in zip(layer.padding, conv.extra, strict=True))
    problem = None
    if min(conv.extra) < 0 or (layer.groups != 1 and not isinstance(conv, Depthwise)):
        problem = f"{layer.groups} groups, extra padding {conv.extra}; the kernels take 1, and none below 0"
    elif (isinstance(conv, Conv) and conv.kernel not in ("dense", "block", "csr")) or (
        isinstance(conv, Conv) and conv.block not in (LANES, 2 * LANES)
    ):
        problem = f"kernel {conv.kernel!r} with block {conv.block}; known are dense, block, csr with 16 or 32"
    elif (x.channels, out.channels, len(conv.bias)) != (c, k, k) or tuple(window) != layer.window:
        problem = f"weight {conv.weight.shape} and bias ({len(conv.bias)}) do not fit {x.channels} → {out.channels}"
    elif (out.height, out.width) != size or size != layer.output_hw:
        problem = f"output is {out.height}×{out.width}, must be {size}, the layer says {layer.output_hw}"
    elif halo > x.halo:
        problem = f"padding {layer.padding} needs a halo of {halo}; the input has {x.halo}"
    elif x == out:
        problem = "input and output are one buffer"
    if problem is not None:
        raise ModelError(f"layer '{layer.name}': {problem}.")
    if conv.epilogue.residual is not None:
        check_same(f"residual of layer '{layer.name}'", conv.epilogue.residual, out)


def check_pool(pool: Pool) -> None:
    """Raise ModelError unless the output has the size that the windows give."""
    sizes = list(zip((pool.x.height, pool.x.width), pool.window, (pool.out.height, pool.out.width), strict=True))
    size = tuple((length + 2 * pool.padding - window) // pool.stride + 1 for length, window, _ in sizes)
    # In ceil mode one more window may begin inside the map or its left padding.
    cut = not pool.mean or pool.inside
    longer = tuple(
        out if cut and out == least + 1 and least * pool.stride < length + pool.padding else least
        for least, (length, _, out) in zip(size, sizes, strict=True)
    )
    size = longer
    if (pool.out.channels, pool.out.height, pool.out.width) != (pool.x.channels, *size) or pool.x == pool.out:
        want = f"{pool.x.channels}×{size[0]}×{size[1]}"
        raise ModelError(f"pool: {pool.x} → {pool.out}: the output must be another map, of {want}.")
    if 2 * pool.padding > min(pool.window):
        raise ModelError(f"pool: padding {pool.padding} is more than half of the window {pool.window}.")
