"""What is worth trying for a row of a GPU's table: each kernel family offers its configurations for a layer and choice.

How a layer then runs is in ``kernels.gpu_layers``, under the same names. A family that cannot run it offers nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from autoprune.core.choices import Block, Channels, Choice, Dense, Pattern
from autoprune.core.layers import LayerSpec
from autoprune.kernels.dispatch import Kernel, refusal
from autoprune.kernels.dispatch import Place as GpuPlace
from autoprune.kernels.formats.ell import GROUP
from autoprune.kernels.gpu_layers import Place
from autoprune.kernels.triton.configs import candidates
from autoprune.kernels.triton.spmm_launch import forward_configs
from autoprune.lut.context import Context
from autoprune.lut.gpu_compile import resident, usable
from autoprune.lut.tile_model import DeviceModel, Tile, single_weights_us, tiled_us


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


class EllFamily:
    """Block-ELL implicit GEMM, in the configurations of its tuner."""

    name = "ell"

    def variants(self, layer: LayerSpec, choice: Choice, context: Context, device: DeviceModel) -> list[Variant]:
        if not offered("ell", layer, choice, place_of(context).dtype):
            return []
        return _ell_variants(layer, choice, context, device)


def dense_tiles(layer: LayerSpec, context: Context, device: DeviceModel) -> list[Variant]:
    """Return the Block-ELL configurations for a layer that keeps all its weights, the most promising first."""
    return sorted(_ell_variants(layer, Dense(), context, device), key=lambda variant: variant.model_us)


def _ell_variants(layer: LayerSpec, choice: Choice, context: Context, device: DeviceModel) -> list[Variant]:
    found, dtype = [], place_of(context).dtype
    for config in candidates(layer, context.batch, dtype, processors=device.processors):
        if not usable(config, dtype):
            continue
        # What a tile multiplies: every group of 8 channels that any of its filters keeps.
        density = tile_density(choice, layer, config.bn)
        tile = Tile(config.bm, config.bn, config.bk, resident(config, dtype))
        us = tiled_us(device, layer, choice, context.batch, context.dtype, tile, density=density)
        found.append(Variant("ell", config.text, us))
    return found


class SpmmFamily:
    """Row-tiled kernels on single kept weights."""

    name = "spmm"

    def variants(self, layer: LayerSpec, choice: Choice, context: Context, device: DeviceModel) -> list[Variant]:
        dtype = place_of(context).dtype
        if not offered("spmm", layer, choice, dtype):
            return []
        us = single_weights_us(device, layer, choice, context.batch, context.dtype)
        return [Variant(self.name, config.text, us) for config in forward_configs(dtype)]


class SemiFamily:
    """2:4 on sparse tensor cores; matrices alone."""

    name = "semi"

    def variants(self, layer: LayerSpec, choice: Choice, context: Context, device: DeviceModel) -> list[Variant]:
        able = context.direction == "forward" and offered("semi", layer, choice, place_of(context).dtype)
        us = tiled_us(device, layer, choice, context.batch, context.dtype)
        return [Variant(self.name, "", us)] if able else []


def offered(kernel: Kernel, layer: LayerSpec, choice: Choice, dtype: torch.dtype) -> bool:
    """Return whether a sparse kernel is worth a try for a layer under a choice."""
    if isinstance(choice, Dense | Channels):
        return False
    return refusal(kernel, choice, layer, GpuPlace("cuda", dtype)) is None


def tile_density(choice: Choice, layer: LayerSpec, filters: int) -> float:
    """Return the share of a layer that tiles of so many filters multiply, units being kept at random."""
    shared = (1, 1)
    if isinstance(choice, Pattern):
        shared = choice.share
    elif isinstance(choice, Block):
        shared = (choice.filters, 1)
    sizes = zip((filters, GROUP), shared, (layer.filters, layer.channels), strict=True)
    units = [-(-min(group, size) // min(unit, group)) for group, unit, size in sizes]
    kept: float = 1.0 - (1.0 - choice.density(layer)) ** math.prod(units)
    return kept


def families() -> dict[str, Family]:
    """Return every family by its name."""
    known: tuple[Family, ...] = (DenseFamily(), EllFamily(), SemiFamily(), SpmmFamily())
    return {family.name: family for family in known}
