"""What a layer must take on a GPU, and what it is expected to take: roofline floors and a model of tiles and launches.

The floor is the larger of the arithmetic that stays at the device's peak and the bytes that must move at its memory's
peak; nothing can run faster from memory. The prediction adds what a tiled implicit GEMM loses: idle multiprocessors in
the last wave, filling and draining each tile's pipeline, tiles narrower than the tensor cores like, and the launch.

Legend: M output pixels of the batch, N filters, K kept weights per filter; a tile is BM × BN and steps BK at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoprune.core.choices import Channels, Choice
from autoprune.core.layers import LayerSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Fractions of the peaks that well-made kernels reach: memory, and tensor cores by the narrower side of a tile.
_STREAM = 0.85
_TILE_EFFICIENCY = {16: 0.2, 32: 0.35, 64: 0.55, 128: 0.78, 256: 0.85}
_FILL_STEPS = 2.0  # a tile's first loads and its epilogue, in K-steps
_SPMM_EFFICIENCY = 0.25  # gathers of single weights, of the plain arithmetic peak


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """What a device can do at most.

    Attributes:
        name: As the driver spells it.
        tflops: Matrix arithmetic by dtype, 10¹² operations a second, measured; a multiply-accumulate counts as two.
        plain_tflops: Arithmetic outside the tensor cores, float32.
        bandwidth: Bytes a second from memory, measured.
        l2_bandwidth: Bytes a second from the second-level cache.
        l2_bytes: Size of that cache.
        processors: Streaming multiprocessors.
        launch_us: From the start of one kernel to the start of the next in a graph, empty kernels.
    """

    name: str
    tflops: dict[str, float]
    plain_tflops: float
    bandwidth: float
    l2_bandwidth: float
    l2_bytes: int
    processors: int
    launch_us: float

    def peak(self, dtype: str) -> float:
        """Return the peak of matrix arithmetic in operations a microsecond."""
        return self.tflops.get(dtype, self.plain_tflops) * 1e6


# Matrix peaks and bandwidth are measured ceilings of large GEMMs and copies, not data-sheet figures.
DEVICES = (
    DeviceModel(
        name="NVIDIA H200",
        tflops={"bfloat16": 790.0, "float16": 790.0, "float32": 52.0},
        plain_tflops=52.0,
        bandwidth=4.3e12,
        l2_bandwidth=7.5e12,
        l2_bytes=50 << 20,
        processors=132,
        launch_us=1.3,
    ),
)


def known_device(name: str) -> DeviceModel | None:
    """Return the constants of a device by the driver's name for it; None for one that must be probed."""
    return next((device for device in DEVICES if device.name == name), None)


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of a layer cannot avoid: multiply-accumulates × 2, and bytes read and written."""

    operations: float
    bytes: float


def layer_work(layer: LayerSpec, choice: Choice, batch: int, dtype: str) -> Work:
    """Return the work of one call under a choice; each map and each kept weight moves once, indices are not counted.

    Args:
        layer: Of one call; ``calls`` is not multiplied in.
        choice: Keeps ``density`` of the weights; channel removal also writes fewer maps.
        batch: Images.
        dtype: Of maps and weights.
    """
    density, item = choice.density(layer), ITEM_BYTES[dtype]
    written = density if isinstance(choice, Channels) else 1.0
    maps = layer.channels * math.prod(layer.input_hw) + written * layer.filters * math.prod(layer.output_hw)
    operations = 2.0 * batch * layer.weights * math.prod(layer.output_hw) * density
    return Work(operations, item * (batch * maps + density * layer.weights))


def floor_us(device: DeviceModel, layer: LayerSpec, choice: Choice, batch: int, dtype: str) -> float:
    """Return the roofline floor of a layer from memory, µs, launch not counted.

    Source: Williams et al., "Roofline" (CACM 2009).
    """
    work = layer_work(layer, choice, batch, dtype)
    return max(work.operations / device.peak(dtype), work.bytes / device.bandwidth * 1e6)


def least_us(device: DeviceModel, layer: LayerSpec, choice: Choice, batch: int, dtype: str, *, tiled: bool) -> float:
    """Return what no kernel of this kind can beat, launch included, µs; to rule choices out.

    Args:
        device: Its peaks.
        layer, choice, batch, dtype: What runs.
        tiled: Whether tensor cores can run it; single weights cannot feed them.
    """
    work = layer_work(layer, choice, batch, dtype)
    peak = device.peak(dtype) if tiled else min(device.peak(dtype), device.plain_tflops * 1e6)
    # Maps that fit the cache may be there already: then only its bandwidth bounds them.
    bandwidth = device.l2_bandwidth if work.bytes <= device.l2_bytes else device.bandwidth
    return max(work.operations / peak, work.bytes / bandwidth * 1e6) + device.launch_us


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of a kernel's tile and how many of them one multiprocessor holds at a time."""

    m: int
    n: int
    k: int
    resident: int = 1


