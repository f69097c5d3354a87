"""Operators of the Block-ELL convolution: ``autoprune::ell_conv``, its backward, ``ell_pad`` and ``ell_repack``.

Each has a fake, a CPU kernel in plain PyTorch (dense, correct, not fast), a CUDA kernel in Triton and, but for the
backward, an autograd formula. Triton is imported when a CUDA kernel first runs. Autocast is applied in ``ell_conv2d``:
``register_autocast`` knows one fixed dtype per device, while a user's autocast may be bfloat16 or float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autoprune.kernels.formats.ell import GROUP, BlockELL, Tile, padded, take_or_zero
from autoprune.kernels.triton.configs import Launch
from autoprune.kernels.triton.shapes import EllShape

_WANT_INPUT, _WANT_WEIGHT = 1, 2


@torch.library.custom_op("autoprune::ell_repack", mutates_args=(), device_types="cpu")
def ell_repack(source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Return ``source.flatten()[index]`` in the index's shape, 0 where the index is ``source.numel()``.

    Args:
        source: Any shape.
        index: int32, for example ``BlockELL.gather_index()``.
        inverse: int32 in the shape of ``source``: where each of its elements went; the way back of the gradient.
    """
    return take_or_zero(source, index)


@ell_repack.register_kernel("cuda")
def _repack_cuda(source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    from autoprune.kernels.triton.copies import launch_take

    return launch_take(source, index)


@ell_repack.register_fake
def _repack_fake(source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return source.new_empty(index.shape)


def _repack_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _repack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return ell_repack(grad, inverse, index), None, None


ell_repack.register_autograd(_repack_backward, setup_context=_repack_setup)


@torch.library.custom_op("autoprune::ell_pad", mutates_args=(), device_types="cpu")
def ell_pad(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return (N, C padded to 8, H + 2·size[0], W + 2·size[1]) with zeros around, in channels-last memory."""
    rows, columns = size
    x_NHWC = x.permute(0, 2, 3, 1)
    return F.pad(x_NHWC, (0, -x.shape[1] % GROUP, columns, columns, rows, rows)).contiguous().permute(0, 3, 1, 2)


@ell_pad.register_kernel("cuda")
def _pad_cuda(x: Tensor, size: Sequence[int]) -> Tensor:
    from autoprune.kernels.triton.ell_run import pad

    return pad(x, (size[0], size[1]))


@ell_pad.register_fake
def _pad_fake(x: Tensor, size: Sequence[int]) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, h + 2 * size[0], w + 2 * size[1], padded(c, GROUP))).permute(0, 3, 1, 2)


def _pad_setup(ctx: Any, inputs: tuple[Tensor, Sequence[int]], output: Tensor) -> None:
    ctx.shape, ctx.size = inputs[0].shape, inputs[1]


def _pad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (_, c, h, w), (rows, columns) = ctx.shape, ctx.size
    return grad[:, :c, rows : rows + h, columns : columns + w], None


ell_pad.register_autograd(_pad_backward, setup_context=_pad_setup)


@torch.library.custom_op("autoprune::ell_conv", mutates_args=(), device_types="cpu")
def ell_conv(
    x: Tensor,
    weight: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    backward: Sequence[Tensor],
    settings: Sequence[int],
) -> Tensor:
    """Return ``relu(conv(x) + bias + residual)`` with its ring, (N, K padded to 8, …) in channels-last memory.

    Args:
        x: (N, C padded to 8, H + 2·halo, W + 2·halo): the halo is constant 0 and gets no gradient.
        weight: (tiles, steps, BK, BN), dtype of ``x``; padding groups must be 0 and get no gradient.
        groups: (tiles, steps, BK / 8) int32 codes.
        bias: (K,).
        residual: (N, K padded to 8, P, Q), dtype of ``x``.
        backward: Empty, [scatter index], or [scatter index, transposed codes, transposed index] (``ELLLayout``).
        settings: ``EllShape.integers + Launch.integers``.
    """
    shape = EllShape.read(settings)
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    with torch.autocast("cpu", enabled=False):
        dense = _unpack(weight, groups, shape).to(dtype)
        y = F.conv2d(x[:, : shape.channels].to(dtype), dense, None if bias is None else bias.to(dtype), shape.stride)
    if residual is not None:
        y = y + residual[:, : shape.filters].to(dtype)
    if shape.relu:
        y = y.relu()
    out = x.new_zeros(shape.out_shape(x.shape))
    _inside(out.permute(0, 3, 1, 2), shape)[:, : shape.filters] = y
    return out.permute(0, 3, 1, 2)


@ell_conv.register_kernel("cuda")
def _conv_cuda(
    x: Tensor,
    weight: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    backward: Sequence[Tensor],
    settings: Sequence[int],
) -> Tensor:
    from autoprune.kernels.triton.ell_run import forward

    return forward(x, weight, groups, bias, residual, EllShape.read(settings), Launch.read(settings))


@ell_conv.register_fake
def _conv_fake(
    x: Tensor,
    weight: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    backward: Sequence[Tensor],
    settings: Sequence[int],
) -> Tensor:
    return x.new_empty(EllShape.read(settings).out_shape(x.shape)).permute(0, 3, 1, 2)


@torch.library.custom_op("autoprune::ell_conv_backward", mutates_args=(), device_types="cpu")
def ell_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    groups: Tensor,
    backward: Sequence[Tensor],
    settings: Sequence[int],
    wanted: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` (0 in its halo) and of the packed weight; an unwanted one is empty.

    Args:
        dy: (N, K padded to 8, P, Q), gradient before the rectifier, without ring.
        x, weight, groups, backward, settings: As given to ``ell_conv``.
        wanted: 1 for ``x`` + 2 for the weight.
    """
    shape = EllShape.read(settings)
    k, c, (rows, columns) = shape.filters, shape.channels, shape.halo
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    pack = BlockELL((k, c, *shape.window), Tile(int(weight.shape[3]), int(weight.shape[2])), weight, groups)
    inner = x[:, :c, rows : x.shape[2] - rows, columns : x.shape[3] - columns].to(dtype)
    with torch.autocast("cpu", enabled=False):
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy[:, :k].to(dtype), inner, pack.unpack().to(dtype), None, shape.stride, shape.halo, (1, 1),
            False, (0, 0), 1, (bool(wanted & _WANT_INPUT), bool(wanted & _WANT_WEIGHT), False),
        )  # fmt: skip
    full, packed = x.new_empty(0), x.new_empty(0)
    if wanted & _WANT_INPUT:
        full = ell_pad(dx.to(x.dtype), shape.halo)
    if wanted & _WANT_WEIGHT:
        packed = pack.with_weight(dw.to(x.dtype)).weight
    return full, packed


@ell_conv_backward.register_kernel("cuda")
def _conv_backward_cuda(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    groups: Tensor,
    backward: Sequence[Tensor],
    settings: Sequence[int],
    wanted: int,
) -> tuple[Tensor, Tensor]:
    from autoprune.kernels.triton import ell_run as run

    shape, launch = EllShape.read(settings), Launch.read(settings)
    dx, dw = x.new_empty(0), x.new_empty(0)
    if wanted & _WANT_INPUT:
        if len(backward) == 3 and shape.stride == (1, 1):
            dx = run.input_gradient(dy, x.shape, weight, (backward[1], backward[2]), shape, launch)
        else:
            dense = run.dense_weight(weight, groups, backward[0] if backward else None, shape)
            with torch.autocast("cuda", enabled=False):
                dx = run.dense_input_gradient(dy, x.shape, dense, shape)
    if wanted & _WANT_WEIGHT:
        dw = run.weight_gradient(dy, x, groups, run.tile_of(weight), shape, launch)
    return dx, dw


@ell_conv_backward.register_fake
def _conv_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    groups: Tensor,
    backward: Sequence[Tensor],
    settings: Sequence[int],
    wanted: int,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    dx = x.new_empty((n, h, w, c)).permute(0, 3, 1, 2) if wanted & _WANT_INPUT else x.new_empty(0)
    return dx, weight.new_empty(weight.shape) if wanted & _WANT_WEIGHT else x.new_empty(0)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, groups, bias, _, backward, settings = inputs
    ctx.settings, ctx.extra = settings, len(backward)
    ctx.bias_dtype = None if bias is None else bias.dtype
    relu = EllShape.read(settings).relu
    ctx.save_for_backward(x, weight, groups, *backward, *([output] if relu else []))


def _conv_autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    shape = EllShape.read(ctx.settings)
    x, weight, groups, *rest = ctx.saved_tensors
    backward = rest[: ctx.extra]
    dy = _inside(dout, shape)
    if shape.relu:
        dy = torch.ops.aten.threshold_backward(dy, _inside(rest[-1], shape), 0)
    need_x, need_weight, _, need_bias, need_residual = ctx.needs_input_grad[:5]
    dx = dw = dbias = None
    if need_x or need_weight:
        wanted = _WANT_INPUT * need_x + _WANT_WEIGHT * need_weight
        dx, dw = ell_conv_backward(dy, x, weight, groups, backward, ctx.settings, wanted)
    if need_bias:
        sums = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32))
        dbias = sums[: shape.filters].to(ctx.bias_dtype)
    return (
        dx if need_x else None, dw if need_weight else None, None, dbias, dy if need_residual else None,
        [None] * ctx.extra, None,
    )  # fmt: skip


ell_conv.register_autograd(_conv_autograd, setup_context=_conv_setup)


def _inside(out: Tensor, shape: EllShape) -> Tensor:
    rows, columns = shape.ring
    return out[:, :, rows : out.shape[2] - rows, columns : out.shape[3] - columns]


def _unpack(weight: Tensor, groups: Tensor, shape: EllShape) -> Tensor:
    tile = Tile(int(weight.shape[3]), int(weight.shape[2]))
    return BlockELL((shape.filters, shape.channels, *shape.window), tile, weight, groups).unpack()
