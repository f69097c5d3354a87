"""Dispatch: the table's winner, dense included, and conversion for a GPU through the operators' CPU forms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from networks import NESTED, PLANNED, resnet
from torch import Tensor, nn

from autoprune.core.choices import CK, NM, Block, Channels, Choice, Dense, Fine, Pattern, Window
from autoprune.core.errors import DeviceError, MissingLatency, ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.convert import convert, deploy_on
from autoprune.kernels.deployed import DeployedModel
from autoprune.kernels.dispatch import CPU, Place, Timed, decide, ell_density, kernels_for, lookup_of, refusal
from autoprune.kernels.formats.ell import Tile
from autoprune.kernels.fused import FusedNetwork
from autoprune.kernels.gpu import GpuModel, HostModel
from autoprune.kernels.gpu_layers import DenseLayer, EllLayer, SemiLayer, SpmmLayer
from autoprune.kernels.nested import layers_by_hooks
from autoprune.kernels.semi_structured import SemiStructuredLayer
from autoprune.kernels.triton.configs import candidates
from autoprune.kernels.triton.layers import ELLConv2d
from autoprune.kernels.triton.spmm_layers import SparseConv2d, SparseLinear
from autoprune.lut.deploy import masked_copy
from autoprune.lut.row import Row
from autoprune.sparsity.masks import make_mask

HALF = Place("cuda", torch.bfloat16)
CONV = LayerSpec("conv", "conv", (128, 128, 3, 3), padding=(1, 1), input_hw=(14, 14), output_hw=(14, 14))
WIDE = LayerSpec("wide", "conv", (256, 64, 1, 1), input_hw=(14, 14), output_hw=(14, 14))
FC = LayerSpec("fc", "linear", (1000, 512))
SHARED = Pattern(count=8, entries=4, kernels=0.5, share=(64, 8))
TRUE = Pattern(count=8, entries=4, kernels=0.5)


@pytest.mark.parametrize(
    ("choice", "layer", "place", "kernels"),
    [
        (Dense(), CONV, CPU, ("dense",)),
        (Channels(keep=0.5), CONV, HALF, ("dense",)),
        (Block(keep=0.25), CONV, CPU, ("block", "dense")),
        (NM(n=2, m=4), WIDE, CPU, ("csr", "dense")),
        (TRUE, CONV, CPU, ("csr", "dense")),
        (SHARED, CONV, HALF, ("ell", "spmm", "dense")),
        (TRUE, CONV, HALF, ("spmm", "dense")),
        (Fine(keep=0.1), FC, HALF, ("spmm", "dense")),
        (CK(keep=0.3), CONV, HALF, ("spmm", "dense")),
        (Block(keep=0.05, filters=32), CONV, HALF, ("ell", "spmm", "dense")),
        (NM(n=2, m=4), WIDE, HALF, ("semi", "spmm", "dense")),
        (NM(n=2, m=4), WIDE, Place("cuda", torch.float32), ("spmm", "dense")),
        (NM(n=2, m=4), FC, HALF, ("spmm", "dense")),
        (NM(n=1, m=4), WIDE, HALF, ("spmm", "dense")),
    ],
    ids=str,
)
def test_kernels_of_a_choice(choice: Choice, layer: LayerSpec, place: Place, kernels: tuple[str, ...]) -> None:
    assert kernels_for(choice, layer, place) == kernels


@pytest.mark.parametrize(
    ("kernel", "choice", "layer", "words"),
    [
        ("semi", NM(n=2, m=4), FC, "1000x512 weight is no multiple of 32x64"),
        ("semi", NM(n=2, m=4), CONV, "not a 1x1"),
        ("semi", Fine(keep=0.5), WIDE, r"not nm\(n=2,m=4\)"),
        ("ell", TRUE, CONV, "100% of its groups"),
        ("ell", Fine(keep=0.5), FC, "not a convolution"),
    ],
)
def test_refusals_say_why(kernel: str, choice: Choice, layer: LayerSpec, words: str) -> None:
    assert re.search(words, refusal(kernel, choice, layer, HALF) or "")  # type: ignore[arg-type]


def test_masks_shared_by_whole_groups_lose_nothing_in_block_ell() -> None:
    assert ell_density(SHARED, CONV) == pytest.approx(2 / 9)
    assert ell_density(Pattern(count=8, entries=4, share=(32, 1)), CONV) > 0.9
    small = LayerSpec("small", "conv", (16, 8, 3, 3))
    assert ell_density(Pattern(count=8, entries=4, kernels=0.5, share=(16, 8)), small) == pytest.approx(2 / 9)


def _lookup(rows: Mapping[str, Mapping[str, float]]) -> object:
    return lambda layer, choice: {name: Timed(us, "64x2") for name, us in rows.get(choice.text, {}).items()}


@pytest.mark.parametrize(
    ("own", "dense", "kernel", "why"),
    [
        ({"ell": 12.3}, {"cudnn-nhwc": 20.1}, "ell", "ell kernel: 12.3 us against 20.1 us dense"),
        ({"ell": 12.3, "spmm": 80.0}, {"a": 30.0, "b": 20.1}, "ell", "against 20.1 us dense, spmm 80.0 us"),
        ({"spmm": 11.0, "ell": 12.3}, {"dense": 20.1}, "spmm", "spmm kernel: 11.0 us"),
        ({"ell": 20.1}, {"dense": 20.1}, "dense", "left dense because the ell kernel is not faster: 20.1 us"),
        ({"spmm": 90.0}, {"dense": 20.1}, "dense", "left dense because the spmm kernel is not faster"),
        ({}, {"dense": 20.1}, "dense", "left dense because the table has a dense row and none of a sparse kernel"),
        ({"semi": 1.0}, {"dense": 20.1}, "dense", "none of a sparse kernel"),
        ({"ell": 1.0}, {}, "ell", "ell kernel multiplies 22% of the layer; the table has no row to compare it by"),
    ],
)
def test_the_fastest_row_wins_and_the_reason_names_the_figures(
    own: Mapping[str, float], dense: Mapping[str, float], kernel: str, why: str
) -> None:
    decision = decide(CONV, SHARED, HALF, _lookup({SHARED.text: own, "dense": dense}))  # type: ignore[arg-type]
    assert (decision.layer, decision.choice, decision.kernel) == ("conv", SHARED.text, kernel)
    assert why in decision.why
    assert decision.config == ("64x2" if "kernel: " in decision.why else "")


@pytest.mark.parametrize(
    ("choice", "layer", "kernel", "why"),
    [
        (TRUE, CONV, "dense", "spmm multiplies 22% and pays below 4%"),
        (Fine(keep=0.02), CONV, "spmm", "spmm kernel multiplies 2%"),
        (NM(n=2, m=4), WIDE, "semi", "semi kernel"),
        (Window(entries=2), LayerSpec("g", "conv", (8, 4, 3, 3), dilation=(2, 2)), "dense", "no spmm kernel: dilation"),
        (Dense(), CONV, "dense", "dense by policy"),
    ],
)
def test_without_rows_only_what_is_expected_to_pay_leaves_dense(
    choice: Choice, layer: LayerSpec, kernel: str, why: str
) -> None:
    decision = decide(layer, choice, HALF)
    assert decision.kernel == kernel
    assert why in decision.why


@dataclass(frozen=True)
class _Row:
    p50: float
    kernel: str
    config: str = ""


class _Table:
    """Rows with kernels, of one choice and of dense, as a GPU's table has them."""

    def __init__(self, rows: Mapping[str, _Row]) -> None:
        self.rows = rows

    def row(self, layer: LayerSpec, choice: Choice) -> _Row:
        if choice.text not in self.rows:
            raise MissingLatency("absent")
        return self.rows[choice.text]

    def layer_us(self, layer: LayerSpec, choice: Choice) -> float:
        return self.row(layer, choice).p50


