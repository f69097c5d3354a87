"""``autoprune::sparse_conv``: a convolution of kept weights as a PyTorch operator, with its backward operator.

Legend: N images, K filters, C input channels, R × S window, P × Q output. The weight is the flat list of kept values;
``index`` is the structure that a mask fixes (``RowIndex.tensors``). On a GPU the operators launch Triton kernels; on
a CPU they compute the same from the dense form of the weight, which is what tests and CPU-only machines run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.core.errors import ModelError
from autoprune.kernels.formats.rows import SparseRows
from autoprune.kernels.triton.spmm_launch import RowTensors, SpmmConfig, SpmmShape, launch_dweight, launch_forward

INDEX_TENSORS = 8


@dataclass(frozen=True, slots=True)
class RowIndex:
    """All that kernels need to know of a mask.

    Attributes:
        rows: For the forward pass and the weight gradient.
        transposed: For the input gradient.
        gather_index: int64 (entries), index of every value in the flat KCRS weight.
        permutation: int64 (entries), ``values[permutation]`` are those of the transposed rows.
    """

    rows: RowTensors
    transposed: RowTensors
    gather_index: Tensor
    permutation: Tensor

    @staticmethod
    def of(rows: SparseRows) -> RowIndex:
        """Return the index of rows, on the CPU."""
        transposed, permutation = rows.transpose()
        return RowIndex(
            _tensors(rows), _tensors(transposed), torch.from_numpy(rows.gather_index), torch.from_numpy(permutation)
        )

    @property
    def tensors(self) -> list[Tensor]:
        """The index as a list, for an operator's schema and a module's buffers."""
        a, b = self.rows, self.transposed
        return [
            a.order, a.row_ptr, a.code, b.order, b.row_ptr, b.code, self.gather_index, self.permutation
        ]  # fmt: skip

    @staticmethod
    def read(tensors: Sequence[Tensor], longest: int) -> RowIndex:
        """Return the index that ``tensors`` lists; ``longest`` is of the forward rows."""
        forward, transposed = (RowTensors(t[0], t[1], t[2], size) for t, size in ((tensors, longest), (tensors[3:], 0)))
        return RowIndex(forward, transposed, tensors[6], tensors[7])


def _tensors(rows: SparseRows) -> RowTensors:
    order, row_ptr, code = (torch.from_numpy(array) for array in (rows.order, rows.row_ptr, rows.code))
    return RowTensors(order, row_ptr, code, rows.longest)


def dense_weight(values: Tensor, gather_index: Tensor, shape: SpmmShape) -> Tensor:
    """Return the (K, C, R, S) weight in the dtype of the values, zeros where none is kept."""
    size = shape.filters * shape.channels * shape.window[0] * shape.window[1]
    flat = values.new_zeros(size).index_put((gather_index,), values)
    return flat.reshape(shape.filters, shape.channels, *shape.window)


@torch.library.custom_op("autoprune::sparse_conv", mutates_args=(), device_types="cuda")
def _sparse_conv(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    index: list[Tensor],
    geometry: list[int],
    longest: int,
    config: str,
) -> Tensor:
    shape = SpmmShape.read(geometry)
    out = x.new_empty((x.shape[0], shape.filters, *shape.out_hw(x.shape[2], x.shape[3])))
    residual = None if residual is None else residual.contiguous()
    rows = RowIndex.read(index, longest).rows
    chosen = SpmmConfig.read(config)
    launch_forward(x, values.contiguous(), rows, shape, out, bias=bias, residual=residual, config=chosen)
    return out


@_sparse_conv.register_kernel("cpu")
def _on_cpu(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    index: list[Tensor],
    geometry: list[int],
    longest: int,
    config: str,
) -> Tensor:
    shape = SpmmShape.read(geometry)
    weight = dense_weight(values.float(), index[6], shape)
    y = F.conv2d(x.float(), weight, None if bias is None else bias.float(), shape.stride, shape.padding)
    if residual is not None:
        y = y + residual.float()
    return (torch.relu(y) if shape.relu else y).to(x.dtype).contiguous()


@_sparse_conv.register_fake
def _fake(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    index: list[Tensor],
    geometry: list[int],
    longest: int,
    config: str,
) -> Tensor:
    shape = SpmmShape.read(geometry)
    return x.new_empty((x.shape[0], shape.filters, *shape.out_hw(x.shape[2], x.shape[3])))


@torch.library.custom_op("autoprune::sparse_conv_backward", mutates_args=(), device_types="cuda")
def _sparse_conv_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: list[Tensor],
    geometry: list[int],
    longest: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and values; of what is not ``wanted`` an empty tensor."""
    shape, dy, rows = SpmmShape.read(geometry), dy.contiguous(), RowIndex.read(index, longest)
    dx, dvalues = x.new_empty((0,)), values.new_empty((0,))
    if wanted[0] and shape.stride == (1, 1):
        dx = x.new_empty(x.shape)
        launch_forward(dy, values[rows.permutation], rows.transposed, shape.transposed, dx)
    elif wanted[0]:
        # A strided convolution's input gradient is four interleaved convolutions: cuDNN's dense one is faster.
        dx = _dense_backward(dy, x, dense_weight(values, rows.gather_index, shape), shape, (True, False))[0]
    if wanted[1]:
        dvalues = launch_dweight(x, dy, rows.rows, shape).to(values.dtype)
    return dx, dvalues


