"""What rows and networks of a GPU promise; the same code runs on a CPU here, with the CPU forms of its kernels."""

from __future__ import annotations

import pytest
import torch
from networks import PLANNED, resnet
from torch import nn

from autoprune.core.choices import NM, Block, Channels, Choice, Dense, Fine
from autoprune.core.errors import MeasurementError, MissingLatency, UnknownName
from autoprune.core.layers import LayerSpec
from autoprune.kernels.fused import FusedNetwork, activation_bytes
from autoprune.kernels.gpu_layers import LayerModule, Place, Source, build_layer
from autoprune.kernels.plan import build_plan
from autoprune.lut.build import Pace, build_table
from autoprune.lut.calibrate import calibrate
from autoprune.lut.context import Context
from autoprune.lut.deploy import masked_copy
from autoprune.lut.gpu_channels import narrowed_layers, narrowed_us, widths, with_narrowed
from autoprune.lut.gpu_deploy import GpuDeployer, dense_forms, gpu_plan, network_us
from autoprune.lut.gpu_families import SemiFamily, Variant
from autoprune.lut.gpu_rows import GpuBench
from autoprune.lut.gpu_timer import HostBackend
from autoprune.lut.row import Row, Unmeasured
from autoprune.lut.table import LatencyTable
from autoprune.lut.tile_model import DeviceModel, known_device
from autoprune.search.on_gpu import device_deployer

CPU = Place(torch.device("cpu"), torch.float32)
CONTEXT = Context(device="cpu", gpu="none", batch=2, cache="network")
CONV = LayerSpec("a", "conv", (32, 16, 3, 3), padding=(1, 1), input_hw=(12, 12), output_hw=(12, 12))
HOST = DeviceModel("a host", {"float32": 0.5}, 0.5, 1e11, 1e12, 1 << 20, 1, 0.0)


def _bench(**changes: object) -> GpuBench:
    return GpuBench(CONTEXT, HOST, HostBackend(1 << 15), **changes)  # type: ignore[arg-type]


class Torch:
    """Makes dense layers."""

    def reads_halo(self, layer: LayerSpec, choice: Choice) -> bool:
        return False

    def writes_ring(self, layer: LayerSpec, choice: Choice) -> bool:
        return False

    def make(self, source: Source) -> LayerModule:
        return build_layer("dense", "nhwc", source, CPU)


class Ringed:
    """Makes Block-ELL layers that read and write borders wherever they may."""

    def __init__(self, writers: bool) -> None:
        self.writers = writers
        self.borders: list[tuple[bool, tuple[int, int]]] = []

    def reads_halo(self, layer: LayerSpec, choice: Choice) -> bool:
        return layer.op == "conv" and layer.dilation == (1, 1)

    def writes_ring(self, layer: LayerSpec, choice: Choice) -> bool:
        return self.writers and self.reads_halo(layer, choice)

    def make(self, source: Source) -> LayerModule:
        self.borders.append((source.prepadded, source.ring))
        kernel = "ell" if self.reads_halo(source.layer, source.choice) else "dense"
        return build_layer(kernel, "" if kernel == "ell" else "nhwc", source, CPU)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("writers", [True, False])
def test_borders_are_written_by_producers_or_copied(name: str, writers: bool) -> None:
    make, shape = PLANNED[name]
    model, x = make(), torch.randn(2, *shape)
    factory = Ringed(writers)
    network = FusedNetwork(build_plan(model, x, {}), factory, {})  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(network(x), model(x), atol=1e-4, rtol=1e-4)
    if name == "resnet":
        assert any(prepadded for prepadded, _ in factory.borders)
        assert any(ring == (1, 1) for _, ring in factory.borders) == writers


@pytest.mark.parametrize("name", PLANNED)
def test_fused_network_computes_what_the_model_does(name: str) -> None:
    make, shape = PLANNED[name]
    model, x = make(), torch.randn(3, *shape)
    plan = build_plan(model, x, {})
    network = FusedNetwork(plan, Torch(), {})  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(network(x), model(x), atol=1e-4, rtol=1e-4)
    with torch.enable_grad():
        assert network(x).requires_grad  # nothing in place gets into the way of training