# What a tuner chooses among when nothing is known of its configurations.
USUAL_TILES = (Tile(128, 128, 64, 1), Tile(128, 64, 64, 2), Tile(64, 64, 64, 3), Tile(64, 32, 64, 4))


def tiled_us(
    device: DeviceModel,
    layer: LayerSpec,
    choice: Choice,
    batch: int,
    dtype: str,
    tile: Tile | None = None,
    density: float | None = None,
) -> float:
    """Return the predicted time of a tiled implicit GEMM, µs, launch included.

    Args:
        device: Its constants.
        layer, choice, batch, dtype: What runs; the K-list of every filter tile has the choice's density.
        tile: Of one configuration; None takes the best of ``USUAL_TILES``.
        density: Share of the weights that the tiles multiply, where that is more than the choice keeps.
    """
    if tile is None:
        return min(tiled_us(device, layer, choice, batch, dtype, usual, density) for usual in USUAL_TILES)
    work = layer_work(layer, choice, batch, dtype)
    filters = choice.width(layer.filters) if isinstance(choice, Channels) else layer.filters
    if isinstance(choice, Channels):
        density = 1.0
    elif density is None:
        density = choice.density(layer)
    pixels = batch * math.prod(layer.output_hw)
    tiles = math.ceil(pixels / tile.m) * math.ceil(filters / tile.n)
    steps = math.ceil(density * layer.weights / layer.filters / tile.k)
    # A multiprocessor shares its peak among the tiles that it holds, so only whole waves count.
    waves = math.ceil(tiles / (device.processors * tile.resident)) * tile.resident
    a_step = 2.0 * tile.m * tile.n * tile.k / (device.peak(dtype) / device.processors) / _efficiency(tile)
    # Two resident tiles hide each other's fill; a single one does not.
    arithmetic = waves * (steps + _FILL_STEPS / tile.resident) * a_step
    memory = work.bytes / (_STREAM * device.bandwidth) * 1e6
    return max(arithmetic, memory) + device.launch_us


def _efficiency(tile: Tile) -> float:
    return _TILE_EFFICIENCY[max(size for size in _TILE_EFFICIENCY if size <= max(16, min(tile.m, tile.n)))]


def single_weights_us(device: DeviceModel, layer: LayerSpec, choice: Choice, batch: int, dtype: str) -> float:
    """Return the predicted time of a kernel that gathers single weights, µs, launch included."""
    work = layer_work(layer, choice, batch, dtype)
    arithmetic = work.operations / (_SPMM_EFFICIENCY * device.plain_tflops * 1e6)
    return max(arithmetic, work.bytes / (_STREAM * device.bandwidth) * 1e6) + device.launch_us


def is_tiled(choice: Choice) -> bool:
    """Return whether tensor cores can run a choice: whole tiles of weights stay, or 2 of 4."""
    share = getattr(choice, "share", None)
    if share is not None:
        return bool(share[0] % 16 == 0 and share[1] % 8 == 0)
    if choice.kind == "nm":
        return (getattr(choice, "n", 0), getattr(choice, "m", 0)) == (2, 4)
    return choice.kind in ("dense", "channels", "block")


def predicted_us(device: DeviceModel, layer: LayerSpec, choice: Choice, batch: int, dtype: str) -> float:
    """Return the predicted time of a layer under a choice, µs: tiles where tensor cores can run it."""
    if is_tiled(choice):
        return tiled_us(device, layer, choice, batch, dtype)
    return single_weights_us(device, layer, choice, batch, dtype)
