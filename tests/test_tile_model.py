"""What floors and predictions of a GPU promise, against the published figures for ResNet-50 at batch 128."""

from __future__ import annotations

import pytest
import torch

from autoprune.core.choices import NM, Block, Channels, Choice, Dense, Fine, Pattern
from autoprune.core.layers import LayerSpec
from autoprune.lut.device_probe import probe
from autoprune.lut.gpu_timer import HostBackend
from autoprune.lut.tile_model import (
    USUAL_TILES,
    floor_us,
    is_tiled,
    known_device,
    layer_work,
    least_us,
    predicted_us,
    tiled_us,
)

H200 = known_device("NVIDIA H200")
BATCH, DTYPE = 128, "bfloat16"


def _conv(channels: int, filters: int, size: int, window: int = 3) -> LayerSpec:
    half = window // 2
    return LayerSpec(
        "x", "conv", (filters, channels, window, window), padding=(half, half), input_hw=(size, size),
        output_hw=(size, size),
    )


def _floor(layer: LayerSpec, choice: Choice) -> float:
    assert H200 is not None
    return floor_us(H200, layer, choice, BATCH, DTYPE)


@pytest.mark.parametrize(
    ("width", "size", "floors", "halved"),
    [
        (64, 56, (37.5, 23.9, 23.9, 23.9), 12.0),
        (128, 28, (37.5, 16.6, 12.0, 12.0), 9.4),
        (256, 14, (37.5, 16.6, 8.3, 6.0), 9.4),
        (512, 7, (37.5, 16.6, 8.3, 4.2), 9.4),
    ],
)
def test_floors_of_3x3_layers(width: int, size: int, floors: tuple[float, ...], halved: float) -> None:
    layer = _conv(width, width, size)
    choices = (Dense(), Block(keep=1 / 2.25), Block(keep=1 / 4.5), Block(keep=1 / 9))
    assert [round(_floor(layer, choice), 1) for choice in choices] == pytest.approx(floors, abs=0.051)
    assert _floor(_conv(width // 2, width // 2, size), Dense()) == pytest.approx(halved, abs=0.051)


@pytest.mark.parametrize(("narrow", "wide", "size", "dense", "halved"), [(64, 256, 56, 59.8, 29.9),
                                                                         (256, 1024, 14, 16.6, 7.5)])
def test_floors_of_1x1_layers(narrow: int, wide: int, size: int, dense: float, halved: float) -> None:
    for channels, filters in ((narrow, wide), (wide, narrow)):
        assert _floor(_conv(channels, filters, size, 1), Dense()) == pytest.approx(dense, abs=0.051)
        assert _floor(_conv(channels // 2, filters // 2, size, 1), Dense()) == pytest.approx(halved, abs=0.051)


@pytest.mark.parametrize(
    ("width", "size", "expected"),
    [(64, 56, (79, 36, 29, 29)), (128, 28, (50, 25, 15, 15)), (256, 14, (53, 28, 17, 11)), (512, 7, (52, 27, 16, 10))],
)
def test_tile_model_is_near_the_published_model(width: int, size: int, expected: tuple[float, ...]) -> None:
    assert H200 is not None
    layer = _conv(width, width, size)
    for keep, us in zip((1.0, 1 / 2.25, 1 / 4.5, 1 / 9), expected, strict=True):
        found = tiled_us(H200, layer, Block(keep=keep), BATCH, DTYPE)
        assert found == pytest.approx(us, rel=0.35)
        assert found > _floor(layer, Block(keep=keep))


def test_time_of_tiles_is_a_staircase_of_whole_waves() -> None:
    assert H200 is not None
    tile = USUAL_TILES[0]
    times = [tiled_us(H200, _conv(512, 512, 16), Dense(), batch, DTYPE, tile) for batch in (1, 2, 16, 17)]
    assert times[0] == times[1]  # 8 and 16 tiles alike leave most of 132 processors idle
    assert times[2] < times[3]  # the 17th image begins another wave


def test_removed_channels_write_fewer_maps_and_masks_do_not() -> None:
    layer = _conv(64, 64, 56)
    dense, channels, block = (layer_work(layer, c, 8, DTYPE) for c in (Dense(), Channels(0.5), Block(keep=0.5)))
    assert channels.operations == block.operations == dense.operations / 2
    assert channels.bytes < block.bytes < dense.bytes


def test_single_weights_cannot_feed_tensor_cores() -> None:
    assert is_tiled(Pattern(count=8, share=(64, 8)))
    assert is_tiled(NM(2, 4))
    assert not any(map(is_tiled, (Pattern(count=8), Fine(keep=0.1), NM(1, 4))))
    assert H200 is not None
    layer = _conv(256, 256, 14)
    bound = least_us(H200, layer, Fine(keep=0.25), BATCH, DTYPE, tiled=False)
    assert bound > least_us(H200, layer, Dense(), BATCH, DTYPE, tiled=True)
    assert predicted_us(H200, layer, Fine(keep=0.25), BATCH, DTYPE) > bound


def test_bound_of_a_layer_whose_maps_fit_the_cache_is_below_its_floor_from_memory() -> None:
    assert H200 is not None
    layer = _conv(64, 256, 7, 1)
    assert least_us(H200, layer, Dense(), 64, DTYPE, tiled=True) - H200.launch_us < floor_us(
        H200, layer, Dense(), 64, DTYPE
    )


def test_unknown_device_is_probed() -> None:
    assert known_device("Another GPU") is None
    model = probe(
        "this CPU", HostBackend(1 << 20), torch.device("cpu"), processors=1, gemm=96, stream_bytes=8 << 20
    )
    assert all(0.0 < peak < 1e3 for peak in model.tflops.values())
    assert 1e7 < model.bandwidth < 1e13
    assert 1e7 < model.l2_bandwidth < 1e13
    assert 0.0 < model.launch_us < 1e5
