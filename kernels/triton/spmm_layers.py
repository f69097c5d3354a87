"""Convolution and linear layers whose weights are the kept values alone: trainable, on a GPU or a CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.errors import ChoiceError, ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.formats.cpu import CSR
from autoprune.kernels.formats.fkw import FKW
from autoprune.kernels.triton.spmm_launch import SpmmShape
from autoprune.kernels.triton.spmm_op import INDEX_TENSORS, RowIndex, dense_weight, sparse_conv

MAX_PADDING, MAX_WINDOW = 3, 7


def refusal(layer: LayerSpec) -> str | None:
    """Return why the kernel does not serve a layer, or None where it does."""
    if layer.groups != 1:
        return f"{layer.groups} groups, not 1"
    if layer.dilation != (1, 1):
        return f"dilation {layer.dilation}, not 1"
    if max(layer.padding) > MAX_PADDING or max(layer.window) > MAX_WINDOW:
        return f"padding above {MAX_PADDING} or window above {MAX_WINDOW}"
    return None


def pack(weight: Tensor, mask: Tensor | None = None) -> FKW | CSR:
    """Return a weight (K, C, R, S) in FKW, or in CSR where it has more patterns than FKW holds or no window."""
    array = weight.detach().float().cpu().numpy()
    kept = None if mask is None else mask.cpu().numpy()
    if math.prod(array.shape[2:]) > 1:
        try:
            return FKW.pack(array, kept)
        except ChoiceError:
            return CSR.pack(array, kept)
    return CSR.pack(array, kept)


class _SparseLayer(nn.Module):
    """Kept values, bias and the index of the mask.

    Attributes:
        values: (entries), the trained parameter.
        bias: (K) or None.
        shape: Geometry.
        format: ``fkw`` or ``csr``.
        config: Text of the forward kernel's configuration; chosen by the size where empty.
    """

    def __init__(self, weight_KCRS: Tensor, bias: Tensor | None, shape: SpmmShape, mask: Tensor | None) -> None:
        super().__init__()
        packed = pack(weight_KCRS, mask)
        self.format = "fkw" if isinstance(packed, FKW) else "csr"
        index = RowIndex.of(packed.rows())
        self.shape, self.config = shape, ""
        self.longest = index.rows.longest
        self.values = nn.Parameter(weight_KCRS.detach().flatten()[index.gather_index.to(weight_KCRS.device)])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for number, tensor in enumerate(index.tensors):
            self.register_buffer(f"index{number}", tensor.to(weight_KCRS.device))

    @property
    def index(self) -> RowIndex:
        """The structure that the mask fixes."""
        return RowIndex.read([self.get_buffer(f"index{number}") for number in range(INDEX_TENSORS)], self.longest)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the forward pass reads: values, bias and the rows' index."""
        rows = self.index.rows
        read = [self.values, rows.order, rows.row_ptr, rows.code, *([] if self.bias is None else [self.bias])]
        return sum(tensor.numel() * tensor.element_size() for tensor in read)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the kept values from a dense weight, by one gather; its other values are not looked at."""
        self.values.copy_(weight.detach().flatten()[self.index.gather_index])

    def dense(self) -> Tensor:
        """Return the (K, C, R, S) weight with its zeros."""
        return dense_weight(self.values.detach(), self.index.gather_index, self.shape)

    def _run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return sparse_conv(
            x, self.values, self.index, self.shape, bias=self.bias, residual=residual, config=self.config
        )

    def extra_repr(self) -> str:
        """Return the layer's facts for ``print``."""
        size = np.prod([self.shape.filters, self.shape.channels, *self.shape.window])
        return f"{self.shape}, format={self.format}, density={self.values.numel() / size:.3f}"


class SparseConv2d(_SparseLayer):
    """A ``Conv2d`` on its kept weights; with a residual and a ReLU fused where asked for.

    Args:
        source: The layer replaced; its weights are copied.
        mask: Boolean, which weights stay; those that are not 0 when None.
        relu: Whether negative results become 0.
    Raises:
        ModelError: Groups, dilation or another padding than zeros.
    """

    def __init__(self, source: nn.Conv2d, mask: Tensor | None = None, relu: bool = False) -> None:
        if source.groups != 1 or source.dilation != (1, 1) or source.padding_mode != "zeros":
            raise ModelError(
                f"no sparse convolution with groups={source.groups}, dilation={source.dilation}, padding mode "
                f"'{source.padding_mode}'; keep the layer dense."
            )
        if isinstance(source.padding, str):
            raise ModelError(f"no sparse convolution with padding='{source.padding}'; give it as numbers.")
        filters, channels, rows, columns = (int(size) for size in source.weight.shape)
        stride, padding = (int(v) for v in source.stride), (int(v) for v in source.padding)
        shape = SpmmShape(filters, channels, (rows, columns), (*stride,), (*padding,), relu)  # type: ignore[arg-type]
        super().__init__(source.weight, source.bias, shape, mask)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return (N, K, P, Q) for an input (N, C, H, W)."""
        return self._run(x, residual)


class SparseLinear(_SparseLayer):
    """A ``Linear`` on its kept weights.

    Args:
        source: The layer replaced; its weights are copied.
        mask: Boolean (O, I), which weights stay; those that are not 0 when None.
        relu: Whether negative results become 0.
    """

    def __init__(self, source: nn.Linear, mask: Tensor | None = None, relu: bool = False) -> None:
        shape = SpmmShape(source.out_features, source.in_features, (1, 1), relu=relu)
        weight = source.weight.reshape(*source.weight.shape, 1, 1)
        super().__init__(weight, source.bias, shape, None if mask is None else mask.reshape(weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, O) for an input (…, I)."""
        if x.shape[-1] != self.shape.channels:
            raise ModelError(f"sparse linear layer: want an input (…, {self.shape.channels}), got {tuple(x.shape)}.")
        # The samples take the place of pixels, which lie in the lanes.
        columns = x.reshape(-1, self.shape.channels).t().reshape(1, self.shape.channels, 1, -1)
        y = self._run(columns)
        return y.reshape(self.shape.filters, -1).t().reshape(*x.shape[:-1], self.shape.filters)
