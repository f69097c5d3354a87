"""Launches of the SpMM kernels: geometry, configurations and the choice among them.

Everything here but the launches themselves works without Triton, which is imported by the first launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.core.errors import ModelError
from autoprune.core.registry import unknown_name
from autoprune.kernels.triton.launching import launch

# Programs that fill a GPU a few times over: 132 multiprocessors × 8 resident programs × 2.
_BUSY = 2048
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SpmmConfig:
    """One compiled variant.

    Attributes:
        bn: Pixels of a tile.
        bk: Weights of a step.
        warps: Warps of a program.
    """

    bn: int
    bk: int
    warps: int

    @property
    def text(self) -> str:
        """Short name, for tables and reports."""
        return f"{self.bn}x{self.bk}-w{self.warps}"

    @staticmethod
    def read(text: str) -> SpmmConfig | None:
        """Return the variant that ``text`` names; None, the choice by size, for an empty one.

        Raises:
            UnknownName: No kernel has such a configuration.
        """
        if not text:
            return None
        known = {config.text: config for config in (*_FORWARD, *_DWEIGHT)}
        if text not in known:
            raise unknown_name("spmm configuration", text, known)
        return known[text]


_FORWARD = (SpmmConfig(1024, 8, 4), SpmmConfig(512, 8, 4), SpmmConfig(256, 8, 4), SpmmConfig(64, 16, 2))
_DWEIGHT = (SpmmConfig(256, 8, 4), SpmmConfig(64, 8, 2))


def forward_configs(dtype: torch.dtype) -> tuple[SpmmConfig, ...]:
    """Return the variants of the forward kernel that may be chosen for a dtype, by falling width."""
    return _FORWARD[2:3] if dtype == torch.float32 else _FORWARD


def dweight_configs(dtype: torch.dtype) -> tuple[SpmmConfig, ...]:
    """Return the variants of the weight gradient's kernel that may be chosen for a dtype, by falling width."""
    return _DWEIGHT[:1] if dtype == torch.float32 else _DWEIGHT


