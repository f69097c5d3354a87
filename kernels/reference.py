"""The truth that every kernel is tested against: convolution from its definition, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def conv2d(
    x_NCHW: npt.ArrayLike,
    weight_KCRS: npt.ArrayLike,
    bias_K: npt.ArrayLike | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    residual_NKHW: npt.ArrayLike | None = None,
    relu: bool = False,
) -> Array:
    """Return ``relu(conv(x, weight) + bias + residual)``, (N, K, H, W) float64; groups = 1.

    Args:
        x_NCHW: Input of any float type.
        weight_KCRS: Weight; zeros are weights like any other.
        bias_K: Added per filter.
        stride, padding, dilation: (rows, columns), as in torch.
        residual_NKHW: Added to the result before the rectifier.
        relu: Whether negative results become 0.
    """
    x, weight = np.asarray(x_NCHW, np.float64), np.asarray(weight_KCRS, np.float64)
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    height = (padded.shape[2] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    width = (padded.shape[3] - dilation[1] * (weight.shape[3] - 1) - 1) // stride[1] + 1
    y: Array = np.zeros((x.shape[0], weight.shape[0], height, width))
    for r in range(weight.shape[2]):
        for s in range(weight.shape[3]):
            top, left = r * dilation[0], s * dilation[1]
            rows = slice(top, top + stride[0] * (height - 1) + 1, stride[0])
            cols = slice(left, left + stride[1] * (width - 1) + 1, stride[1])
            y += np.einsum("nchw,kc->nkhw", padded[:, :, rows, cols], weight[:, :, r, s])
    if bias_K is not None:
        y += np.asarray(bias_K, np.float64)[:, None, None]
    if residual_NKHW is not None:
        y += np.asarray(residual_NKHW, np.float64)
    return np.maximum(y, 0.0) if relu else y