def test_alive_maps_are_counted_once_per_batch() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU())
    plan = gpu_plan(model, torch.zeros(1, 1, 5, 5))
    assert activation_bytes(plan, 3, 2) == 3 * 2 * 25 * (4 + 2)


@pytest.mark.parametrize("config", ["nhwc", "nchw"])
def test_layers_add_bias_and_residual_before_the_relu(config: str) -> None:
    weight, bias = torch.randn(CONV.weight_shape), torch.randn(32)
    layer = build_layer("dense", config, Source(CONV, Dense(), weight, bias), CPU)
    x, residual = torch.randn(2, 16, 12, 12), torch.randn(2, 32, 12, 12)
    want = torch.relu(nn.functional.conv2d(x, weight, bias, padding=1) + residual)
    kept = residual.clone()
    with torch.no_grad():
        assert torch.allclose(layer(x, residual), want, atol=1e-4)
    assert torch.equal(residual, kept)
    assert layer.weight_bytes == 4 * (CONV.weights + 32)


def test_removed_channels_are_a_smaller_convolution() -> None:
    weight, bias = torch.randn(CONV.weight_shape), torch.zeros(32)
    layer = build_layer("dense", "nhwc", Source(CONV, Channels(0.25), weight, bias), CPU)
    with torch.no_grad():
        assert layer(torch.randn(1, 16, 12, 12)).shape == (1, 32, 12, 12)  # no kernel is faster below 32
        wide = LayerSpec("w", "conv", (128, 16, 3, 3), padding=(1, 1), input_hw=(4, 4), output_hw=(4, 4))
        source = Source(wide, Channels(0.4), torch.randn(wide.weight_shape), torch.zeros(128))
        assert build_layer("dense", "nhwc", source, CPU)(torch.randn(1, 16, 4, 4)).shape == (1, 64, 4, 4)
    with pytest.raises(UnknownName, match=r"no kernel 'dens'\. Did you mean 'dense'"):
        build_layer("dens", "", Source(CONV, Dense(), weight, bias), CPU)


def test_rows_hold_winner_columns_floor_and_prediction() -> None:
    found = _bench(clock=lambda: 1234.0).measure(CONV, [Channels(0.5), Dense()], None)
    dense, half = found[CONV.signature, "dense"], found[CONV.signature, Channels(0.5).text]
    assert isinstance(dense, Row)
    assert dense.kernel == "dense"
    assert dense.config in ("nhwc", "nchw")
    assert dense.warm is not None
    assert dense.cold is not None
    assert (dense.p10, dense.p90) == (dense.cold.p10, dense.cold.p90)  # 32 KiB do not hold its maps
    assert dense.floor_us == pytest.approx(2 * 2 * CONV.macs / 0.5e6)
    assert dense.model_us is not None
    assert dense.model_us > dense.floor_us
    assert dense.clock_mhz == 1234.0
    assert isinstance(half, Row | Unmeasured)


def test_choice_whose_floor_cannot_beat_dense_is_not_timed() -> None:
    fast = Row(p10=0.001, p50=0.001, p90=0.001, weight_bytes=1, kernel="dense")
    (outcome,) = _bench().measure(CONV, [Channels(0.5)], fast).values()
    assert isinstance(outcome, Unmeasured)
    assert outcome.reason == "floor"
    assert outcome.bound_us is not None
    assert outcome.bound_us > fast.p50


def test_choice_that_no_kernel_runs_says_so_and_a_dense_layer_must_run() -> None:
    slow = Row(p10=1e6, p50=1e6, p90=1e6, weight_bytes=1, kernel="dense")
    (outcome,) = _bench(known={}).measure(CONV, [Fine(keep=0.99)], slow).values()
    assert isinstance(outcome, Unmeasured)
    assert outcome.reason == "kernel"
    broken = LayerSpec("odd", "conv", (16, 16, 3, 3), groups=3, input_hw=(8, 8), output_hw=(8, 8))
    with pytest.raises(MeasurementError, match=r"layer 'odd'.*dense nhwc"):
        _bench().measure(broken, [Dense()], None)