@dataclass(frozen=True, slots=True)
class SpmmShape:
    """Geometry of one convolution.

    Attributes:
        filters, channels: K and C.
        window: (R, S), at most 8.
        stride, padding: (rows, columns); a negative padding leaves border pixels of the input out.
        relu: Whether negative results become 0.
    """

    filters: int
    channels: int
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    relu: bool = False

    def out_hw(self, height: int, width: int) -> tuple[int, int]:
        """Return the output's height and width for an input without padding.

        Raises:
            ModelError: The input is smaller than the window.
        """
        sizes = zip((height, width), self.padding, self.window, self.stride, strict=True)
        rows, columns = ((size + 2 * pad - window) // step + 1 for size, pad, window, step in sizes)
        if rows < 1 or columns < 1:
            raise ModelError(
                f"sparse convolution: a {height}x{width} input with padding {self.padding} is smaller than the window "
                f"{self.window}; give a larger input."
            )
        return rows, columns

    @property
    def integers(self) -> list[int]:
        """The geometry as a flat list, for an operator's schema."""
        return [self.filters, self.channels, *self.window, *self.stride, *self.padding, int(self.relu)]

    @staticmethod
    def read(values: Sequence[int]) -> SpmmShape:
        """Return the geometry that ``integers`` spells."""
        k, c, r, s, down, right, rows, columns, relu = values
        return SpmmShape(k, c, (r, s), (down, right), (rows, columns), bool(relu))

    @property
    def transposed(self) -> SpmmShape:
        """The convolution over the output's gradient that gives the input's; stride 1 only."""
        padding = (self.window[0] - 1 - self.padding[0], self.window[1] - 1 - self.padding[1])
        return SpmmShape(self.channels, self.filters, self.window, (1, 1), padding)


@dataclass(frozen=True, slots=True)
class RowTensors:
    """Rows on a device: ``formats.rows.SparseRows`` as int32 tensors, and the entries of the longest row."""

    order: Tensor
    row_ptr: Tensor
    code: Tensor
    longest: int


def pick(configs: tuple[SpmmConfig, ...], rows: int, pixels: int) -> SpmmConfig:
    """Return the widest tile that still fills a GPU, else the narrowest that is not mostly empty.

    Args:
        configs: By falling width.
        rows: Programs per pixel tile.
        pixels: Output pixels of all images.
    """
    for config in configs:
        if rows * -(-pixels // config.bn) >= _BUSY:
            return config
    return configs[-1]


def pad_input(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Return the input NCHW, contiguous, with its padding around it; negative padding leaves border pixels out."""
    rows, columns = padding
    if rows < 0 or columns < 0:
        x = x[:, :, max(-rows, 0) : x.shape[2] - max(-rows, 0), max(-columns, 0) : x.shape[3] - max(-columns, 0)]
        rows, columns = max(rows, 0), max(columns, 0)
    if rows == 0 and columns == 0:
        return x.contiguous()
    n, c, height, width = x.shape
    padded = x.new_zeros((n, c, height + 2 * rows, width + 2 * columns))
    # One pass that pads and, for a channels-last map, brings the pixels of a channel together.
    padded[:, :, rows : rows + height, columns : columns + width] = x
    return padded


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current GPU; a CPU tensor comes from the interpreter.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _geometry(padded: Tensor, shape: SpmmShape, out_hw: tuple[int, int]) -> tuple[int, ...]:
    n, c, height, width = padded.shape
    pixels = n * out_hw[0] * out_hw[1]
    if max(pixels + 1024, c * height * width, n * shape.filters) > _INT32_MAX:
        raise ModelError(f"sparse convolution: {tuple(padded.shape)} is too large for one launch; use smaller batches.")
    return (
        pixels, out_hw[1], out_hw[0] * out_hw[1],
        c * height * width, height * width, width, shape.stride[0] * width, shape.stride[1],
    )  # fmt: skip


def launch_forward(
    x: Tensor,
    values: Tensor,
    rows: RowTensors,
    shape: SpmmShape,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    config: SpmmConfig | None = None,
) -> None:
    """Write ``relu(conv(x) + bias + residual)`` into ``out``.

    Args:
        x: (N, C, H, W), any memory format, without padding.
        values: (entries), in the order of the rows.
        rows: On the device of ``x``.
        shape: Geometry; must fit the tensors.
        out: (N, K, P, Q) contiguous, any content.
        bias: (K).
        residual: (N, K, P, Q) contiguous.
        config: One of ``forward_configs``; chosen by the size when None.
    """
    from autoprune.kernels.triton.spmm import spmm_forward

    padded = pad_input(x, shape.padding)
    geometry = _geometry(padded, shape, (int(out.shape[2]), int(out.shape[3])))
    pixels = geometry[0]
    if pixels == 0:
        return
    config = config or pick(forward_configs(x.dtype), shape.filters, pixels)
    with _on_device(x):
        launch(
            spmm_forward, (shape.filters * -(-pixels // config.bn),),
            padded, values, rows.order, rows.row_ptr, rows.code,
            values if bias is None else bias.to(values.dtype), values if residual is None else residual, out,
            shape.filters, int(bias is not None), int(residual is not None), 0.0 if shape.relu else -math.inf,
            *geometry, BK=config.bk, BN=config.bn, num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip


def launch_dweight(
    x: Tensor, dy: Tensor, rows: RowTensors, shape: SpmmShape, *, config: SpmmConfig | None = None
) -> Tensor:
    """Return the gradient of every kept weight, (entries) float32; the same bits in every run.

    Args:
        x: (N, C, H, W), any memory format, without padding.
        dy: (N, K, P, Q) contiguous.
        rows: On the device of ``x``.
        shape: Geometry of the forward convolution.
        config: One of ``dweight_configs``; chosen by the size when None.
    """
    from autoprune.kernels.triton.spmm import spmm_dweight

    padded = pad_input(x, shape.padding)
    geometry = _geometry(padded, shape, (int(dy.shape[2]), int(dy.shape[3])))
    pixels, entries = geometry[0], int(rows.code.numel())
    if entries == 0 or pixels == 0:
        return x.new_zeros((entries,), dtype=torch.float32)
    configs = dweight_configs(x.dtype)
    config = config or pick(configs, -(-entries // configs[0].bk), pixels)
    chunks = -(-rows.longest // config.bk)
    splits = max(1, min(-(-pixels // config.bn), _BUSY // (shape.filters * chunks)))
    partial = x.new_empty((splits, entries), dtype=torch.float32)
    with _on_device(x):
        launch(
            spmm_dweight, (shape.filters * chunks * splits,),
            padded, dy, rows.order, rows.row_ptr, rows.code, partial,
            shape.filters, chunks, splits, entries, *geometry,
            BK=config.bk, BN=config.bn, num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum(0)
