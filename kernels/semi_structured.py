"""2:4 layers on sparse tensor cores, through PyTorch's semi-structured tensors; 1×1 convolutions and linear layers."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.core.choices import NM, Choice
from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec

# Rows and columns of a weight come in multiples of these in both of PyTorch's backends.
_ROWS, _COLUMNS = 32, 64
_AMPERE = (8, 0)


def semi_refusal(choice: Choice, layer: LayerSpec, dtype: torch.dtype) -> str | None:
    """Return why sparse tensor cores cannot run a choice, or None where they can."""
    if not (isinstance(choice, NM) and (choice.n, choice.m) == (2, 4)):
        return "not nm(n=2,m=4)"
    if layer.window != (1, 1) or layer.padding != (0, 0) or layer.groups != 1:
        return "not a 1x1 convolution without padding, nor a linear layer"
    if layer.filters % _ROWS or layer.channels % _COLUMNS:
        return f"a {layer.filters}x{layer.channels} weight is no multiple of {_ROWS}x{_COLUMNS}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')} is not float16 or bfloat16"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _AMPERE:
        return "the GPU is older than Ampere"
    return None


class SemiStructuredLayer(nn.Module):
    """A 1×1 ``Conv2d`` or a ``Linear`` whose weight keeps at most 2 of 4 neighbouring input channels; inference only.

    On a GPU the weight is compressed; on a CPU it stays as it is, which gives the same results.

    Args:
        source: The layer replaced, in the dtype and on the device it will run on.
    Raises:
        ModelError: A group of 4 keeps more than 2 weights, or the layer is of another kind.
    """

    def __init__(self, source: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        weight_OI = source.weight.detach().flatten(1).contiguous()
        if weight_OI.shape[1] != source.weight.shape[1] or weight_OI.shape[1] % 4:
            raise ModelError(f"2:4: want a 1x1 or linear weight in fours, got {tuple(source.weight.shape)}.")
        if bool((weight_OI.reshape(-1, 4).count_nonzero(1) > 2).any()):
            raise ModelError("2:4: a group of 4 input channels keeps more than 2 weights; mask it by nm(n=2,m=4).")
        if weight_OI.is_cuda:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch calls the interface a prototype
                weight_OI = torch.sparse.to_sparse_semi_structured(weight_OI)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone(), requires_grad=False)
        self.is_conv = isinstance(source, nn.Conv2d)
        self.stride = source.stride if isinstance(source, nn.Conv2d) else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, K, P, Q), channels last, for an input (N, C, H, W), or (…, O) for (…, I)."""
        if not self.is_conv:
            return self._multiply(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        x_NHWC = x[:, :, :: int(self.stride[0]), :: int(self.stride[1])].permute(0, 2, 3, 1)
        y = self._multiply(x_NHWC.reshape(-1, x.shape[1]))
        return y.reshape(*x_NHWC.shape[:3], -1).permute(0, 3, 1, 2)

    def _multiply(self, rows: Tensor) -> Tensor:
        return F.linear(rows.contiguous(), self.weight, self.bias)
