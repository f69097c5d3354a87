"""The launch configurations that may be chosen, and a default for each layer. No Triton here.

Only configurations that compile for sm_80 and sm_90 without spills, without stack, within the shared memory of the
device and with wide asynchronous copies stand here; a test compiles every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.formats.ell import Tile
from autoprune.kernels.triton.shapes import cdiv, refusal

Kind = Literal["forward", "dweight"]
# Said outright: Triton 3.9 warns where it is left open, and its default changes in 3.10.
COMPILER: dict[str, bool] = {"enable_fp_fusion": True}


@dataclass(frozen=True, slots=True, order=True)
class Config:
    """One compiled variant of a kernel.

    Attributes:
        kind: ``forward`` (also the input gradient), or ``dweight``.
        bm: Output pixels of a program (forward); packed list rows of a program (dweight).
        bn: Filters of a program: the pack's tile.
        bk: List rows of a step: the pack's tile (forward); pixels of a step (dweight).
        warps, stages: Warps of a program, depth of the load pipeline.
    """

    kind: Kind
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int

    def fits(self, tile: Tile) -> bool:
        """Return whether it can run on a pack of this tile."""
        return self.bn == tile.filters and (self.kind == "dweight" or self.bk == tile.depth)

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch besides the kernel's own."""
        return {"num_warps": self.warps, "num_stages": self.stages, **COMPILER}

    @property
    def text(self) -> str:
        """Short name, for tables and reports."""
        return f"{self.kind}-{self.bm}x{self.bn}x{self.bk}-w{self.warps}-s{self.stages}"


def _configs(kind: Kind, *numbers: tuple[int, int, int, int, int]) -> tuple[Config, ...]:
    return tuple(Config(kind, *row) for row in numbers)


