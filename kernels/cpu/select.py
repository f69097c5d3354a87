"""The compiled choice among the tile shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from autoprune.kernels.cpu.gradient import gradient_run, gradient_tile
from autoprune.kernels.cpu.shapes import BLOCK_TILES, CSR_TILES, DEPTHWISE_TILES, GRADIENT_RUNS, GRADIENT_TILES
from autoprune.kernels.cpu.tiles import block_tile, csr_tile, depthwise_tile


def _selector(name: str, makers: list[Callable[..., Any]], n_args: int) -> Callable[..., Any]:
    """Return ``name(variant, *args)`` that calls the variant's intrinsic: numba has no tables of functions."""
    args = ", ".join(f"a{i}" for i in range(n_args))
    lines = [f"def {name}(variant, {args}):"]
    for index in range(len(makers)):
        lines.append(f"    {'el' if index else ''}if variant == {index}:\n        tile{index}({args})")
    space: dict[str, Any] = {f"tile{index}": maker for index, maker in enumerate(makers)}
    exec("\n".join(lines), space)
    selector: Callable[..., Any] = njit(nogil=True)(space[name])
    return selector


run_block_tile = _selector("run_block_tile", [block_tile(tile) for tile in BLOCK_TILES], 8)
run_csr_tile = _selector("run_csr_tile", [csr_tile(tile) for tile in CSR_TILES], 6)
run_gradient_tile = _selector("run_gradient_tile", [gradient_tile(tile) for tile in GRADIENT_TILES], 6)
run_gradient_run = _selector("run_gradient_run", [gradient_run(vectors) for vectors in GRADIENT_RUNS], 5)
run_depthwise_tile = _selector("run_depthwise_tile", [depthwise_tile(tile) for tile in DEPTHWISE_TILES], 6)
