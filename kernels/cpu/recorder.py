"""Records the operations of a program, each checked when it is added; what runs them is in ``program``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.memory import Buffer
from autoprune.kernels.cpu.operations import (
    Conv,
    Depthwise,
    Elementwise,
    Epilogue,
    Floats,
    Operation,
    Pool,
    check_conv,
    check_elementwise,
    check_pool,
    check_same,
    floats,
)
from autoprune.kernels.cpu.rows import Curve


class Recorder:
    """Buffers and operations of a program that is not finished."""

    def __init__(self, batch: int) -> None:
        """Start an empty record for ``batch`` images a run."""
        self.batch = batch
        self._buffers: list[Buffer] = []
        self._operations: list[Operation] = []
        self._input: Buffer | None = None
        self._output: Buffer | None = None

    @property
    def _is_finished(self) -> bool:
        return False

    def buffer(self, channels: int, height: int, width: int, halo: int = 0) -> Buffer:
        """Return the handle of a new activation map with ``halo`` zero pixels around each image."""
        self._check_open()
        if min(channels, height, width) < 1 or halo < 0:
            raise ModelError(f"buffer of {channels}×{height}×{width}, halo {halo}: sizes must be at least 1, halo 0.")
        self._buffers.append(Buffer(len(self._buffers), self.batch, channels, height, width, halo))
        return self._buffers[-1]

    def set_input(self, buffer: Buffer) -> None:
        """Name the buffer that ``run`` fills from its NCHW tensor."""
        self._check_open()
        self._input = buffer

    def set_output(self, buffer: Buffer) -> None:
        """Name the buffer that ``run`` returns."""
        self._check_open()
        self._output = buffer

    def conv(
        self,
        x: Buffer,
        out: Buffer,
        layer: LayerSpec,
        weight_KCRS: torch.Tensor,
        bias_K: torch.Tensor | None,
        kernel: Literal["dense", "block", "csr"],
        epilogue: Epilogue = Epilogue(),  # noqa: B008
        block: int = 16,
        extra: tuple[int, int] = (0, 0),
    ) -> None:
        """Add a convolution, or a linear layer as a 1×1 convolution on a 1×1 map.

        One with a group for each channel has a kernel of its own; other groups run as blocks of the whole weight.

        Args:
            x: Input; its halo is at least the layer's padding.
            out: Output, another buffer than ``x``.
            layer: Shape, stride, padding, dilation, groups.
            weight_KCRS: (K, C / groups, R, S), or (out, in) of a linear layer; already masked.
            bias_K: (K) or None.
            kernel: ``dense`` keeps all weights, ``block`` the blocks and ``csr`` the weights that are not 0.
            epilogue: Residual and rectifier.
            block: Filters per block, 16 or 32; only for ``block``.
            extra: Rows and columns of zeros below and right of the map beyond the layer's padding.
        Raises:
            ModelError: Sizes do not fit together.
        """
        self._check_open()
        weight = floats(weight_KCRS)
        weight = weight.reshape(*weight.shape, 1, 1) if weight.ndim == 2 else weight
        bias = np.zeros(len(weight), np.float32) if bias_K is None else floats(bias_K)
        operation: Conv | Depthwise
        if is_depthwise(layer) and epilogue.residual is None:
            operation = Depthwise(x, out, layer, weight, bias, epilogue, extra)
        else:
            if layer.groups != 1:
                weight, kernel = ungrouped(weight, layer.groups), "block" if kernel == "dense" else kernel
                layer = replace(layer, weight_shape=tuple(weight.shape), groups=1)
            operation = Conv(x, out, layer, weight, bias, kernel, epilogue, block, extra)
        check_conv(operation)
        self._operations.append(operation)

    def add(self, x: Buffer, y: Buffer, out: Buffer, relu: bool, cap: float = math.inf) -> None:
        """Add ``out = x + y``, rectified if ``relu`` and cut at ``cap``; ``out`` may be one of the two."""
        self._elementwise("add", Elementwise(x, y, out, relu, cap))

    def relu(self, x: Buffer, out: Buffer, cap: float = math.inf) -> None:
        """Add ``out = min(max(x, 0), cap)``; ``out`` may be ``x``."""
        self._elementwise("relu", Elementwise(x, None, out, True, cap))

    def multiply(self, x: Buffer, y: Buffer, out: Buffer) -> None:
        """Add ``out = x · y``; ``y`` has the size of ``x``, or 1×1 pixel."""
        self._elementwise("multiply", Elementwise(x, y, out, times=True))

    def curve(self, x: Buffer, out: Buffer, curve: Curve, slope: float = 0.0) -> None:
        """Add ``out = curve(x)``, a leaky one with its ``slope``; ``out`` may be ``x``."""
        self._elementwise("curve", Elementwise(x, None, out, curve=curve, slope=slope))

    def affine(
        self, x: Buffer, out: Buffer, scale_C: torch.Tensor, shift_C: torch.Tensor, relu: bool, cap: float = math.inf
    ) -> None:
        """Add ``out = min(relu(x · scale + shift), cap)`` with numbers for each channel."""
        operation = Elementwise(x, None, out, relu, cap, scale=floats(scale_C), shift=floats(shift_C))
        self._elementwise("affine", operation)

    def place(self, x: Buffer, out: Buffer, offset: int) -> None:
        """Add a copy of ``x`` into the channels of ``out`` from ``offset`` on, a multiple of 16."""
        self._elementwise("place", Elementwise(x, None, out, offset=offset))

    def _elementwise(self, name: str, operation: Elementwise) -> None:
        self._check_open()
        check_elementwise(name, operation)
        if name != "place":
            check_same(name, operation.x, operation.out)
        self._operations.append(operation)

    def global_avg_pool(self, x: Buffer, out: Buffer) -> None:
        """Add the mean over all pixels; ``out`` is a 1×1 map."""
        self._pool(Pool(x, out, (x.height, x.width), 1, 0, True))

    def max_pool(self, x: Buffer, out: Buffer, kernel: int, stride: int, padding: int) -> None:
        """Add the maximum over ``kernel`` × ``kernel`` windows; padding never wins; windows are cut at the edges."""
        self._pool(Pool(x, out, (kernel, kernel), stride, padding, False))

    def avg_pool(
        self, x: Buffer, out: Buffer, kernel: int, stride: int, padding: int, *, inside: bool = False
    ) -> None:
        """Add the mean over ``kernel`` × ``kernel`` windows; padding counts as zeros, or not at all if ``inside``."""
        self._pool(Pool(x, out, (kernel, kernel), stride, padding, True, inside))

    def _pool(self, pool: Pool) -> None:
        self._check_open()
        check_pool(pool)
        self._operations.append(pool)

    def _check_open(self) -> None:
        if self._is_finished:
            raise ModelError("program: it is finished; build a new one to change it.")


def is_depthwise(layer: LayerSpec) -> bool:
    """Return whether a convolution has one filter and one group for each channel."""
    return layer.groups > 1 and layer.groups == layer.filters and layer.weight_shape[1] == 1


def ungrouped(weight: Floats, groups: int) -> Floats:
    """Return a grouped convolution's weight (K, C / groups, R, S) as the whole one, (K, C, R, S), zeros elsewhere."""
    k, c, *window = weight.shape
    whole = np.zeros((groups, k // groups, groups, c, *window), np.float32)
    for group in range(groups):
        whole[group, :, group] = weight.reshape(groups, k // groups, c, *window)[group]
    return whole.reshape(k, groups * c, *window)
