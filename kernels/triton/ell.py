"""Block-ELL implicit-GEMM convolution: the forward kernel and its launch.

Legend: N images, H × W input with its halo, P × Q output, C input and K output channels (both padded to 8), R × S
window. A program owns BM output pixels × BN filters and walks the equal-length list of its filter tile: each step
multiplies BM × BK gathered inputs by BK × BN packed weights. A BK is BK / 8 groups of 8 channels, each with its own
tap. Sizes ending in ``8`` count in units of 8 elements: multiplied by 8 inside the kernel they let the compiler prove
16-byte alignment without specialising on any size, so one binary serves all layers.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoprune.core.errors import ModelError
from autoprune.kernels.formats.ell import CHANNEL_BITS, GROUP, TAP_BITS
from autoprune.kernels.triton.configs import Config
from autoprune.kernels.triton.launching import launch
from autoprune.kernels.triton.shapes import EllShape, cdiv

_SWIZZLE = 8
_CHANNEL_BITS = tl.constexpr(CHANNEL_BITS)
_CHANNEL_MASK = tl.constexpr((1 << CHANNEL_BITS) - 1)
_TAP_BITS = tl.constexpr(TAP_BITS)
_TAP_MASK = tl.constexpr((1 << TAP_BITS) - 1)
_GROUP_SWIZZLE = tl.constexpr(_SWIZZLE)
_INT32_MAX = 2**31 - 1


@triton.jit
def tap_offset8(code, x_h8, x_w8):  # type: ignore[no-untyped-def]
    """Distance from a pixel's first input element to a group of channels, in units of 8 elements."""
    column = (code >> _CHANNEL_BITS) & _TAP_MASK
    row = (code >> (_CHANNEL_BITS + _TAP_BITS)) & _TAP_MASK
    return (code & _CHANNEL_MASK) + column * x_w8 + row * x_h8


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "pixels", "last", "out_h", "out_w", "biases", "residuals", "k8", "steps", "tiles",
        "x_n8", "x_h8", "x_w8", "pixel_h8", "pixel_w8",
        "res_n8", "res_h8", "res_w8", "out_n8", "out_h8", "out_w8", "ring_h", "ring_w", "floor",
    ]
)  # fmt: skip
def ell_forward(  # type: ignore[no-untyped-def]
    x, weight, groups, bias, residual, out,
    pixels, last, out_h, out_w, biases, residuals, k8, steps, tiles,
    x_n8, x_h8, x_w8, pixel_h8, pixel_w8,
    res_n8, res_h8, res_w8,
    out_n8, out_h8, out_w8, ring_h, ring_w, floor,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One BM × BN tile of ``max(conv(x, weight) + bias + residual, floor)``, and the ring around its border pixels.

    Bias, residual and rectifier are switched by numbers, not by variants: every variant is one more program to compile
    and to keep free of spills. Without them ``biases`` and ``residuals`` are 0 and ``floor`` is -inf.
    """
    # All filter tiles of 8 pixel tiles run together: they read the same inputs, which then come from the L2 cache.
    program = tl.program_id(0)
    first = program // (_GROUP_SWIZZLE * tiles) * _GROUP_SWIZZLE
    rows = tl.minimum(tl.cdiv(pixels, BM) - first, _GROUP_SWIZZLE)
    inside_group = program % (_GROUP_SWIZZLE * tiles)
    tile_m = first + inside_group % rows
    tile_n = inside_group // rows

    m = tile_m * BM + tl.arange(0, BM)
    # Pixels past the end repeat the last one: no masks in the loop, and they are not stored.
    pixel = tl.minimum(m, pixels - 1)
    q = pixel % out_w
    p = pixel // out_w % out_h
    n = pixel // out_w // out_h
    x_rows = x + (n * x_n8 + p * pixel_h8 + q * pixel_w8).to(tl.int64) * 8

    k = tile_n * BN + tl.arange(0, BN)
    live = (m < pixels)[:, None] & (k < k8 * 8)[None, :]
    if ring_h + ring_w > 0:  # written first: after the loop its addresses would stand beside the sums
        corner = out + (n * out_n8 + (p + ring_h) * out_h8 + (q + ring_w) * out_w8).to(tl.int64) * 8
        zero = tl.zeros((BM, BN), dtype=out.dtype.element_ty)
        for dy in range(-ring_h, ring_h + 1):
            for dx in range(-ring_w, ring_w + 1):
                # A border pixel owns the ring cells outside it, a corner pixel also those outside the corner.
                row = (dy == 0) | ((dy < 0) & (p == 0)) | ((dy > 0) & (p == out_h - 1))
                column = (dx == 0) | ((dx < 0) & (q == 0)) | ((dx > 0) & (q == out_w - 1))
                owned = row & column & ((dy != 0) | (dx != 0))
                cell = corner + (dy * out_h8 + dx * out_w8) * 8
                tl.store(cell[:, None] + k[None, :], zero, mask=live & owned[:, None])

    kk = tl.arange(0, BK)
    list_start = tile_n * steps
    group_ptr = groups + kk // 8
    weight_ptr = weight + (list_start * (BK * BN) + kk[:, None] * BN + tl.arange(0, BN)[None, :])
    acc = tl.zeros((BM, BN), dtype=tl.float32) + tl.load(bias + k, mask=k < biases, other=0.0)[None, :]
    # The next index is carried through the loop: loaded where it is used, it would halve the pipeline.
    code = tl.load(group_ptr + list_start * (BK // 8))
    for step in range(0, steps):
        following = tl.load(group_ptr + (list_start + tl.minimum(step + 1, steps - 1)) * (BK // 8))
        offset = tap_offset8(code, x_h8, x_w8) * 8 + kk % 8
        a = tl.load(x_rows[:, None] + offset[None, :])
        b = tl.load(weight_ptr)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        weight_ptr += BK * BN
        code = following

    # Decoded again from another argument: kept through the loop, the rows' positions would cost registers.
    pixel = tl.minimum(m, last)
    q = pixel % out_w
    p = pixel // out_w % out_h
    n = pixel // out_w // out_h
    # Rounded before the residual is added, as an addition of its own would be: half the registers to exchange.
    y = acc.to(out.dtype.element_ty).to(tl.float32)
    cells = residual + ((n * res_n8 + p * res_h8 + q * res_w8).to(tl.int64) * 8)[:, None] + k[None, :]
    y += tl.load(cells, mask=live & (residuals > 0), other=0.0).to(tl.float32)
    y = tl.maximum(y, floor, propagate_nan=tl.PropagateNan.ALL).to(out.dtype.element_ty)
    cells = out + ((n * out_n8 + (p + ring_h) * out_h8 + (q + ring_w) * out_w8).to(tl.int64) * 8)[:, None] + k[None, :]
    tl.store(cells, y, mask=live)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current one: Triton launches on that. Nothing to do on a CPU (interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def strides8(x_NHWC: Tensor) -> tuple[int, int, int]:
    """Return the strides of images, rows and columns in units of 8 elements; of a size of 1 always 0."""
    sizes = zip(x_NHWC.shape[:3], x_NHWC.stride()[:3], strict=True)
    image, row, column = (0 if size == 1 else stride // GROUP for size, stride in sizes)
    return image, row, column


def is_readable(x_NHWC: Tensor) -> bool:
    """Return whether kernels can read a map as it lies: channels adjacent, every pixel on a 16-byte boundary."""
    strides = [stride for size, stride in zip(x_NHWC.shape[:3], x_NHWC.stride()[:3], strict=True) if size > 1]
    aligned = x_NHWC.shape[3] % GROUP == 0 and x_NHWC.data_ptr() % 16 == 0
    return aligned and x_NHWC.stride(3) == 1 and all(stride % GROUP == 0 for stride in strides)


def check_size(*maps: Tensor) -> None:
    """Refuse maps whose positions, in units of 8 elements, leave 32 bits.

    Raises:
        ModelError: Naming the size.
    """
    for tensor in maps:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if last // GROUP > _INT32_MAX:
            raise ModelError(f"a map of shape {tuple(tensor.shape)} is too large for one launch; use a smaller batch.")


def launch_forward(
    x_NHWC: Tensor,
    weight: Tensor,
    groups: Tensor,
    out_NHWC: Tensor,
    shape: EllShape,
    config: Config,
    *,
    bias: Tensor | None = None,
    residual_NHWC: Tensor | None = None,
) -> None:
    """Write ``relu(conv(x) + bias + residual)`` and its zero ring into ``out``.

    Args:
        x_NHWC: (N, H + 2·halo, W + 2·halo, C) with its halo, readable (``is_readable``).
        weight: (tiles, steps, BK, BN) in the dtype of ``x``.
        groups: (tiles, steps, BK / 8) int32 codes.
        out_NHWC: (N, P + 2·ring, Q + 2·ring, K padded to 8), contiguous, any content.
        shape: Geometry; must fit the tensors.
        config: Forward configuration with the tile of the pack.
        bias: (K,) any float dtype.
        residual_NHWC: (N, P, Q, K padded to 8), readable.
    """
    tiles, steps = groups.shape[:2]
    out_h, out_w = shape.out_hw(x_NHWC.shape[1], x_NHWC.shape[2])
    pixels = x_NHWC.shape[0] * out_h * out_w
    check_size(x_NHWC, out_NHWC)
    image, row, column = strides8(x_NHWC)
    residual = (0, 0, 0) if residual_NHWC is None else strides8(residual_NHWC)
    # Without a bias nothing is read there, but the pointer must be one to float32.
    bias_ptr = groups.view(torch.float32) if bias is None else bias.float().contiguous()
    biases, k8 = 0 if bias is None else shape.filters, out_NHWC.shape[3] // GROUP
    with on_device(x_NHWC):
        launch(
            ell_forward, (cdiv(pixels, config.bm) * tiles,),
            x_NHWC, weight, groups, bias_ptr, out_NHWC if residual_NHWC is None else residual_NHWC, out_NHWC,
            pixels, pixels - 1, out_h, out_w, biases, int(residual_NHWC is not None), k8, steps, tiles,
            image, row, column, shape.stride[0] * row, shape.stride[1] * column,
            *residual, *(s // GROUP for s in out_NHWC.stride()[:3]), *shape.ring, 0.0 if shape.relu else -math.inf,
            BM=config.bm, BN=config.bn, BK=config.bk,
            **config.options,
        )  # fmt: skip
