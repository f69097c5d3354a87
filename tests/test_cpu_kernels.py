"""Every CPU kernel gives what the definition of a convolution gives, on every shape, from buffers full of NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu import assemble, planes
from autoprune.kernels.cpu.layout import cover_map
from autoprune.kernels.cpu.program import Buffer, Epilogue, Program
from autoprune.kernels.cpu.shapes import BLOCK_TILES
from autoprune.kernels.reference import conv2d

Kernel = Literal["dense", "block", "csr"]
KERNELS: tuple[Kernel, ...] = ("dense", "block", "csr")
RELATIVE_ERROR = 1e-5


@dataclass(frozen=True)
class Case:
    """One convolution to try; ``spare_halo`` is halo beyond the padding."""

    channels: int = 16
    filters: int = 16
    size: tuple[int, int] = (7, 7)
    window: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    batch: int = 1
    threads: int = 1
    density: float = 0.3
    block: int = 16
    relu: bool = True
    residual: bool = True
    spare_halo: int = 0
    user_input: bool = True

    @property
    def out_size(self) -> tuple[int, int]:
        """Output height and width."""
        h, w = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.size, self.padding, self.dilation, self.window, self.stride, strict=True
            )
        )
        return h, w

    @property
    def layer(self) -> LayerSpec:
        """The layer's shape."""
        return LayerSpec(
            "layer", "conv", (self.filters, self.channels, *self.window), self.stride, self.padding, self.dilation,
            1, self.size, self.out_size,
        )


def compute(case: Case, kernel: Kernel) -> tuple[npt.NDArray[np.float32], Program, list[Buffer]]:
    """Run a case on buffers of NaN; return its NKHW output, the program and its buffers."""
    weight, bias, x, residual = data(case)
    program = Program(case.batch, case.threads)
    source = program.buffer(case.channels, *case.size, halo=max(case.padding) + case.spare_halo)
    out = program.buffer(case.filters, *case.out_size, halo=1)
    extra = program.buffer(case.filters, *case.out_size, halo=2)
    epilogue = Epilogue(case.relu, extra if case.residual else None)
    tensors = torch.from_numpy(weight), torch.from_numpy(bias)
    program.conv(source, out, case.layer, *tensors, kernel, epilogue, case.block)
    if case.user_input:
        program.set_input(source)
    program.set_output(out)
    program.finish()
    for buffer in (source, out, extra):
        program.memory.interior_NHWC(buffer)[:] = np.nan
    program.memory.interior_NHWC(extra)[:] = residual.transpose(0, 2, 3, 1)
    if case.user_input:
        y = program.run(torch.from_numpy(x)).numpy().reshape(residual.shape)
    else:
        program.memory.interior_NHWC(source)[:] = x.transpose(0, 2, 3, 1)
        program.time_us(1)
        y = program.memory.interior_NHWC(out).transpose(0, 3, 1, 2)
    return y, program, [source, out, extra]