def test_a_table_names_the_kernel_of_its_rows_on_a_gpu_alone() -> None:
    table = _Table({"dense": _Row(9.0, "cudnn"), SHARED.text: _Row(3.0, "ell", "a")})
    gpu, cpu = lookup_of(table, HALF), lookup_of(table, CPU)
    assert (gpu(CONV, SHARED), gpu(CONV, Dense())) == ({"ell": Timed(3.0, "a")}, {"cudnn": Timed(9.0)})
    assert cpu(CONV, SHARED) == {"block": Timed(3.0)}
    assert gpu(CONV, TRUE) == {}
    assert lookup_of(None)(CONV, SHARED) == {}


def _inputs(batch: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(5))


class _Always(_Table):
    """Rows in which the kernel of every choice beats dense."""

    def __init__(self, kernel: str, config: str = "") -> None:
        super().__init__({})
        self.kernel, self.config = kernel, config

    def row(self, layer: LayerSpec, choice: Choice) -> _Row:
        return _Row(9.0, "cudnn") if isinstance(choice, Dense) else _Row(1.0, self.kernel, self.config)


def _choices(model: nn.Module, choice: Choice, x: Tensor) -> dict[str, Choice]:
    layers = layers_by_hooks(model, x)
    return {name: choice for name, layer in layers.items() if choice.fits(layer.spec) and layer.spec.channels > 3}


