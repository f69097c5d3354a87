"""What is worth trying for a row of a GPU's table: each kernel family offers its configurations for a layer and choice.

How a layer then runs is in ``kernels.gpu_layers``, under the same names. A family that cannot run it offers nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from autoprune.core.choices import NM, Channels, Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.kernels.gpu_layers import Place
from autoprune.lut.context import Context
from autoprune.lut.tile_model import DeviceModel, tiled_us

# 2:4 matrices of torch must be multiples of this, rows × columns, in 16-bit types.
_SEMI_ROWS, _SEMI_COLUMNS = 32, 64


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration of a family for a layer.

    Attributes:
        family: Its name.
        config: Text of the configuration, by which ``kernels.gpu_layers.build_layer`` builds it.
        model_us: What the tile model predicts for it.
    """

    family: str
    config: str
    model_us: float


class Family(Protocol):
    """Kernels of one kind."""

    @property
    def name(self) -> str:
        """As in a row's ``kernel``."""
        ...

    def variants(self, layer: LayerSpec, choice: Choice, context: Context, device: DeviceModel) -> list[Variant]:
        """Return the configurations that may run a layer under a choice; none when it cannot."""
        ...


def place_of(context: Context) -> Place:
    """Return the device and dtype of a context."""
    dtype: torch.dtype = getattr(torch, context.dtype)
    return Place(torch.device(context.device), dtype)


class DenseFamily:
    """cuDNN through torch, in the layouts and fusions that torch offers; also for removed channels."""

    name = "dense"

    def variants(self, layer: LayerSpec, choice: Choice, context: Context, device: DeviceModel) -> list[Variant]:
        if not isinstance(choice, Dense | Channels):
            return []
        us = tiled_us(device, layer, choice, context.batch, context.dtype)
        if layer.op == "linear":
            return [Variant(self.name, "gemm", us)]
        configs = ["nhwc", "nchw"]
        if context.device == "cuda" and context.direction == "forward":
            configs.insert(0, "fused")
        return [Variant(self.name, config, us) for config in configs]


class SemiFamily:
    """2:4 on sparse tensor cores, through ``torch.sparse.to_sparse_semi_structured``; matrices alone."""

    name = "semi"

    def variants(self, layer: LayerSpec, choice: Choice, context: Context, device: DeviceModel) -> list[Variant]:
        pointwise = layer.window == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)
        fits = layer.filters % _SEMI_ROWS == 0 and layer.channels % _SEMI_COLUMNS == 0
        is_24 = isinstance(choice, NM) and (choice.n, choice.m) == (2, 4)
        rows = context.batch * math.prod(layer.output_hw)
        able = context.device == "cuda" and context.direction == "forward" and rows % 8 == 0
        if not (is_24 and pointwise and fits and able):
            return []
        return [Variant(self.name, "", tiled_us(device, layer, choice, context.batch, context.dtype))]


def families() -> dict[str, Family]:
    """Return every family by its name."""
    known: tuple[Family, ...] = (DenseFamily(), SemiFamily())
    return {family.name: family for family in known}