def test_narrower_forms_are_measured_in_steps_of_32_and_a_width_between_takes_the_best_wider_row() -> None:
    assert widths(512) == (512, 384, 256, 128)
    assert widths(64) == (64, 32)
    assert widths(96) == (96, 64, 32)
    assert widths(16) == (16,)
    layer = LayerSpec("a", "conv", (64, 96, 3, 3), padding=(1, 1), input_hw=(6, 6), output_hw=(6, 6))
    forms = narrowed_layers(layer)
    assert {(form.filters, form.channels) for form in forms} == {
        (64, 64), (64, 32), (32, 96), (32, 64), (32, 32)
    }
    bench = _bench()
    table = build_table({layer: ()}, CONTEXT, bench=bench)
    stopped = with_narrowed(table, [layer], bench, Pace(1e-9))
    assert set(stopped.rows) == set(table.rows)
    table = with_narrowed(table, [layer], bench, Pace())
    assert len(table.rows) == 6
    assert with_narrowed(table, [layer], bench, Pace()).rows == table.rows
    rows = {(form.filters, form.channels): table.layer_us(form, Dense()) for form in (layer, *forms)}
    assert narrowed_us(table, layer, 40, 65) == min(rows[64, 96], 1e9)
    assert narrowed_us(table, layer, 32, 33) == min(rows[64, 96], rows[64, 64], rows[32, 96], rows[32, 64])
    with pytest.raises(MissingLatency, match="3 filters of 4 channels"):
        narrowed_us(LatencyTable(CONTEXT), layer, 3, 4)


class Offering:
    """A family whose configurations take as long as their name says, but for one that fails."""

    name = "dense"

    def __init__(self, model_us: dict[str, float]) -> None:
        self.model_us = model_us

    def variants(self, layer: LayerSpec, choice: Choice, context: Context, device: DeviceModel) -> list[Variant]:
        return [Variant(self.name, config, us) for config, us in self.model_us.items()]


def test_best_five_configurations_are_tried_and_the_hopeless_left_out() -> None:
    offering = Offering({"nhwc": 5.0, "nchw": 3.0, "a": 7.0, "b": 4.0, "c": 3.5, "d": 3.2, "e": 6.0})
    bench = _bench(known={"dense": offering})
    tried = [variant.config for variant in bench.variants(CONV, Fine(keep=0.5))]
    assert tried == ["nchw", "d", "c", "b", "nhwc"]
    assert len(bench.variants(CONV, Dense())) == 7


def test_training_rows_hold_forward_and_gradients() -> None:
    context = CONTEXT.model_copy(update={"direction": "training"})
    bench = GpuBench(context, HOST, HostBackend(1 << 16))
    forward, training = _bench(), bench
    rows = [b.measure(CONV, [Dense()], None)[CONV.signature, "dense"] for b in (forward, training)]
    assert all(isinstance(row, Row) for row in rows)
    assert bench.bound_us(CONV, Channels(0.5)) == pytest.approx(3.0 * forward.bound_us(CONV, Channels(0.5)))


def test_semi_structured_rows_are_for_matrices_in_units_of_the_tensor_cores() -> None:
    device = known_device("NVIDIA H200")
    assert device is not None
    context = Context(device="cuda", batch=32, dtype="bfloat16", cache="network")
    pointwise = LayerSpec("p", "conv", (64, 128, 1, 1), input_hw=(14, 14), output_hw=(14, 14))
    offered = [
        bool(SemiFamily().variants(layer, choice, context, device))
        for layer, choice in ((pointwise, NM(2, 4)), (pointwise, NM(1, 4)), (CONV, NM(2, 4)))
    ]
    assert offered == [True, False, False]


