"""Convolutions in training on the CPU's kernels, as differentiable operators of torch.

An operator names its layer by a number, so that it can be traced and compiled: what is packed for the mask stays in
this process. Directions that no kernel was chosen for are torch's own.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.trained import Kernels, TrainedConv

_DTYPES = (torch.float32, torch.bfloat16)
_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, SparseConv] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class _Shape:
    """What torch's own convolution must be told."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


class SparseConv:
    """A convolution under a final mask: (input, weight with zeros, bias) → output, differentiable in all three.

    An input of another size than the traced one, or of another dtype than float32 and bfloat16, runs dense.

    Args:
        layer: As traced.
        mask: (K, C, R, S) boolean.
        kernels: Per direction; None is torch's own.
        threads: That share a batch.
    Raises:
        ModelError: A kernel cannot run the layer.
    """

    def __init__(self, layer: LayerSpec, mask: Tensor, kernels: Kernels, threads: int = 1) -> None:
        self.layer, self.kernels = layer, kernels
        self.shape = _Shape(layer.stride, layer.padding, layer.dilation)
        self.conv = TrainedConv(layer, mask, kernels, threads)
        self.number = next(_NUMBERS)
        _LAYERS[self.number] = self

    def __deepcopy__(self, memo: object) -> SparseConv:
        """Copies of a model share it, for it holds no weights."""
        return self

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what ``conv2d`` returns, under autocast too."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        usable = x.dtype in _DTYPES and dtype in _DTYPES and x.dim() == 4 and x.device.type == "cpu"
        if not usable or tuple(x.shape[2:]) != self.layer.input_hw:
            return F.conv2d(x, weight, bias, self.shape.stride, self.shape.padding, self.shape.dilation)
        y: Tensor = _forward(x, weight, self.number, dtype == torch.bfloat16)
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, wants: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Return the gradients of the input and of the weight; an unwanted one is empty."""
        kernels = self.kernels
        sparse = (wants[0] and kernels.input_gradient is not None, wants[1] and kernels.weight_gradient is not None)
        dx = dw = None
        if any(sparse):
            dx, dw = self.conv.backward(dy, x, weight, *sparse)
        rest = [want and not done for want, done in zip(wants, sparse, strict=True)]
        if any(rest):
            found = torch.ops.aten.convolution_backward(
                dy, x.to(dy.dtype), weight.to(dy.dtype), None, self.shape.stride, self.shape.padding,
                self.shape.dilation, False, [0, 0], 1, [*rest, False],
            )  # fmt: skip
            dx, dw = found[0] if rest[0] else dx, found[1] if rest[1] else dw
        return (
            dy.new_empty(0) if dx is None else dx.to(x.dtype),
            dy.new_empty(0) if dw is None else dw.to(weight.dtype),
        )

    def forward(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the convolution without bias, in ``dtype``."""
        if self.kernels.forward is not None:
            return self.conv.forward(x, weight, dtype)
        shape = self.shape
        # The autocast that is on would choose for itself.
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.to(dtype), weight.to(dtype), None, shape.stride, shape.padding, shape.dilation)


@torch.library.custom_op("autoprune::sparse_conv_train", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight: Tensor, number: int, half: bool) -> Tensor:
    """Return layer ``number``'s convolution, (N, K, H, W) channels-last, bfloat16 where ``half``."""
    return _LAYERS[number].forward(x, weight, torch.bfloat16 if half else torch.float32)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, number: int, half: bool) -> Tensor:
    layer = _LAYERS[number].layer
    dtype = torch.bfloat16 if half else torch.float32
    return x.new_empty((x.shape[0], *layer.output_hw, layer.filters), dtype=dtype).permute(0, 3, 1, 2)


@torch.library.custom_op("autoprune::sparse_conv_train_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, number: int, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and of the weight of layer ``number``; an unwanted one is empty."""
    with torch.autocast("cpu", enabled=False):
        dx, dw = _LAYERS[number].backward(dy, x, weight, (wants_x, wants_weight))
    return _channels_last(dx) if wants_x else dx, dw.contiguous() if wants_weight else dw


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, number: int, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    size = (x.shape[0], x.shape[2], x.shape[3], x.shape[1])
    dx = x.new_empty(size).permute(0, 3, 1, 2) if wants_x else dy.new_empty(0)
    return dx, weight.new_empty(weight.shape) if wants_weight else dy.new_empty(0)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, number, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.number = number


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    dx, dw = _backward(dy, x, weight, ctx.number, wants_x, wants_weight)
    return dx if wants_x else None, dw if wants_weight else None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
