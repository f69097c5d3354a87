"""Weight gradient of the Block-ELL convolution at the packed places only; deterministic.

A program owns BM rows of one filter tile's list (all kept taps in them share its output-gradient tile) and one part of
the pixels. Parts go to a workspace that a second kernel adds up in a fixed order: no atomics. The input gradient at
stride 1 needs no kernel of its own: it is ``ell_forward`` on the transposed pack.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoprune.kernels.formats.ell import GROUP, PADDING
from autoprune.kernels.triton.configs import COMPILER, Config, pixel_parts
from autoprune.kernels.triton.ell import check_size, on_device, strides8, tap_offset8
from autoprune.kernels.triton.launching import launch
from autoprune.kernels.triton.shapes import EllShape, cdiv

_PADDING = tl.constexpr(PADDING)
_REDUCE_BLOCK = 1024


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "pixels", "out_h", "out_w", "k8", "list8", "tiles", "row_blocks", "turns", "x_h8", "x_w8",
        "pixel_n8", "pixel_h8", "pixel_w8", "step_n", "step_h", "step_w",
    ]
)  # fmt: skip
def ell_dweight(  # type: ignore[no-untyped-def]
    x, dy, groups, workspace,
    pixels, out_h, out_w, k8, list8, tiles, row_blocks, turns,
    x_h8, x_w8, pixel_n8, pixel_h8, pixel_w8, step_n, step_h, step_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum over one part of the pixels of ``x[pixel, list row] · dy[pixel, filter]`` for BM list rows × BN filters."""
    program = tl.program_id(0)
    # Programs of one part follow each other: they read the same pixels.
    part = program // (tiles * row_blocks)
    tile_n = program % (tiles * row_blocks) // row_blocks
    row = program % row_blocks * BM + tl.arange(0, BM)
    inside = row < list8 * 8
    code = tl.load(groups + tile_n * list8 + row // 8, mask=inside, other=0)
    offset = tap_offset8(code, x_h8, x_w8) * 8 + row % 8

    pixel = part * turns * BK + tl.arange(0, BK)
    q = pixel % out_w
    p = pixel // out_w % out_h
    base8 = pixel // out_w // out_h * pixel_n8 + p * pixel_h8 + q * pixel_w8
    k = tile_n * BN + tl.arange(0, BN)
    column = (k < k8 * 8)[None, :]
    dy_ptr = dy + (pixel.to(tl.int64) * k8 * 8)[:, None] + k[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, turns):
        live = pixel < pixels
        # Pixels past the end read the first one: finite, and multiplied by a gradient of 0.
        start8 = tl.where(live, base8, 0)
        a = tl.load(x + (start8.to(tl.int64) * 8)[:, None] + offset[None, :])
        g = tl.load(dy_ptr, mask=live[:, None] & column, other=0.0)
        acc = tl.dot(tl.trans(a), g, acc, input_precision="ieee")
        dy_ptr += BK * k8 * 8
        # BK pixels on, as images, rows and columns with carries: cheaper than three divisions.
        pixel += BK
        q += step_w
        carry_q = (q >= out_w).to(tl.int32)
        q -= carry_q * out_w
        p += step_h + carry_q
        carry_p = (p >= out_h).to(tl.int32)
        p -= carry_p * out_h
        base8 += step_n * pixel_n8 + step_h * pixel_h8 + step_w * pixel_w8
        base8 += carry_q * (pixel_h8 - out_w * pixel_w8) + carry_p * (pixel_n8 - out_h * pixel_h8)
    entry = (part * tiles + tile_n).to(tl.int64) * list8 * (8 * BN)
    nn = tl.arange(0, BN)
    tl.store(workspace + entry + row[:, None] * BN + nn[None, :], acc, mask=inside[:, None])


@triton.jit(do_not_specialize=["total", "parts"])  # type: ignore[untyped-decorator]
def ell_reduce(workspace, groups, out, total, parts, BN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the parts in order; padding groups get a gradient of 0."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    source = workspace + place
    for _ in range(0, parts):
        acc += tl.load(source, mask=inside, other=0.0)
        source += total
    code = tl.load(groups + place // (8 * BN), mask=inside, other=0)
    acc = tl.where(code < _PADDING, acc, 0.0)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


def launch_dweight(
    x_NHWC: Tensor, dy_NHWC: Tensor, groups: Tensor, shape: EllShape, config: Config, processors: int
) -> Tensor:
    """Return the gradient of the packed weight, (tiles, steps, BK, BN) in the dtype of ``dy``.

    Args:
        x_NHWC: (N, H + 2·halo, W + 2·halo, C) with its halo, readable.
        dy_NHWC: (N, P, Q, K padded to 8) without ring, contiguous.
        groups: (tiles, steps, BK / 8) int32 codes.
        shape: Geometry.
        config: A ``dweight`` configuration with the pack's filters.
        processors: Multiprocessors of the device; with the shape they fix the number of parts, and so the result.
    """
    tiles, steps, per_step = groups.shape
    images, out_h, out_w, filters = dy_NHWC.shape
    pixels, list8 = images * out_h * out_w, steps * per_step
    row_blocks = cdiv(list8 * GROUP, config.bm)
    parts = pixel_parts(pixels, tiles * row_blocks, config, processors)
    turns = cdiv(cdiv(pixels, config.bk), parts)
    parts = cdiv(pixels, turns * config.bk)
    check_size(x_NHWC, dy_NHWC)
    image, row, column = strides8(x_NHWC)
    steps_nhw = (config.bk // (out_h * out_w), config.bk // out_w % out_h, config.bk % out_w)
    total = tiles * list8 * GROUP * config.bn
    workspace = torch.empty((parts, total), dtype=torch.float32, device=x_NHWC.device)
    gradient = torch.empty((tiles, steps, per_step * GROUP, config.bn), dtype=dy_NHWC.dtype, device=x_NHWC.device)
    with on_device(x_NHWC):
        launch(
            ell_dweight, (parts * tiles * row_blocks,),
            x_NHWC, dy_NHWC, groups, workspace,
            pixels, out_h, out_w, filters // GROUP, list8, tiles, row_blocks, turns,
            row, column, image, shape.stride[0] * row, shape.stride[1] * column, *steps_nhw,
            BM=config.bm, BN=config.bn, BK=config.bk, **config.options,
        )  # fmt: skip
        launch(
            ell_reduce, (cdiv(total, _REDUCE_BLOCK),),
            workspace, groups, gradient, total, parts, BN=config.bn, BLOCK=_REDUCE_BLOCK, **COMPILER,
        )  # fmt: skip
    return gradient
