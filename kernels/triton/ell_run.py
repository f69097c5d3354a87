"""Block-ELL convolution and its gradients from tensors to tensors, on the Triton kernels.

Runs on a GPU, and on CPU tensors in a process with ``TRITON_INTERPRET=1``. Nothing here waits for the device, reads a
value back from it or depends on one, and memory comes from PyTorch's allocator: all of it can be captured in a CUDA
graph after one warm-up call, which compiles the kernels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from autoprune.kernels.formats.ell import GROUP, BlockELL, Tile, padded
from autoprune.kernels.triton.configs import Launch, Work
from autoprune.kernels.triton.copies import launch_pad, launch_take
from autoprune.kernels.triton.ell import is_readable, launch_forward
from autoprune.kernels.triton.ell_backward import launch_dweight
from autoprune.kernels.triton.shapes import EllShape

_INTERPRETED_PROCESSORS = 4


def tile_of(weight: Tensor) -> Tile:
    """Return the tile of a packed weight, (tiles, steps, BK, BN)."""
    return Tile(int(weight.shape[3]), int(weight.shape[2]))


def readable(x_NHWC: Tensor) -> Tensor:
    """Return a map that kernels can read: itself, or a contiguous copy with channels padded by zeros."""
    if is_readable(x_NHWC):
        return x_NHWC
    channels = x_NHWC.shape[3]
    if channels % GROUP == 0:
        dense = x_NHWC.contiguous()
        return dense if is_readable(dense) else dense.clone()
    copy = x_NHWC.new_zeros((*x_NHWC.shape[:3], padded(channels, GROUP)))
    copy[..., :channels] = x_NHWC
    return copy


def pad(x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (N, C padded to 8, H + 2·rows, W + 2·columns) with a halo of zeros, in channels-last memory."""
    return launch_pad(readable(x_NCHW.permute(0, 2, 3, 1)), size).permute(0, 3, 1, 2)


def forward(
    x: Tensor,
    weight: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shape: EllShape,
    launch: Launch,
) -> Tensor:
    """Return ``relu(conv(x) + bias + residual)`` with its ring, (N, K padded to 8, P + 2·ring, Q + 2·ring).

    Args:
        x: (N, C padded to 8, H + 2·halo, W + 2·halo) with its halo of zeros.
        weight, groups: Of a ``BlockELL``, the weight in the dtype of ``x``.
        bias: (K,).
        residual: (N, K padded to 8, P, Q).
        shape, launch: Geometry, and configurations where the defaults shall not be used.
    """
    x_NHWC = readable(x.permute(0, 2, 3, 1))
    out = torch.empty(shape.out_shape(x.shape), dtype=x.dtype, device=x.device)
    pixels = x.shape[0] * (out.shape[1] - 2 * shape.ring[0]) * (out.shape[2] - 2 * shape.ring[1])
    work = Work(pixels, shape.filters, x.dtype, processors(x.device))
    config = launch.choose("forward", tile_of(weight), work)
    added = None if residual is None else readable(residual.permute(0, 2, 3, 1))
    weight, groups = weight.contiguous(), groups.contiguous()
    launch_forward(x_NHWC, weight, groups, out, shape, config, bias=bias, residual_NHWC=added)
    return out.permute(0, 3, 1, 2)


def input_gradient(
    dy: Tensor, x_shape: torch.Size, weight: Tensor, transposed: tuple[Tensor, Tensor], shape: EllShape, launch: Launch
) -> Tensor:
    """Return the gradient of ``x`` at stride 1, zero in the halo; shape of ``x``.

    Args:
        dy: (N, K padded to 8, P, Q) without ring.
        x_shape: Of the forward's input.
        weight: The forward's packed weight.
        transposed: Codes of the transposed pack, and its index into the flattened ``weight``.
        shape, launch: Of the forward.
    """
    # A padding beyond R - 1 only adds outputs that see nothing but zeros: their gradient is cut off.
    margins = [size - 1 - halo for size, halo in zip(shape.window, shape.halo, strict=True)]
    rows, columns = (slice(max(0, -m), None if m >= 0 else m) for m in margins)
    padding = max(0, margins[0]), max(0, margins[1])
    dy = dy[:, :, rows, columns]
    dy_padded = pad(dy, padding) if max(padding) else dy
    back = EllShape(shape.channels, shape.filters, shape.window, halo=padding, ring=shape.halo)
    groups, index = transposed
    into = Launch(forward=launch.dinput)
    return forward(dy_padded, launch_take(weight, index), groups, None, None, back, into)


def dense_input_gradient(dy: Tensor, x_shape: torch.Size, weight_KCRS: Tensor, shape: EllShape) -> Tensor:
    """Return the gradient of ``x`` by the vendor's dense kernel, zero in the halo; any stride; shape of ``x``.

    Args:
        dy: (N, K padded to 8, P, Q) without ring.
        x_shape: Of the forward's input.
        weight_KCRS: Unpacked weight, zeros where pruned.
        shape: Of the forward.
    """
    halo_h, halo_w = shape.halo
    inner = (x_shape[0], shape.channels, x_shape[2] - 2 * halo_h, x_shape[3] - 2 * halo_w)
    weight = weight_KCRS.contiguous(memory_format=torch.channels_last)
    grad = dy[:, : shape.filters]
    dx: Tensor = conv2d_input(inner, weight, grad, shape.stride, shape.halo)  # type: ignore[no-untyped-call]
    if max(shape.halo) or inner[1] % GROUP:
        return pad(dx, shape.halo)
    return dx.contiguous(memory_format=torch.channels_last)


def weight_gradient(dy: Tensor, x: Tensor, groups: Tensor, tile: Tile, shape: EllShape, launch: Launch) -> Tensor:
    """Return the gradient of the packed weight, (tiles, steps, BK, BN); padding groups get 0.

    Args:
        dy: (N, K padded to 8, P, Q) without ring.
        x: The forward's input.
        groups, tile: Of the forward's pack.
        shape, launch: Of the forward.
    """
    dy_NHWC = dy.permute(0, 2, 3, 1).contiguous()
    pixels = dy_NHWC.shape[0] * dy_NHWC.shape[1] * dy_NHWC.shape[2]
    work = Work(pixels, shape.filters, x.dtype, processors(x.device))
    config = launch.choose("dweight", tile, work)
    return launch_dweight(readable(x.permute(0, 2, 3, 1)), dy_NHWC, groups, shape, config, work.processors)


def dense_weight(weight: Tensor, groups: Tensor, scatter: Tensor | None, shape: EllShape) -> Tensor:
    """Return the (K, C, R, S) weight: one gather by the scatter index, or through the codes without one."""
    if scatter is not None:
        return launch_take(weight, scatter)
    dense = (shape.filters, shape.channels, *shape.window)
    return BlockELL(dense, tile_of(weight), weight, groups).unpack()


def processors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    return _multiprocessors(device) if device.type == "cuda" else _INTERPRETED_PROCESSORS


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