def _assert_close(deployed: DeployedModel, masked: nn.Module, x: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        want, got = masked(x), deployed(x.to(deployed.example.dtype)).float()
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "choice"),
    [
        ("spmm", Fine(keep=0.2)),
        ("spmm", TRUE),
        ("spmm", CK(keep=0.4)),
        ("spmm", NM(n=2, m=4)),
        ("ell", Pattern(count=8, entries=4, kernels=0.5, share=(16, 8))),
        ("ell", Block(keep=0.01)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["resnet", "functional", "tokens", "depthwise", "perceptron"])
def test_network_for_a_gpu_gives_the_masked_networks_outputs(
    name: str, kernel: str, choice: Choice, dtype: torch.dtype
) -> None:
    make, shape = {**PLANNED, **NESTED}[name]
    model, x = make(), _inputs(2, shape)
    choices = _choices(model, choice, x)
    masked = masked_copy(model, choices)
    deployed = deploy_on(torch.device("cpu"), masked, choices, x, _Always(kernel), dtype)
    assert isinstance(deployed, GpuModel)
    kinds = (SparseConv2d, SparseLinear) if kernel == "spmm" else (ELLConv2d,)
    told = {layer: found for layer, _, found, _ in deployed.explain()}
    replaced = {name for name in told if any(isinstance(m, kinds) for m in deployed.layer(name).modules())}
    assert replaced == {layer for layer, found in told.items() if found == kernel}
    assert isinstance(deployed.network, FusedNetwork) == (name in PLANNED)
    served = {n for n, c in choices.items() if kernel == "spmm" or isinstance(model.get_submodule(n), nn.Conv2d)}
    assert replaced == served
    for batch in (2, 3):
        _assert_close(deployed, masked, _inputs(batch, shape), 1e-4 if dtype == torch.float32 else 5e-2)


def test_network_for_a_gpu_without_rows_stays_dense_where_nothing_pays() -> None:
    model, x = resnet(), _inputs(1, (1, 12, 12))
    choices: dict[str, Choice] = {"layer1.0.conv1": TRUE, "layer2.0.conv1": Fine(keep=0.03)}
    deployed = deploy_on(torch.device("cpu"), masked_copy(model, choices), choices, x)
    told = {layer: kernel for layer, _, kernel, _ in deployed.explain()}
    assert (told["layer1.0.conv1"], told["layer2.0.conv1"]) == ("dense", "spmm")
    assert deployed.example.dtype == torch.bfloat16
    assert len(deployed.time_us(2)) == 2


class _Viewed(nn.Module):
    """No plan, because of its sigmoid, and flattened by a view that channels-last maps refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 36, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).sigmoid())
        return self.fc(y.view(y.size(0), -1))


def test_code_that_flattens_by_view_runs_on_contiguous_maps() -> None:
    torch.manual_seed(0)
    model, x = _Viewed().eval().requires_grad_(False), _inputs(2, (3, 6, 6))
    choices: dict[str, Choice] = {"second": Block(keep=0.01)}
    masked = masked_copy(model, choices)
    deployed = deploy_on(torch.device("cpu"), masked, choices, x, _Always("ell"), torch.float32)
    assert deployed.memory_format == torch.contiguous_format
    _assert_close(deployed, masked, x, 1e-4)
    assert deploy_on(torch.device("cpu"), resnet(), {}, _inputs(1, (1, 12, 12))).memory_format == torch.channels_last


def test_layers_run_on_the_configuration_that_was_measured() -> None:
    model, x = resnet(), _inputs(1, (1, 12, 12))
    name, choice = "layer2.0.conv2", Pattern(count=8, entries=4, kernels=0.5, share=(32, 8))
    masked = masked_copy(model, {name: choice})
    config = candidates(LayerSpec("a", "conv", (32, 32, 3, 3), output_hw=(6, 6)), 1, torch.bfloat16)[-1]
    for kernel, text in (("ell", config.text), ("spmm", "64x16-w2")):
        deployed = deploy_on(torch.device("cpu"), masked, {name: choice}, x, _Always(kernel, text))
        layer = deployed.layer(name)
        if isinstance(layer, EllLayer):
            options = layer.conv.options
            assert (options.launch.forward, options.tile) == (config, Tile(config.bn, config.bk))
        else:
            assert isinstance(layer, SpmmLayer)
            assert layer.module.config == text
        _assert_close(deployed, masked, x, 5e-2)


class _Head(nn.Module):
    """A pointwise convolution with a stride, and a linear layer, both of whole 2:4 tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 1, stride=2)
        self.fc = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean([2, 3]))