@_sparse_conv_backward.register_kernel("cpu")
def _backward_on_cpu(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: list[Tensor],
    geometry: list[int],
    longest: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    shape = SpmmShape.read(geometry)
    weight = dense_weight(values.float(), index[6], shape)
    dx, dweight = _dense_backward(dy.float(), x.float(), weight, shape, (wanted[0], wanted[1]))
    dx = dx.to(x.dtype) if wanted[0] else x.new_empty((0,))
    return dx, dweight.flatten()[index[6]].to(values.dtype) if wanted[1] else values.new_empty((0,))


@_sparse_conv_backward.register_fake
def _fake_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: list[Tensor],
    geometry: list[int],
    longest: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape) if wanted[0] else x.new_empty((0,))
    return dx, values.new_empty(values.shape if wanted[1] else (0,))


def _dense_backward(
    dy: Tensor, x: Tensor, weight: Tensor, shape: SpmmShape, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, shape.stride, shape.padding, (1, 1), False, (0, 0), 1, (*wanted, False)
    )
    return (dx.contiguous() if wanted[0] else dx), dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, _, index, ctx.geometry, ctx.longest, _ = inputs
    ctx.relu = SpmmShape.read(ctx.geometry).relu
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, values, *index, *([output] if ctx.relu else []))


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, *rest = ctx.saved_tensors
    index = rest[:INDEX_TENSORS]
    if ctx.relu:
        dy = torch.ops.aten.threshold_backward(dy, rest[-1], 0)
    need_x, need_values, need_bias, need_residual = ctx.needs_input_grad[:4]
    dx = dvalues = dbias = None
    if need_x or need_values:
        wanted = [bool(need_x), bool(need_values)]
        dx, dvalues = _sparse_conv_backward(dy, x, values, index, ctx.geometry, ctx.longest, wanted)
    if need_bias:
        dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return (
        dx if need_x else None, dvalues if need_values else None, dbias, dy if need_residual else None,
        [None] * INDEX_TENSORS, None, None, None,
    )  # fmt: skip


_sparse_conv.register_autograd(_gradients, setup_context=_save)


def sparse_conv(
    x: Tensor,
    values: Tensor,
    index: RowIndex,
    shape: SpmmShape,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    config: str = "",
) -> Tensor:
    """Return ``relu(conv(x, values) + bias + residual)``, (N, K, P, Q) contiguous; differentiable.

    Under autocast everything is cast to its dtype; sums are in float32 always.

    Args:
        x: (N, C, H, W) float32, float16 or bfloat16, any memory format.
        values: (entries) in the dtype of ``x``, in the order of the index's rows.
        index: Of the mask, on the device of ``x``.
        shape: Geometry of the layer.
        bias: (K).
        residual: (N, K, P, Q), added before the rectifier.
        config: Text of a configuration of the forward kernel; chosen by the size where empty.
    Raises:
        ModelError: The input does not fit the layer, or dtypes differ.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values = x.to(dtype), values.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    if x.dim() != 4 or x.shape[1] != shape.channels:
        raise ModelError(f"sparse convolution: want an input (N, {shape.channels}, H, W), got {tuple(x.shape)}.")
    if x.dtype != values.dtype or (residual is not None and residual.dtype != x.dtype):
        raise ModelError(
            f"sparse convolution: input in {x.dtype}, weights in {values.dtype}; call model.to(dtype) or use autocast."
        )
    shape.out_hw(x.shape[2], x.shape[3])
    rows = index.rows
    result: Tensor = _sparse_conv(x, values, bias, residual, index.tensors, shape.integers, rows.longest, config)
    return result
