"""Convolution of single kept weights: row-tiled SpMM by implicit im2col, and the SDDMM of its weight gradient.

Legend: N images, K filters, C input channels; the input is NCHW with its padding already around it, PX = output pixels
of all images in one list. A program of the forward kernel owns one filter (a *row*) × BN pixels, which lie in the
lanes; it walks the row's weights BK at a time: indices and values are read once for BN pixels, and a channel of
neighbouring pixels is one coalesced read. The same kernel gives the input gradient over the transposed rows. A program
of the gradient kernel owns BK weights of one filter and a share of the pixels.

Source: Sputnik (Gale et al., SC 2020): 1-D tiles, rows swizzled by length, a main loop without masks and a masked
rest. Departures: no reverse-offset alignment (the weights are trained in this order, and scalar reads of an index are
one in eight), and columns are gathered from a feature map instead of read from a matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A code of ``formats.rows`` is channel · 64 + window row · 8 + window column.
_CHANNEL_SHIFT = tl.constexpr(6)
_ROW_SHIFT = tl.constexpr(3)
_TAP_MASK = tl.constexpr(7)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "rows", "biases", "residuals", "floor",
        "pixels", "width", "area", "image_stride", "plane_stride", "line_stride", "pixel_row", "pixel_column",
    ]
)  # fmt: skip
def spmm_forward(  # type: ignore[no-untyped-def]
    x, values, order, row_ptr, code, bias, residual, y,
    rows, biases, residuals, floor,
    pixels, width, area, image_stride, plane_stride, line_stride, pixel_row, pixel_column,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One filter × BN pixels of ``max(conv(x) + bias + residual, floor)``; y and residual are NCHW, contiguous.

    Switched by numbers, so that there is one program to compile: without them ``biases`` and ``residuals`` are 0 and
    ``floor`` is -inf.
    """
    # All filters of a pixel tile run together: they read the same inputs, which then come from the caches.
    row = tl.program_id(0) % rows
    p = tl.program_id(0) // rows * BN + tl.arange(0, BN)
    # Pixels past the end repeat the last one: no masks in the loop, and they are not stored.
    last = tl.minimum(p, pixels - 1)
    image = last // area
    inner = last % area
    corner = image.to(tl.int64) * image_stride + (inner // width) * pixel_row + (inner % width) * pixel_column
    start = tl.load(row_ptr + row)
    stop = tl.load(row_ptr + row + 1)
    whole = start + (stop - start) // BK * BK
    acc = tl.zeros((BN,), dtype=tl.float32)
    for entry in range(start, whole, BK):
        at = entry + tl.arange(0, BK)
        tap = tl.load(code + at)
        weight = tl.load(values + at).to(tl.float32)
        offset = (tap >> _CHANNEL_SHIFT) * plane_stride
        offset += ((tap >> _ROW_SHIFT) & _TAP_MASK) * line_stride + (tap & _TAP_MASK)
        pixel = tl.load(x + corner[None, :] + offset[:, None]).to(tl.float32)
        acc += tl.sum(weight[:, None] * pixel, axis=0)
    if whole < stop:
        at = whole + tl.arange(0, BK)
        live = at < stop
        tap = tl.load(code + at, mask=live, other=0)
        weight = tl.load(values + at, mask=live, other=0.0).to(tl.float32)
        offset = (tap >> _CHANNEL_SHIFT) * plane_stride
        offset += ((tap >> _ROW_SHIFT) & _TAP_MASK) * line_stride + (tap & _TAP_MASK)
        # A weight that is not there must not multiply an infinity: its input is not read.
        pixel = tl.load(x + corner[None, :] + offset[:, None], mask=live[:, None], other=0.0).to(tl.float32)
        acc += tl.sum(weight[:, None] * pixel, axis=0)
    filter = tl.load(order + row)
    acc += tl.load(bias + filter, mask=biases > 0, other=0.0).to(tl.float32)
    cell = (image * rows + filter).to(tl.int64) * area + inner
    inside = p < pixels
    acc += tl.load(residual + cell, mask=inside & (residuals > 0), other=0.0).to(tl.float32)
    acc = tl.maximum(acc, floor, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + cell, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "rows", "chunks", "splits", "entries",
        "pixels", "width", "area", "image_stride", "plane_stride", "line_stride", "pixel_row", "pixel_column",
    ]
)  # fmt: skip
def spmm_dweight(  # type: ignore[no-untyped-def]
    x, dy, order, row_ptr, code, partial,
    rows, chunks, splits, entries,
    pixels, width, area, image_stride, plane_stride, line_stride, pixel_row, pixel_column,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BK weights of a filter: products of input and output gradient summed over every ``splits``-th tile of pixels.

    ``partial`` is (splits, entries) float32; each cell is written by one program, so sums have one order.
    """
    row = tl.program_id(0) % rows
    chunk = tl.program_id(0) // rows % chunks
    split = tl.program_id(0) // rows // chunks
    stop = tl.load(row_ptr + row + 1)
    first = tl.load(row_ptr + row) + chunk * BK
    if first < stop:
        filter = tl.load(order + row)
        at = first + tl.arange(0, BK)
        live = at < stop
        tap = tl.load(code + at, mask=live, other=0)
        offset = (tap >> _CHANNEL_SHIFT) * plane_stride
        offset += ((tap >> _ROW_SHIFT) & _TAP_MASK) * line_stride + (tap & _TAP_MASK)
        acc = tl.zeros((BK, BN), dtype=tl.float32)
        for tile in range(split, tl.cdiv(pixels, BN), splits):
            p = tile * BN + tl.arange(0, BN)
            inside = p < pixels
            image = p // area
            inner = p % area
            corner = image.to(tl.int64) * image_stride + (inner // width) * pixel_row + (inner % width) * pixel_column
            cell = (image * rows + filter).to(tl.int64) * area + inner
            grad = tl.load(dy + cell, mask=inside, other=0.0).to(tl.float32)
            wanted = live[:, None] & inside[None, :]
            pixel = tl.load(x + corner[None, :] + offset[:, None], mask=wanted, other=0.0).to(tl.float32)
            acc += pixel * grad[None, :]
        tl.store(partial + split.to(tl.int64) * entries + at, tl.sum(acc, axis=1), mask=live)