@pytest.fixture(scope="module")
def built() -> tuple[nn.Module, LatencyTable, dict[LayerSpec, tuple[Choice, ...]]]:
    model = resnet()
    plan = gpu_plan(model, torch.zeros(1, 1, 12, 12))
    wanted: dict[LayerSpec, tuple[Choice, ...]] = {op.layer: (Dense(), Block(keep=0.25)) for op in plan.convs}
    return model, build_table(wanted, CONTEXT, bench=_bench()), wanted


def test_network_of_rows_computes_the_masked_model(
    built: tuple[nn.Module, LatencyTable, dict[LayerSpec, tuple[Choice, ...]]]
) -> None:
    model, table, _ = built
    x = torch.randn(2, 1, 12, 12)
    deployer = GpuDeployer(gpu_plan(model, x), x, table)
    with torch.no_grad():
        assert torch.allclose(deployer.network({})(x), model(x), atol=1e-4)
    assert deployer.network({}).layer("fc") is deployer.network({}).layer("fc")  # layers are made once
    times = network_us(dense_forms(model, gpu_plan(model, x), table, x), HostBackend(1 << 16))
    assert set(times) == {"plan", "torch-channels-last", "torch-folded"}
    assert min(times.values()) > 0.0


def test_search_deploys_and_times_networks_on_the_tables_device(
    built: tuple[nn.Module, LatencyTable, dict[LayerSpec, tuple[Choice, ...]]]
) -> None:
    model, table, wanted = built
    quick = Row(p10=0.1, p50=0.1, p90=0.1, weight_bytes=1, kernel="ell")
    chosen = {layer.name: Block(keep=0.25) for layer in wanted if layer.op == "conv" and layer.filters >= 16}
    table = table.with_rows({(la.signature, Block(keep=0.25).text): quick for la in wanted if la.name in chosen})
    pruned = masked_copy(model, chosen)
    x = torch.randn(2, 1, 12, 12)
    deployer = device_deployer(model, x, table, tuple(wanted), HostBackend(1 << 15))
    network = deployer.deploy(pruned, chosen)
    with torch.no_grad():
        assert torch.allclose(network(x), pruned(x), atol=1e-4, rtol=1e-4)
    kernels = {layer: kernel for layer, _, kernel, _ in network.explain()}
    assert all(kernels[name] == "ell" for name in chosen)
    profile = network.profile_us(2)
    assert {layer.name for layer in wanted} <= set(profile)
    assert min(profile.values()) > 0.0
    times, dense_us = deployer.compare_us({"one": network, "two": network})
    assert set(times) == {"one", "two"}
    assert min(*times.values(), dense_us) > 0.0
    assert deployer.references.best in ("plan", "torch-channels-last", "torch-folded")


def test_calibration_takes_the_devices_own_timer(
    built: tuple[nn.Module, LatencyTable, dict[LayerSpec, tuple[Choice, ...]]]
) -> None:
    _, table, wanted = built
    quick = Row(p10=0.1, p50=0.1, p90=0.1, weight_bytes=1, kernel="dense", config="nhwc")
    table = table.with_rows({(layer.signature, Block(keep=0.25).text): quick for layer in wanted})
    calls = 0

    def timer(runs: object) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {name: 2.0 * sums[int(name)] + 5.0 for name in runs}  # type: ignore[attr-defined]

    sums: list[float] = []

    def deploy(choices: object) -> object:
        sums.append(table.rows_us(wanted, choices))  # type: ignore[arg-type]
        return lambda: None

    space = {layer.name: choices for layer, choices in wanted.items()}
    fitted = calibrate(table, list(wanted), deploy, space, 0, 30, timer=timer)  # type: ignore[arg-type]
    assert fitted.calibration is not None
    assert len(fitted.calibration.points) == 30
    assert fitted.calibration.slope == pytest.approx(2.0)
    assert calls == 1


def test_layer_modules_without_a_kernel_refuse_to_run() -> None:
    with pytest.raises(TypeError, match="no forward pass"):
        LayerModule()(torch.zeros(1))
