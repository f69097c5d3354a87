"""The Block-ELL convolution as a function: checks, autocast, padding, then the operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.core.errors import ModelError
from autoprune.kernels.formats.ell import GROUP, padded
from autoprune.kernels.triton.configs import Launch
from autoprune.kernels.triton.ops import ell_conv, ell_pad
from autoprune.kernels.triton.shapes import EllShape


@dataclass(frozen=True, slots=True)
class ELLLayout:
    """Index tensors of a pack, without its weights.

    Attributes:
        groups: (tiles, steps, BK / 8) int32 codes.
        backward: For training; empty, [scatter index], or [scatter index, transposed codes, transposed index].
    """

    groups: Tensor
    backward: tuple[Tensor, ...] = ()


def ell_conv2d(
    x: Tensor,
    weight: Tensor,
    layout: ELLLayout,
    shape: EllShape,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Return ``relu(conv(x) + bias + residual)``, (N, K, P + 2·ring, Q + 2·ring) in channels-last memory.

    Under autocast inputs and weights are cast to its dtype.

    Args:
        x: (N, C, H, W), any strides; or, with its halo of ``shape.halo`` zeros already around it,
            (N, C padded to 8, H + 2·halo, W + 2·halo) made by ``ell_pad`` or a ring: say so with ``halo`` = (0, 0).
        weight: (tiles, steps, BK, BN), dtype of ``x`` or, under autocast, any.
        layout: Of the pack.
        shape: Geometry; its ``halo`` is the padding to be added here.
        bias: (K,).
        residual: (N, K, P, Q).
        launch: Configurations; defaults by shape when None.
    Raises:
        ModelError: Shapes or dtypes do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    _check(x, weight, residual, shape)
    channels = padded(shape.channels, GROUP)
    if max(shape.halo) or x.shape[1] != channels:
        x = ell_pad(x, shape.halo)
    if residual is not None and residual.shape[1] % GROUP:
        residual = ell_pad(residual, (0, 0))
    settings = shape.integers + (launch or Launch()).integers
    out: Tensor = ell_conv(x, weight, layout.groups, bias, residual, list(layout.backward), settings)
    return out if out.shape[1] == shape.filters else out[:, : shape.filters]


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, shape: EllShape) -> None:
    channels = (shape.channels, padded(shape.channels, GROUP))
    if x.dim() != 4 or x.shape[1] not in channels:
        raise ModelError(f"Block-ELL convolution: got an input of {tuple(x.shape)}, want (N, {shape.channels}, H, W).")
    if weight.dtype != x.dtype or (residual is not None and residual.dtype != x.dtype):
        raise ModelError(
            f"Block-ELL convolution: input is {x.dtype}, weight {weight.dtype}; cast one of them or use autocast."
        )
    height, width = x.shape[2] + 2 * shape.halo[0], x.shape[3] + 2 * shape.halo[1]
    if height < shape.window[0] or width < shape.window[1]:
        raise ModelError(f"Block-ELL convolution: a {x.shape[2]}x{x.shape[3]} input is smaller than its window.")
