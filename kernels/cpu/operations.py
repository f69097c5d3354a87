"""The operations a program can hold, and what must be true of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.memory import Buffer
from autoprune.kernels.cpu.shapes import LANES

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What follows the sums: ``relu(conv + bias + residual)``, each part optional."""

    relu: bool = False
    residual: Buffer | None = None


@dataclass(frozen=True, slots=True)
class Conv:
    """One convolution as it was added to a program; ``weight`` (K, C, R, S) and ``bias`` (K) float32."""

    x: Buffer
    out: Buffer
    layer: LayerSpec
    weight: Floats
    bias: Floats
    kernel: Literal["dense", "block", "csr"]
    epilogue: Epilogue
    block: int


@dataclass(frozen=True, slots=True)
class Elementwise:
    """``out = x + y``, or a copy without ``y``, rectified if ``relu``."""

    x: Buffer
    y: Buffer | None
    out: Buffer
    relu: bool


@dataclass(frozen=True, slots=True)
class Pool:
    """Maximum or mean over windows; the mean counts padded zeros, as torch does by default."""

    x: Buffer
    out: Buffer
    window: tuple[int, int]
    stride: int
    padding: int
    mean: bool


Operation = Conv | Elementwise | Pool


def floats(tensor: torch.Tensor) -> Floats:
    """Return a tensor as a float32 array of its own."""
    array: Floats = tensor.detach().to("cpu", torch.float32).contiguous().numpy().copy()
    return array


def check_same(name: str, *buffers: Buffer) -> None:
    """Raise ModelError unless all maps have one size."""
    shapes = [(b.channels, b.height, b.width) for b in buffers]
    if len(set(shapes)) > 1:
        raise ModelError(f"{name}: maps differ in size: {shapes}.")


def check_conv(conv: Conv) -> None:
    """Raise ModelError unless weight, layer and buffers fit together and a kernel can do it."""
    layer, x, out = conv.layer, conv.x, conv.out
    k, c, *window = conv.weight.shape
    size = tuple(
        (length + 2 * p - d * (w - 1) - 1) // s + 1
        for length, p, d, w, s in zip(
            (x.height, x.width), layer.padding, layer.dilation, window, layer.stride, strict=True
        )
    )
    problem = None
    if layer.groups != 1:
        problem = f"{layer.groups} groups; the kernels take 1"
    elif conv.kernel not in ("dense", "block", "csr") or conv.block not in (LANES, 2 * LANES):
        problem = f"kernel {conv.kernel!r} with block {conv.block}; known are dense, block, csr with 16 or 32"
    elif (x.channels, out.channels, len(conv.bias)) != (c, k, k) or tuple(window) != layer.window:
        problem = f"weight {conv.weight.shape} and bias ({len(conv.bias)}) do not fit {x.channels} → {out.channels}"
    elif (out.height, out.width) != size or size != layer.output_hw:
        problem = f"output is {out.height}×{out.width}, must be {size}, the layer says {layer.output_hw}"
    elif max(layer.padding) > x.halo:
        problem = f"padding {layer.padding} needs a halo of {max(layer.padding)}; the input has {x.halo}"
    elif x == out:
        problem = "input and output are one buffer"
    if problem is not None:
        raise ModelError(f"layer '{layer.name}': {problem}.")
    if conv.epilogue.residual is not None:
        check_same(f"residual of layer '{layer.name}'", conv.epilogue.residual, out)


def check_pool(pool: Pool) -> None:
    """Raise ModelError unless the output has the size that the windows give."""
    size = tuple(
        (length + 2 * pool.padding - window) // pool.stride + 1
        for length, window in zip((pool.x.height, pool.x.width), pool.window, strict=True)
    )
    if (pool.out.channels, pool.out.height, pool.out.width) != (pool.x.channels, *size) or pool.x == pool.out:
        want = f"{pool.x.channels}×{size[0]}×{size[1]}"
        raise ModelError(f"pool: {pool.x} → {pool.out}: the output must be another map, of {want}.")
    if 2 * pool.padding > min(pool.window):
        raise ModelError(f"pool: padding {pool.padding} is more than half of the window {pool.window}.")