def test_two_of_four_runs_on_semi_structured_layers_on_a_gpu_and_on_csr_on_a_cpu() -> None:
    torch.manual_seed(0)
    model, x = _Head().eval().requires_grad_(False), _inputs(3, (64, 7, 7))
    choices: dict[str, Choice] = {"conv": NM(n=2, m=4), "fc": NM(n=2, m=4)}
    masked = masked_copy(model, choices)
    gpu = deploy_on(torch.device("cpu"), masked, choices, x)
    assert all(isinstance(gpu.layer(name), SemiLayer) for name in choices)
    _assert_close(gpu, masked, x, 5e-2)
    cpu = convert(masked, choices, x)
    assert [kernel for _, _, kernel, _ in cpu.explain()] == ["csr", "csr"]
    _assert_close(cpu, masked, x, 1e-4)


@pytest.mark.parametrize("choice", [NM(n=2, m=4), NM(n=1, m=8)], ids=str)
def test_n_of_m_runs_on_the_csr_kernel_in_a_whole_network(choice: Choice) -> None:
    model, x = resnet(16), _inputs(2, (16, 12, 12))
    choices = _choices(model, choice, x)
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, x)
    assert {kernel for layer, _, kernel, _ in deployed.explain() if layer in choices} == {"csr"}
    _assert_close(deployed, masked, x, 1e-4)


def test_semi_structured_layer_refuses_weights_that_are_not_two_of_four() -> None:
    layer = nn.Linear(64, 32)
    with pytest.raises(ModelError, match="more than 2 weights"):
        SemiStructuredLayer(layer)
    with torch.no_grad():
        layer.weight.mul_(make_mask(layer.weight, NM(n=2, m=4)))
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(SemiStructuredLayer(layer)(x), layer(x))
    with pytest.raises(ModelError, match="1x1"):
        SemiStructuredLayer(nn.Conv2d(8, 8, 3))


def test_network_for_a_gpu_stays_where_it_is_and_says_what_it_takes() -> None:
    model, x = resnet(), _inputs(1, (1, 12, 12))
    deployed = deploy_on(torch.device("cpu"), model, {}, x)
    with pytest.raises(ModelError, match=r"takes torch.bfloat16 .* got torch.float32"):
        deployed(x)
    with pytest.raises(ModelError, match=r"stays in torch\.bfloat16"):
        deployed.float()
    assert deployed.to(torch.bfloat16) is deployed


def test_accuracy_is_asked_with_the_hosts_tensors() -> None:
    model, x = resnet(), _inputs(2, (1, 12, 12))
    answer = HostModel(deploy_on(torch.device("cpu"), model, {}, x))(x)
    assert (answer.dtype, answer.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(answer, model(x), atol=5e-2 * float(model(x).abs().max()), rtol=0.0)


class _RingTable(_Always):
    """Rows in which a dense layer that writes a border for its reader costs less than a copy."""

    def row(self, layer: LayerSpec, choice: Choice) -> Row:  # type: ignore[override]
        found = super().row(layer, choice)
        config = candidates(layer, 1, torch.float32)[0].text if layer.op == "conv" else ""
        kernel, own = ("dense", "nchw") if found.kernel == "cudnn" else (found.kernel, "")
        return Row(
            p10=1.0, p50=found.p50, p90=9.0, weight_bytes=1, kernel=kernel, config=own, ring_us=10.0,
            ring_config=config, pad_us=3.0,
        )


def test_dense_layers_write_the_borders_of_sparse_readers_where_rows_say_it_pays() -> None:
    model, x = resnet(), _inputs(2, (1, 12, 12))
    choices: dict[str, Choice] = {"layer1.0.conv2": Pattern(count=8, kernels=0.5, share=(16, 8))}
    masked = masked_copy(model, choices)
    for table, kernel in ((_RingTable("ell"), EllLayer), (_Always("ell"), DenseLayer)):
        deployed = deploy_on(torch.device("cpu"), masked, choices, x, table, torch.float32)
        assert isinstance(deployed.layer("layer1.0.conv2"), EllLayer)
        assert isinstance(deployed.layer("layer1.0.conv1"), kernel)  # the producer
        assert isinstance(deployed.layer("layer2.0.conv1"), DenseLayer)
        _assert_close(deployed, masked, x, 1e-4)


def test_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no NVIDIA GPU"):
        convert(resnet(), {}, _inputs(1, (1, 12, 12)), device="cuda")
    with pytest.raises(DeviceError, match="cpu or cuda"):
        convert(resnet(), {}, _inputs(1, (1, 12, 12)), device="tpu")
