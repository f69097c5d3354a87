"""Everything of this package that a GPU has to compile, as small launches: compiled ahead, and checked without a GPU.

A unit runs the same launch functions as a network does, on tensors that are just large enough. Sizes are no part of a
compiled kernel, dtypes and tiles are: what a unit compiles is what every layer launches. Triton is imported when a
unit runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from autoprune.kernels.formats.ell import Tile
from autoprune.kernels.triton.configs import Config, all_configs
from autoprune.kernels.triton.shapes import EllShape
from autoprune.kernels.triton.spmm_launch import SpmmConfig, dweight_configs, forward_configs

UnitKind = Literal["forward", "dweight", "pad", "take", "spmm-forward", "spmm-dweight"]
# Channels that a program of the padding kernel copies: the powers of 2 up to its widest block.
_PAD_CHANNELS = (8, 16, 32, 64, 128)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """One configuration of a kernel.

    Attributes:
        kind: Which kernel; ``forward`` and ``dweight`` are Block-ELL's.
        config: Text of its configuration; channels for ``pad``, empty for ``take``.
        dtype: Name of the dtype of maps and weights.
    """

    kind: UnitKind
    config: str
    dtype: str

    @property
    def tiled(self) -> bool:
        """Whether it multiplies tiles on matrix instructions."""
        return self.kind in ("forward", "dweight")


def units(dtype: torch.dtype) -> tuple[Unit, ...]:
    """Return all units that layers of a dtype can launch, forward and backward."""
    name = str(dtype).removeprefix("torch.")
    found = [Unit(config.kind, config.text, name) for config in all_configs(dtype)]
    found += [Unit("pad", str(channels), name) for channels in _PAD_CHANNELS]
    found.append(Unit("take", "", name))
    found += [Unit("spmm-forward", config.text, name) for config in forward_configs(dtype)]
    found += [Unit("spmm-dweight", config.text, name) for config in dweight_configs(dtype)]
    return tuple(found)


def run_unit(unit: Unit) -> None:
    """Launch a unit on CPU tensors: inside ``launching.compiling``, or in Triton's interpreter."""
    dtype = _DTYPES[unit.dtype]
    if unit.tiled:
        config = next(c for c in all_configs(dtype) if c.kind == unit.kind and c.text == unit.config)
        _run_ell(config, dtype)
    elif unit.kind == "pad":
        from autoprune.kernels.triton.copies import launch_pad

        launch_pad(torch.zeros(1, 1, 1, int(unit.config), dtype=dtype), (1, 1))
    elif unit.kind == "take":
        from autoprune.kernels.triton.copies import launch_take

        launch_take(torch.zeros(8, dtype=dtype), torch.zeros(8, dtype=torch.int32))
    else:
        known = forward_configs(dtype) if unit.kind == "spmm-forward" else dweight_configs(dtype)
        _run_spmm(unit.kind, next(c for c in known if c.text == unit.config), dtype)


def _run_ell(config: Config, dtype: torch.dtype) -> None:
    from autoprune.kernels.triton.ell import launch_forward
    from autoprune.kernels.triton.ell_backward import launch_dweight

    depth = config.bk if config.kind == "forward" else 64
    tile, shape = Tile(config.bn, depth), EllShape(8, 8, (1, 1))
    x_NHWC, out_NHWC = (torch.zeros(1, 2, 2, 8, dtype=dtype) for _ in range(2))
    groups = torch.zeros(1, 1, tile.depth // 8, dtype=torch.int32)
    if config.kind == "forward":
        weight = torch.zeros(1, 1, tile.depth, tile.filters, dtype=dtype)
        launch_forward(x_NHWC, weight, groups, out_NHWC, shape, config, bias=torch.zeros(8))
    else:
        launch_dweight(x_NHWC, out_NHWC, groups, shape, config, 1)


def _run_spmm(kind: str, config: SpmmConfig, dtype: torch.dtype) -> None:
    from autoprune.kernels.triton.spmm_launch import RowTensors, SpmmShape, launch_dweight, launch_forward

    x, out = (torch.zeros(1, 1, 2, 2, dtype=dtype) for _ in range(2))
    one, ends = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    rows, shape = RowTensors(one, ends, one.clone(), 1), SpmmShape(1, 1, (1, 1))
    if kind == "spmm-forward":
        values, bias = torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        launch_forward(x, values, rows, shape, out, bias=bias, config=config)
    else:
        launch_dweight(x, out, rows, shape, config=config)
