"""What conversion promises: the masked model's outputs, whatever runs them, and an account of every layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import NESTED, PLANNED, Concatenated, Depthwise, resnet, settled
from torch import Tensor, nn

from autoprune.core.choices import CK, Block, Choice, Combined, Dense, Fine, Pattern, Window
from autoprune.core.errors import MissingLatency, ModelError, PolicyError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.kernels.convert import DeployedModel, NestedModel, PlannedModel, convert
from autoprune.kernels.deployed import tile_of
from autoprune.kernels.modules import ProgramLayer
from autoprune.kernels.plan_ops import layer_spec
from autoprune.lut.deploy import deployer, masked_copy

CHOICES: tuple[Choice, ...] = (
    Block(keep=0.3),
    Block(keep=0.25, filters=32),
    Pattern(count=8, entries=4, kernels=0.5, share=(16, 1)),
    Pattern(count=4, entries=4, kernels=1.0),
    Fine(keep=0.2),
    CK(keep=0.25),
    Window(entries=3),
    Combined(keep=0.2),
)


def _choices(model: nn.Module, choice: Choice, shape: tuple[int, ...]) -> dict[str, Choice]:
    """Give ``choice`` to every layer that can take it, shapes found by running the model."""
    found: dict[str, Choice] = {}

    def look(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if choice.fits(layer_spec(name, module, x.shape, y.shape)):
            found[name] = choice

    handles = [
        module.register_forward_hook(lambda m, x, y, name=name: look(name, m, x[0], y))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    model(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    assert found
    return found


def _assert_same(deployed: DeployedModel, model: nn.Module, x: Tensor) -> None:
    want = model(x)
    got = deployed(x)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def _inputs(batch: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.text)
def test_deployed_network_computes_the_masked_model(choice: Choice) -> None:
    model = resnet()
    choices = _choices(model, choice, (1, 12, 12))
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, _inputs(2, (1, 12, 12)))
    assert isinstance(deployed, PlannedModel)
    for batch in (2, 1, 35):
        x = _inputs(batch, (1, 12, 12))
        _assert_same(deployed, masked, x)
        _assert_same(deployed, masked, x.contiguous(memory_format=torch.channels_last))
    assert deployed(torch.empty(0, 1, 12, 12)).shape == (0, 10)
    kernels = {layer: kernel for layer, _, kernel, _ in deployed.explain()}
    assert all(kernels[name] == choice.kernel for name in choices)


@pytest.mark.parametrize("choice", [Fine(keep=0.3), Block(keep=0.5)], ids=lambda choice: choice.text)
@pytest.mark.parametrize("name", [*PLANNED, *NESTED])
def test_every_kind_of_network_converts(name: str, choice: Choice) -> None:
    make, shape = {**PLANNED, **NESTED}[name]
    model = make()
    choices = _choices(model, choice, shape)
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, _inputs(2, shape))
    assert isinstance(deployed, PlannedModel if name in PLANNED else NestedModel)
    for batch in (2, 1):
        _assert_same(deployed, masked, _inputs(batch, shape))


def test_nested_conversion_says_what_is_in_the_way_and_what_it_left_to_torch() -> None:
    model = settled(Depthwise())
    choices: dict[str, Choice] = {"project": Block(keep=0.5)}
    deployed = convert(masked_copy(model, choices), choices, _inputs(1, (3, 9, 9)))
    assert isinstance(deployed, NestedModel)
    assert deployed.refusal.where == "gelu"
    assert [(layer, kernel) for layer, _, kernel, _ in deployed.explain()] == [
        ("expand", "dense"),
        ("depth", "torch"),
        ("project", "block"),
    ]
    assert "grouped" in dict((layer, why) for layer, _, _, why in deployed.explain())["depth"]
    assert isinstance(deployed.network.get_submodule("project"), ProgramLayer)
    assert isinstance(deployed.network.get_submodule("expand"), nn.Conv2d)
    with pytest.raises(ModelError, match="flat plan"):
        deployed.profile_us()


@pytest.mark.parametrize("tracked", [True, False])
def test_nested_conversion_folds_the_norms_that_can_be_folded(tracked: bool) -> None:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=tracked), nn.GELU())
    model = settled(body) if tracked else body.eval().requires_grad_(False)
    choices: dict[str, Choice] = {"0": Fine(keep=0.3)}
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, _inputs(4, (3, 9, 9)))
    assert isinstance(deployed, NestedModel)
    assert any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules()) is not tracked
    _assert_same(deployed, masked, _inputs(4, (3, 11, 7)))


def test_model_of_several_outputs_returns_them_all() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x), x

    x = _inputs(1, (3, 4, 4))
    model = Pair().eval()
    model.conv.weight.data[:, 1:] = 0.0
    maps, same = convert(model, {"conv": Fine(keep=0.4)}, x)(x)
    torch.testing.assert_close(maps, model(x)[0], rtol=0, atol=1e-5)
    assert torch.equal(same, x)


def test_nested_layers_take_other_sizes_and_say_no_to_other_channels() -> None:
    model = settled(Concatenated())
    choices: dict[str, Choice] = {"a": Fine(keep=0.3), "c": Block(keep=0.5)}
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, _inputs(1, (3, 10, 10)))
    _assert_same(deployed, masked, _inputs(2, (3, 13, 7)))
    assert isinstance(deployed, NestedModel)
    layer = deployed.network.get_submodule("a")
    single = _inputs(1, (3, 6, 6))[0]
    torch.testing.assert_close(layer(single), masked.get_submodule("a")(single), rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match=r"layer 'a'.*want \(N, 3, H, W\)"):
        layer(_inputs(1, (4, 6, 6)))
    with pytest.raises(ModelError, match="smaller than its window"):
        deployed.network.get_submodule("a")._spec(0, 0)


def test_plan_that_disagrees_with_the_model_is_not_used() -> None:
    model = resnet()
    model.get_submodule("layer1.0.conv1").register_forward_hook(lambda module, x, y: 2.0 * y)
    x = _inputs(2, (1, 12, 12))
    deployed = convert(model, {}, x)
    assert isinstance(deployed, NestedModel)
    assert "differ" in deployed.refusal.reason
    _assert_same(deployed, model, x)


class _Rows:
    """A latency table in which ``slow`` layers gain nothing from sparsity and ``unknown`` ones are absent."""

    def __init__(self, slow: str, unknown: str) -> None:
        self.slow, self.unknown = slow, unknown

    def layer_us(self, layer: LayerSpec, choice: Choice) -> float:
        if layer.name == self.unknown:
            raise MissingLatency("absent")
        return 10.0 if isinstance(choice, Dense) or layer.name == self.slow else 4.0


def test_table_keeps_dense_what_sparsity_does_not_speed_up() -> None:
    model = resnet()
    names = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1")
    choices: dict[str, Choice] = {name: Block(keep=0.5) for name in names}
    masked = masked_copy(model, choices)
    x = _inputs(1, (1, 12, 12))
    deployed = convert(masked, choices, x, table=_Rows(names[1], names[2]))
    told = {layer: (kernel, why) for layer, _, kernel, why in deployed.explain()}
    assert told[names[0]] == ("block", "block kernel: 4.0 us against 10.0 us dense")
    assert told[names[1]][0] == "dense"
    assert "not faster: 10.0 us against 10.0 us" in told[names[1]][1]
    assert told[names[2]][0] == "block"
    assert "no row" in told[names[2]][1]
    assert told["fc"] == ("dense", "dense by policy")
    _assert_same(deployed, masked, x)


def test_policy_that_does_not_fit_is_refused() -> None:
    model, x = resnet(), _inputs(1, (1, 12, 12))
    with pytest.raises(PolicyError, match=r"no layer 'layer1.0.conv3'. Did you mean 'layer1.0.conv2'"):
        convert(model, {"layer1.0.conv3": Dense()}, x)
    with pytest.raises(PolicyError, match="'fc' cannot take block"):
        convert(model, {"fc": Block(keep=0.5)}, x)
    with pytest.raises(PolicyError, match="no layer 'nosuch'"):
        masked_copy(model, {"nosuch": Fine(keep=0.5)})


def test_weights_that_were_never_pruned_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'layer1.0.conv1' has 100% of its weights, its choice .* keeps 25%"):
        convert(resnet(), {"layer1.0.conv1": Fine(keep=0.25)}, _inputs(1, (1, 12, 12)))


def test_policy_object_is_taken() -> None:
    model, x = resnet(), _inputs(1, (1, 12, 12))
    choices: dict[str, Choice] = {"layer1.0.conv1": Fine(keep=0.25)}
    layers = [op.layer for op in convert(model, {}, x).plan.convs]  # type: ignore[union-attr]
    masked = masked_copy(model, choices)
    _assert_same(convert(masked, Policy.make(choices, layers, model="resnet"), x), masked, x)


def test_only_float32_on_the_planned_shape_is_taken() -> None:
    model, x = resnet(), _inputs(2, (1, 12, 12))
    with pytest.raises(ModelError, match=r"float32 model.*torch.float64"):
        convert(copy.deepcopy(model).double(), {}, x.double())
    deployed = convert(model, {}, x)
    for bad in (x.double(), x[:1].half()):
        with pytest.raises(ModelError, match="float32"):
            deployed(bad)
    with pytest.raises(ModelError, match=r"planned for inputs \(N, 1, 12, 12\), got \(2, 1, 12, 11\)"):
        deployed(x[..., 1:])


def test_deployed_network_is_not_trainable_and_says_so() -> None:
    deployed = convert(resnet(), {}, _inputs(1, (1, 12, 12)))
    with pytest.raises(ModelError, match="cannot be trained"):
        deployed.train()
    assert deployed.eval() is deployed
    assert not list(deployed.parameters())
    assert not deployed(_inputs(1, (1, 12, 12)).requires_grad_()).requires_grad
    for move in (deployed.half, deployed.double, lambda: deployed.to("meta")):
        with pytest.raises(ModelError, match="float32 on the CPU"):
            move()
    assert deployed.float() is deployed


@pytest.mark.parametrize("nested", [False, True])
def test_copies_and_saved_states_stand_on_their_own(nested: bool) -> None:
    model = settled(Concatenated()) if nested else resnet(3)
    name = "a" if nested else "layer1.0.conv1"
    choices: dict[str, Choice] = {name: Fine(keep=0.25)}
    masked = masked_copy(model, choices)
    x = _inputs(2, (3, 10, 10))
    deployed = convert(masked, choices, x)
    want = deployed(x)
    twin = copy.deepcopy(deployed)
    assert torch.equal(twin(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), want)
    twin.load_state_dict({key: 2.0 * value for key, value in deployed.state_dict().items()})
    assert not torch.equal(twin(x), want)
    assert torch.equal(deployed(x), want)
    twin.load_state_dict(deployed.state_dict())
    assert torch.equal(twin(x), want)


def test_conversion_leaves_the_model_alone() -> None:
    model = masked_copy(settled(Concatenated()), {"a": Fine(keep=0.3)}).train()
    before = copy.deepcopy(model.state_dict())
    deployed = convert(model, {"a": Fine(keep=0.3)}, _inputs(1, (3, 10, 10)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert type(model.get_submodule("a")) is nn.Conv2d
    assert model.training
    want = deployed(_inputs(1, (3, 10, 10)))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(deployed(_inputs(1, (3, 10, 10))), want)


def test_threads_do_not_change_the_result() -> None:
    model, x = resnet(), _inputs(3, (1, 12, 12))
    # Two threads cut each map into bands, whose tiles add up in another order.
    torch.testing.assert_close(convert(model, {}, x, threads=2)(x), convert(model, {}, x)(x), rtol=1e-5, atol=1e-5)


def test_large_batches_run_in_equal_parts_that_fit_a_cache() -> None:
    assert tile_of(1, 100) == 1
    assert tile_of(32, 100) == 32
    assert tile_of(32, 429_000) == 4
    assert tile_of(31, 429_000) == 4
    assert tile_of(6, 429_000) == 3
    assert tile_of(32, 1 << 30) == 1
    assert tile_of(32, 1 << 30, threads=4) == 8
    model, x = resnet(), _inputs(70, (1, 24, 24))
    deployed = convert(model, {}, x)
    _assert_same(deployed, model, x)
    assert all(shape[0] < 70 for shape in deployed.programs._programs)


def test_few_programs_are_kept() -> None:
    deployed = convert(resnet(), {}, _inputs(1, (1, 12, 12)))
    for batch in range(1, 9):
        deployed(_inputs(batch, (1, 12, 12)))
    assert len(deployed.programs._programs) == 4


def test_time_and_profile_cover_the_network() -> None:
    deployed = convert(resnet(), {}, _inputs(40, (1, 12, 12)))
    assert isinstance(deployed, PlannedModel)
    times = deployed.time_us(5)
    profile = deployed.profile_us(5)
    assert times.shape == (5,)
    assert tuple(profile) == deployed.plan.op_names
    assert sum(profile.values()) > 0.0
    assert profile["layer1.0.conv1"] > profile["fc"] > 0.0


def test_deployer_masks_as_the_policy_says() -> None:
    model, x = resnet(), _inputs(1, (1, 12, 12))
    choices: dict[str, Choice] = {"layer3.0.conv2": Fine(keep=0.1), "layer1.0.conv1": Block(keep=0.5)}
    result = deployer(model, x)(choices)()
    assert isinstance(result, Tensor)
    assert result.shape == (1, 10)
    # Folding scales whole filters, so magnitude masks differ a little from those of the model itself.
    dense = deployer(model, x)({})()
    torch.testing.assert_close(dense, model(x), rtol=0, atol=1e-4)
    assert not torch.equal(result, dense)
    nested = deployer(settled(Concatenated()), _inputs(1, (3, 10, 10)))({"a": Fine(keep=0.3)})()
    assert isinstance(nested, Tensor)
    assert nested.shape == (1, 4)


def test_masked_layers_are_not_masked_again() -> None:
    model = resnet()
    torch.manual_seed(3)
    odd = F.dropout(torch.ones(16, 16, 3, 3), 0.9) > 0
    weight = model.get_submodule("layer1.0.conv1").weight
    assert isinstance(weight, Tensor)
    weight.data.mul_(odd)
    choices: dict[str, Choice] = {"layer1.0.conv1": Fine(keep=0.12)}
    again = masked_copy(model, choices).get_submodule("layer1.0.conv1").weight
    assert torch.equal(again, weight)


@pytest.mark.parametrize(
    "choice",
    [Block(keep=0.75, filters=32), Pattern(count=4, entries=4, kernels=0.5, share=(32, 1))],
    ids=lambda choice: choice.text,
)
def test_masks_whose_last_unit_is_cut_are_recognised(choice: Choice) -> None:
    model = nn.Sequential(nn.Conv2d(24, 40, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[32:] *= 0.1  # the cut units go first
    masked = masked_copy(model, {"0": choice})
    x = _inputs(1, (24, 6, 6))
    _assert_same(convert(masked, {"0": choice}, x), masked.requires_grad_(False), x)
