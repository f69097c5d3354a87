"""One layer on a GPU with bias, residual and ReLU inside, by each kernel that can run it.

All are modules called as ``y = module(x)`` or ``module(x, residual)`` on (N, C, H, W) maps in channels-last memory, or
on (N, …, I) of a linear layer. On a CPU device the same modules run their kernels' CPU forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.core.registry import unknown_name


@dataclass(frozen=True, slots=True)
class Source:
    """A layer to be run.

    Attributes:
        layer: Shape facts.
        choice: What its weights were masked by; ``Channels`` keeps the first filters.
        weight: As in ``layer.weight_shape``, float32, masked, on any device.
        bias: (K) float32.
        relu: Whether negative results become 0.
    """

    layer: LayerSpec
    choice: Choice
    weight: Tensor
    bias: Tensor
    relu: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer runs: device, and dtype of its maps and weights."""

    device: torch.device
    dtype: torch.dtype


class LayerModule(nn.Module):
    """A layer on its device.

    Attributes:
        weight_bytes: Weights with their indices and bias.
        workspace_bytes: What it needs besides its maps while it runs.
    """

    weight_bytes: int = 0
    workspace_bytes: int = 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the layer's output on ``x``, the residual added before the ReLU."""
        raise TypeError(f"{type(self).__name__} has no forward pass")


def tensor_bytes(tensors: Sequence[Tensor | None]) -> int:
    """Return the bytes of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def narrowed(source: Source) -> Source:
    """Return the layer without the filters that its choice removes; as it is for any other choice."""
    layer, choice = source.layer, source.choice
    if not isinstance(choice, Channels):
        return source
    width = choice.width(layer.filters)
    layer = replace(layer, weight_shape=(width, *layer.weight_shape[1:]))
    return replace(source, layer=layer, choice=Dense(), weight=source.weight[:width], bias=source.bias[:width])


class DenseLayer(LayerModule):
    """A convolution or linear layer of torch.

    Args:
        source: The layer.
        config: ``nhwc``, ``nchw``, ``fused`` (channels last; cuDNN adds the bias and rectifies itself), or ``gemm``.
        place: Device and dtype.
    """

    def __init__(self, source: Source, config: str, place: Place) -> None:
        super().__init__()
        source = narrowed(source)
        self.layer, self.config, self.relu = source.layer, config, source.relu
        self.memory = torch.contiguous_format if config == "nchw" else torch.channels_last
        weight = source.weight.to(place.device, place.dtype)
        if self.layer.op == "conv":
            weight = weight.contiguous(memory_format=self.memory)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(source.bias.to(place.device, place.dtype))
        self.weight_bytes = tensor_bytes([self.weight, self.bias])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layer = self.layer
        if layer.op == "linear":
            y = F.linear(x, self.weight, self.bias)
        elif self.config == "fused" and self.relu and not torch.is_grad_enabled():
            return self._fused(x, residual)
        else:
            x = x.contiguous(memory_format=self.memory)  # no copy of maps that have this layout
            y = F.conv2d(x, self.weight, self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return finish(y, residual, self.relu)

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        layer = self.layer
        where = (self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, *where)
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, *where)


def finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return what is left of an epilogue that a kernel does not do itself."""
    in_place = not torch.is_grad_enabled()
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    return F.relu(y, inplace=in_place) if relu else y


class SemiLayer(LayerModule):
    """A 1×1 convolution or linear layer whose weight is a 2:4 semi-structured matrix of torch."""

    def __init__(self, source: Source, config: str, place: Place) -> None:
        super().__init__()
        weight = source.weight.flatten(1).to(place.device, place.dtype)
        self.relu = source.relu
        self.is_conv = source.layer.op == "conv"
        self.weight = torch.sparse.to_sparse_semi_structured(weight)
        self.bias = nn.Parameter(source.bias.to(place.device, place.dtype), requires_grad=False)
        # Half of the values, and 2 bits of index for each of them.
        values = weight.numel() // 2 * weight.element_size()
        self.weight_bytes = values + weight.numel() // 8 + tensor_bytes([self.bias])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = x.permute(0, 2, 3, 1) if self.is_conv else x
        y = F.linear(rows.reshape(-1, rows.shape[-1]), self.weight, self.bias)
        y = y.reshape(*rows.shape[:-1], -1)
        return finish(y.permute(0, 3, 1, 2) if self.is_conv else y, residual, self.relu)


Maker = Callable[[Source, str, Place], LayerModule]

LAYER_KERNELS: dict[str, Maker] = {"dense": DenseLayer, "semi": SemiLayer}


def build_layer(kernel: str, config: str, source: Source, place: Place) -> LayerModule:
    """Return a layer as one kernel runs it.

    Args:
        kernel: As in a table's row.
        config: The kernel's configuration, as in the row; empty takes the kernel's own default.
        source: Shape, weights, epilogue.
        place: Device and dtype.
    Raises:
        UnknownName: No such kernel.
    """
    maker = LAYER_KERNELS.get(kernel)
    if maker is None:
        raise unknown_name("kernel", kernel, LAYER_KERNELS)
    return maker(source, config, place).to(place.device)