def data(case: Case) -> tuple[npt.NDArray[np.float32], ...]:
    """Return masked weight, bias, input and residual."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(case.layer.weight_shape).astype(np.float32)
    weight *= rng.random(weight.shape) < case.density
    shapes = [(case.filters,), (case.batch, case.channels, *case.size), (case.batch, case.filters, *case.out_size)]
    return weight, *(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def check(case: Case, kernel: Kernel) -> None:
    """Fail unless the kernel agrees with the definition and leaves halos and padding channels zero."""
    y, program, buffers = compute(case, kernel)
    weight, bias, x, residual = data(case)
    truth = conv2d(
        x, weight, bias, stride=case.stride, padding=case.padding, dilation=case.dilation,
        residual_NKHW=residual if case.residual else None, relu=case.relu,
    )
    scale = max(float(np.abs(truth).max()), 1.0)
    assert np.abs(y - truth).max() <= RELATIVE_ERROR * scale, case
    for buffer in buffers:
        whole = program.memory.whole_NHWC(buffer).copy()
        halo = buffer.halo
        whole[:, halo : halo + buffer.height, halo : halo + buffer.width, : buffer.channels] = 0
        assert not whole.any(), f"{case}: {buffer} is not zero around its pixels"


BASE = Case()
CASES = {
    "resnet stage 1": replace(BASE, size=(28, 28)),
    "resnet stage 2": replace(BASE, channels=32, filters=32, size=(14, 14)),
    "resnet stage 3": replace(BASE, channels=64, filters=64),
    "stage change": replace(BASE, filters=32, size=(28, 28), stride=(2, 2)),
    "shortcut": replace(BASE, filters=32, size=(28, 28), window=(1, 1), stride=(2, 2), padding=(0, 0)),
    "first layer": replace(BASE, channels=1, size=(28, 28), residual=False),
    "first layer, colour": replace(BASE, channels=3, size=(32, 32), residual=False),
    "first layer, large": replace(BASE, channels=3, size=(37, 35), window=(7, 7), stride=(2, 2), padding=(3, 3)),
    "classifier": replace(BASE, channels=64, filters=10, size=(1, 1), window=(1, 1), padding=(0, 0), relu=False),
    "wide classifier": replace(BASE, channels=512, filters=100, size=(1, 1), window=(1, 1), padding=(0, 0)),
    "odd everything": replace(BASE, channels=17, filters=33, size=(9, 11), batch=5, block=32, spare_halo=1),
    "one row": replace(BASE, channels=5, filters=24, size=(1, 40), padding=(1, 1), batch=2),
    "one column": replace(BASE, channels=5, filters=10, size=(23, 1), padding=(1, 1), batch=2),
    "row window": replace(BASE, size=(9, 19), window=(1, 5), padding=(0, 2), filters=48, block=32),
    "uneven padding": replace(BASE, size=(6, 9), padding=(0, 1), filters=24),
    "uneven stride": replace(BASE, size=(12, 19), stride=(1, 3), channels=3),
    "stride 3": replace(BASE, size=(17, 20), window=(5, 5), stride=(3, 3), padding=(2, 2)),
    "dilated": replace(BASE, size=(15, 13), dilation=(2, 2), padding=(2, 2), filters=32, block=32),
    "dilated and strided": replace(BASE, size=(21, 18), dilation=(2, 2), stride=(3, 2), padding=(3, 1)),
    "no padding, no halo": replace(BASE, size=(10, 10), padding=(0, 0), user_input=False),
    "empty": replace(BASE, density=0.0, batch=2, filters=40),
    "nearly empty": replace(BASE, density=0.004, filters=40, channels=20),
    "full": replace(BASE, density=1.0, filters=64, channels=16, block=32),
    "long rows": replace(BASE, size=(5, 113), channels=8, filters=16),
    "large window": replace(BASE, size=(20, 20), window=(7, 7), padding=(3, 3), channels=4),
    "cifar": replace(BASE, size=(32, 32), density=0.2, batch=2),
    "many channels": replace(BASE, channels=99, size=(20, 28), filters=20),
    "kilobyte pixels": replace(BASE, channels=256, filters=256, size=(3, 3), block=32, density=0.05, batch=2),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_the_definition(name: str, kernel: Kernel) -> None:
    check(CASES[name], kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(6))
def test_kernel_agrees_on_random_shapes(seed: int, kernel: Kernel) -> None:
    rng = np.random.default_rng(seed)
    tried = 0
    while tried < 15:
        window = [(1, 1), (3, 3), (5, 5), (2, 2), (1, 3)][rng.integers(5)]
        case = Case(
            channels=int(rng.choice([1, 3, 5, 16, 17, 32])),
            filters=int(rng.choice([10, 16, 24, 33, 64])),
            size=(int(rng.integers(1, 18)), int(rng.integers(1, 36))),
            window=window,
            stride=(int(rng.integers(1, 4)), int(rng.integers(1, 4))),
            padding=(int(rng.integers(window[0] // 2 + 1)), int(rng.integers(window[1] // 2 + 1))),
            dilation=(int(rng.integers(1, 3)), int(rng.integers(1, 3))),
            batch=int(rng.choice([1, 2, 5])),
            threads=int(rng.choice([1, 2])) if tried % 5 == 0 else 1,
            density=float(rng.choice([0.02, 0.2, 1.0])),
            block=int(rng.choice([16, 32])),
            relu=bool(rng.integers(2)),
            residual=bool(rng.integers(2)),
            spare_halo=int(rng.integers(2)),
            user_input=bool(rng.integers(2)),
        )
        if min(case.out_size) >= 1:
            check(case, kernel)
            tried += 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_two_threads_give_what_one_gives_and_the_same_bits_each_time(batch: int, kernel: Kernel) -> None:
    case = replace(BASE, channels=33, filters=50, size=(15, 13), batch=batch)
    one, _, _ = compute(case, kernel)
    two, _, _ = compute(replace(case, threads=2), kernel)
    # Bands are covered by other tiles, which add up in another order.
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=2e-5)
    again, _, _ = compute(replace(case, threads=2), kernel)
    np.testing.assert_array_equal(two, again)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["resnet stage 1", "odd everything", "stride 3", "dilated"])
def test_machines_with_few_registers_get_other_tiles_and_the_same_result(
    name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (assemble, planes):
        monkeypatch.setattr(module, "vector_registers", lambda: 8)
    check(CASES[name], kernel)


def test_many_channels_are_convolved_in_blocks_that_stay_in_the_cache() -> None:
    layer = CASES["many channels"].layer
    entries = 0.3 * layer.weights / layer.filters
    layout = planes.plan_planes(layer, entries)
    assert layout.channel_blocks(layer.channels, entries) > 2
    assert layout.channel_blocks(layer.channels, entries / 100) == 1


def test_few_registers_are_not_overrun() -> None:
    for width in range(1, 40):
        for vectors in (1, 2):
            for variant, _, _ in cover_map(9, width, vectors, 50, 8):
                tile = BLOCK_TILES[variant]
                pixels = tile.rows * tile.cols
                assert pixels == 1 or pixels * vectors * tile.unroll + vectors + 1 <= 8


@pytest.mark.parametrize("vectors", [1, 2])
def test_tiles_cover_every_pixel_once(vectors: int) -> None:
    for height, width in [(1, 1), (7, 7), (5, 33), (28, 28), (3, 200), (19, 13)]:
        seen = np.zeros((height, width), int)
        for variant, top, left in cover_map(height, width, vectors, 144, 32):
            tile = BLOCK_TILES[variant]
            seen[top : top + tile.rows, left : left + tile.cols] += 1
        assert (seen == 1).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_residual_may_be_the_output_itself(kernel: Kernel) -> None:
    weight, bias, x, residual = data(BASE)
    program = Program(1)
    source, out = program.buffer(16, 7, 7, halo=1), program.buffer(16, 7, 7, halo=1)
    epilogue = Epilogue(residual=out)
    program.conv(source, out, BASE.layer, torch.from_numpy(weight), torch.from_numpy(bias), kernel, epilogue)
    program.finish()
    program.memory.interior_NHWC(source)[:] = x.transpose(0, 2, 3, 1)
    program.memory.interior_NHWC(out)[:] = residual.transpose(0, 2, 3, 1)
    program.time_us(1)
    truth = conv2d(x, weight, bias, padding=(1, 1), residual_NKHW=residual)
    y = program.memory.interior_NHWC(out).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(y, truth, atol=RELATIVE_ERROR * np.abs(truth).max())


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_in_the_input_reaches_the_output(kernel: Kernel) -> None:
    case = replace(BASE, density=1.0, residual=False)
    weight, bias, x, _ = data(case)
    program = Program(1)
    source, out = program.buffer(16, 7, 7, halo=1), program.buffer(16, 7, 7)
    program.conv(source, out, case.layer, torch.from_numpy(weight), torch.from_numpy(bias), kernel, Epilogue(relu=True))
    program.set_input(source)
    program.set_output(out)
    program.finish()
    x[0, 0, 3, 3] = np.nan
    poisoned = np.isnan(program.run(torch.from_numpy(x)).numpy())
    assert poisoned[0, :, 2:5, 2:5].all()
    assert poisoned.sum() == 16 * 9


def test_linear_layer_equals_torch() -> None:
    linear = torch.nn.Linear(70, 10)
    program = Program(3)
    source, out = program.buffer(70, 1, 1), program.buffer(10, 1, 1)
    program.conv(source, out, LayerSpec("fc", "linear", (10, 70)), linear.weight, linear.bias, "dense")
    program.set_input(source)
    program.set_output(out)
    program.finish()
    x = torch.randn(3, 70, 1, 1)
    torch.testing.assert_close(program.run(x), linear(x.flatten(1)).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 2}, "do not fit"),
        ({"padding": (2, 2)}, "output is 7×7, must be"),
        ({"output_hw": (6, 7)}, "output is"),
        ({"weight_shape": (16, 16, 5, 3)}, "do not fit"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    program = Program(1)
    source, out = program.buffer(16, 7, 7, halo=1), program.buffer(16, 7, 7)
    layer = replace(BASE.layer, **change)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message):
        program.conv(source, out, layer, torch.zeros(16, 16, 3, 3), None, "dense")


def test_padding_without_halo_is_refused() -> None:
    program = Program(1)
    source, out = program.buffer(16, 7, 7), program.buffer(16, 7, 7)
    with pytest.raises(ModelError, match="needs a halo of 1"):
        program.conv(source, out, BASE.layer, torch.zeros(16, 16, 3, 3), None, "dense")


def test_unknown_kernel_is_refused() -> None:
    program = Program(1)
    source, out = program.buffer(16, 7, 7, halo=1), program.buffer(16, 7, 7)
    with pytest.raises(ModelError, match="known are dense, block, csr"):
        program.conv(source, out, BASE.layer, torch.zeros(16, 16, 3, 3), None, "fast")  # type: ignore[arg-type]
