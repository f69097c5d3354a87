"""Copies around the Block-ELL kernels: a map into its halo, a weight into its pack."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoprune.kernels.formats.ell import GROUP
from autoprune.kernels.triton.configs import COMPILER
from autoprune.kernels.triton.ell import check_size, on_device, strides8
from autoprune.kernels.triton.launching import launch
from autoprune.kernels.triton.shapes import cdiv

_PIXELS = 32
_TAKE_BLOCK = 1024


@triton.jit(do_not_specialize=["cells", "rows", "columns", "c8", "pad_h", "pad_w", "x_n8", "x_h8", "x_w8"])  # type: ignore[untyped-decorator]
def pad_map(  # type: ignore[no-untyped-def]
    x, out, cells, rows, columns, c8, pad_h, pad_w, x_n8, x_h8, x_w8, BP: tl.constexpr, BC: tl.constexpr
):
    """Copy BP cells × BC channels of a map with its halo; the halo is written as zeros."""
    blocks = tl.cdiv(c8 * 8, BC)
    program = tl.program_id(0)
    cell = program // blocks * BP + tl.arange(0, BP)
    c = program % blocks * BC + tl.arange(0, BC)
    column = cell % columns - pad_w
    row = cell // columns % rows - pad_h
    image = cell // columns // rows
    inside = (row >= 0) & (row < rows - 2 * pad_h) & (column >= 0) & (column < columns - 2 * pad_w)
    live = (cell < cells)[:, None] & (c < c8 * 8)[None, :]
    source = x + ((image * x_n8 + row * x_h8 + column * x_w8).to(tl.int64) * 8)[:, None] + c[None, :]
    value = tl.load(source, mask=live & inside[:, None], other=0.0)
    tl.store(out + (cell.to(tl.int64) * c8 * 8)[:, None] + c[None, :], value, mask=live)


@triton.jit(do_not_specialize=["count", "size"])  # type: ignore[untyped-decorator]
def take(source, index, out, count, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``out[i] = source[index[i]]``, or 0 where the index is ``size``."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = tl.load(index + place, mask=place < count, other=0)
    value = tl.load(source + where, mask=(place < count) & (where < size), other=0.0)
    tl.store(out + place, value, mask=place < count)


def launch_pad(x_NHWC: Tensor, pad: tuple[int, int]) -> Tensor:
    """Return a contiguous copy of a readable (N, H, W, C) map with ``pad`` rows and columns of zeros on each side."""
    images, height, width, channels = x_NHWC.shape
    rows, columns = height + 2 * pad[0], width + 2 * pad[1]
    out = torch.empty((images, rows, columns, channels), dtype=x_NHWC.dtype, device=x_NHWC.device)
    check_size(x_NHWC, out)
    cells, block = images * rows * columns, min(128, triton.next_power_of_2(channels))
    with on_device(x_NHWC):
        launch(
            pad_map, (cdiv(cells, _PIXELS) * cdiv(channels, block),),
            x_NHWC, out, cells, rows, columns, channels // GROUP, *pad, *strides8(x_NHWC),
            BP=_PIXELS, BC=block, **COMPILER,
        )  # fmt: skip
    return out


def launch_take(source: Tensor, index: Tensor) -> Tensor:
    """Return ``source.flatten()[index]`` in the index's shape, 0 where the index is ``source.numel()``; one kernel."""
    source, index = source.contiguous(), index.contiguous()
    out = torch.empty(index.shape, dtype=source.dtype, device=source.device)
    with on_device(source):
        launch(
            take, (cdiv(index.numel(), _TAKE_BLOCK),),
            source, index, out, index.numel(), source.numel(), BLOCK=_TAKE_BLOCK, **COMPILER,
        )  # fmt: skip
    return out