# Few but different: each is compiled in the test command, for two architectures, with and without a residual.
_HALF_FORWARD = _configs(
    "forward",
    (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (256, 64, 64, 8, 3), (128, 64, 64, 8, 4), (64, 64, 64, 4, 4),
    (128, 64, 32, 4, 4), (128, 32, 64, 4, 4), (128, 32, 32, 4, 4),
)  # fmt: skip
_HALF_DWEIGHT = _configs(
    "dweight", (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (128, 32, 64, 4, 3)
)
# For tests and for users without half precision: no matrix instruction multiplies exact float32.
_SINGLE_FORWARD = _configs(
    "forward", (32, 128, 64, 8, 2), (64, 64, 64, 8, 2), (64, 64, 32, 8, 3), (64, 32, 64, 8, 2), (64, 32, 32, 8, 3)
)
_SINGLE_DWEIGHT = _configs("dweight", (64, 128, 16, 8, 3), (64, 64, 16, 8, 3), (64, 32, 16, 4, 3))
# An idle device should get this many programs per multiprocessor; more parts only make the reduction longer.
_WAVES = 2
_MIN_TURNS = 8
H200_PROCESSORS = 132


@dataclass(frozen=True, slots=True)
class Launch:
    """Which configuration each kernel of a layer uses; ``default_config`` where None.

    Attributes:
        forward: Of the forward pass.
        dinput: Of the stride-1 input gradient: a forward configuration with the transposed pack's tile.
        dweight: Of the weight gradient.
    """

    forward: Config | None = None
    dinput: Config | None = None
    dweight: Config | None = None

    @property
    def integers(self) -> list[int]:
        """Fifteen integers for an operator's schema; zeros where None."""
        return [
            number
            for c in (self.forward, self.dinput, self.dweight)
            for number in ((c.bm, c.bn, c.bk, c.warps, c.stages) if c is not None else (0,) * 5)
        ]

    @staticmethod
    def read(values: Sequence[int]) -> Launch:
        """Return what the last fifteen of ``values`` spell."""
        kinds: tuple[Kind, ...] = ("forward", "forward", "dweight")
        rows = [values[len(values) - 15 + 5 * i :][:5] for i in range(3)]
        return Launch(*(Config(kind, *row) if row[0] else None for kind, row in zip(kinds, rows, strict=True)))

    def choose(self, kind: Kind, tile: Tile, work: Work) -> Config:
        """Return the configuration for a kernel; the default where none was given.

        Raises:
            ModelError: The one given is of another tile than the pack.
        """
        config = self.forward if kind == "forward" else self.dweight
        if config is None:
            return default_config(kind, tile, work)
        if not config.fits(tile):
            raise ModelError(f"configuration {config.text} for a pack of {tile}; its tile must be the pack's.")
        return config


@dataclass(frozen=True, slots=True)
class Work:
    """What a launch has to do.

    Attributes:
        pixels: Output pixels of the batch.
        filters: K.
        dtype: Of inputs and weights.
        processors: Multiprocessors of the device.
    """

    pixels: int
    filters: int
    dtype: torch.dtype = torch.bfloat16
    processors: int = H200_PROCESSORS


def all_configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Return every configuration of both kernels that may be chosen for a dtype."""
    if dtype == torch.float32:
        return _SINGLE_FORWARD + _SINGLE_DWEIGHT
    return _HALF_FORWARD + _HALF_DWEIGHT


def default_config(kind: Kind, tile: Tile, work: Work) -> Config:
    """Return the best configuration of a tile by a small model of waves and tile efficiency.

    Raises:
        ModelError: No configuration has this tile.
    """
    fitting = [c for c in all_configs(work.dtype) if c.kind == kind and c.fits(tile)]
    if not fitting:
        tiles = sorted({(c.bn, c.bk) for c in all_configs(work.dtype) if c.kind == "forward"})
        raise ModelError(
            f"no {kind} kernel for {work.dtype} and a pack of {tile.filters}x{tile.depth}; pack with one of "
            f"{', '.join(f'{bn}x{bk}' for bn, bk in tiles)}."
        )
    return min(fitting, key=lambda config: _cost(config, work))


def candidates(
    layer: LayerSpec, batch: int, dtype: torch.dtype, kind: Kind = "forward", processors: int = H200_PROCESSORS
) -> list[Config]:
    """Return the configurations worth timing for a layer, the most promising first; none if no kernel serves it.

    A forward configuration names the tile to pack with: ``Tile(config.bn, config.bk)``.
    """
    if refusal(layer) is not None:
        return []
    work = Work(batch * layer.output_hw[0] * layer.output_hw[1], layer.filters, dtype, processors)
    configs = [c for c in all_configs(dtype) if c.kind == kind]
    # A tile with more than half of its filters missing is a narrower tile's work at twice the price.
    narrowest = min(c.bn for c in configs)
    useful = [c for c in configs if c.bn < 2 * layer.filters or c.bn == narrowest]
    return sorted(useful, key=lambda config: (_cost(config, work), config))


def default_tile(layer: LayerSpec, batch: int, dtype: torch.dtype) -> Tile:
    """Return the tile to pack a layer with when nothing was measured.

    Raises:
        ModelError: No kernel serves the layer.
    """
    found = candidates(layer, batch, dtype)
    if not found:
        raise ModelError(f"layer '{layer.name}': no Block-ELL kernel: {refusal(layer)}; keep it dense.")
    return Tile(found[0].bn, found[0].bk)


def work_per_result(bn: int, bm: int = 128) -> float:
    """Return the time of one result of a tile against that of a tile that reuses its loads fully, at least 1."""
    return 1.0 / min(1.0, bm * bn / (bm + bn) / 64)


def _cost(config: Config, work: Work) -> float:
    """Time in units of a 1 × 1 tile at full rate: waves of programs × tile area ÷ how well a tile reuses its loads."""
    area = config.bm * config.bn * work_per_result(config.bn, config.bm)
    if config.kind == "dweight":  # its programs are split until they fill the device
        return area / (config.bm * config.bn)
    programs = cdiv(work.pixels, config.bm) * cdiv(work.filters, config.bn)
    return cdiv(programs, work.processors) * area


def pixel_parts(pixels: int, programs: int, config: Config, processors: int) -> int:
    """Return into how many parts the weight gradient splits its pixels.

    Args:
        pixels: Output pixels of the batch.
        programs: Programs of one part.
        config: Its ``dweight`` configuration.
        processors: Multiprocessors of the device.
    """
    turns = cdiv(pixels, config.bk)
    return max(1, min(cdiv(_WAVES * processors, programs), turns // _MIN_TURNS))
