"""Channel groups: what is coupled leaves together, outputs stay those of the mask, the rest is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import settled
from torch import Tensor, nn
from torchvision.models import SwinTransformer

import autoprune
from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.coupling import Coupling, variants
from autoprune.core.errors import ChoiceError, ModelError, PolicyError
from autoprune.kernels.convert import convert
from autoprune.search_spaces.trace import trace
from autoprune.sparsity.channel_graph import channel_groups
from autoprune.sparsity.channels import (
    CRITERIA,
    ChannelGroups,
    best_units,
    channel_scores,
    difference,
    mask_channels,
    outputs,
    take_out,
)
from autoprune.sparsity.compact import mask_by_policy
from autoprune.tasks.models import build_model

SIZE = 12


class Net(nn.Module):
    """A network whose forward pass is given as a function of its parts."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i: int, o: int, k: int = 3, g: int = 1, **more: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, groups=g, **more)  # type: ignore[arg-type]


def head(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def residual() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        x = F.relu(n.bn(n.a(x)))
        return n.fc(head(F.relu(n.c(F.relu(n.b(x))) + x)))

    parts = {"a": conv(3, 16, bias=False), "bn": nn.BatchNorm2d(16), "b": conv(16, 24), "c": conv(24, 16)}
    return Net(run, **parts, fc=nn.Linear(16, 5))


def concat() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        y = torch.cat([n.a(x), torch.sigmoid(n.b(x)), x], 1)
        return n.fc(head(n.c(F.silu(n.bn(y)))))

    return Net(run, a=conv(3, 16), b=conv(3, 24, 1), bn=nn.BatchNorm2d(43), c=conv(43, 8), fc=nn.Linear(8, 5))


def concat_and_add() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        return n.fc(head(n.d(torch.cat([n.a(x), n.b(x)], 1) + n.c(x))))

    return Net(run, a=conv(3, 16), b=conv(3, 8), c=conv(3, 24), d=conv(24, 16), fc=nn.Linear(16, 5))


def depthwise() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        x = F.hardswish(n.bn(n.b(F.relu6(n.a(x)))))
        return n.fc(head(n.c(x)))

    parts = {"a": conv(3, 24, 1), "b": conv(24, 24, 3, 24), "bn": nn.BatchNorm2d(24), "c": conv(24, 16, 1)}
    return Net(run, **parts, fc=nn.Linear(16, 5))


def multiplied() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        return n.fc(head(n.c(F.relu(n.b(n.a(x))))))

    return Net(run, a=conv(3, 16, 1), b=conv(16, 32, 3, 16), c=conv(32, 8, 1), fc=nn.Linear(8, 5))


def grouped() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        return n.fc(head(F.relu(n.c(F.relu(n.b(F.relu(n.a(x))))))))

    return Net(run, a=conv(3, 32, 1), b=conv(32, 16, 3, 8), c=conv(16, 16, 1), fc=nn.Linear(16, 5))


def flattened() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(n.bn(n.a(x))), 3)
        return n.fc2(n.act(n.fc1(x.flatten(1))))

    parts = {"a": conv(3, 16), "bn": nn.BatchNorm2d(16), "fc1": nn.Linear(16 * 16, 24), "act": nn.PReLU(24)}
    return Net(run, **parts, fc2=nn.Linear(24, 5))


def twice() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        x = F.relu(n.a(x))
        for _ in range(2):
            x = F.relu(n.b(x)) + x
        return n.fc(head(n.c(x)))

    return Net(run, a=conv(3, 16), b=conv(16, 16), c=conv(16, 24), fc=nn.Linear(24, 5))


def gated() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        x = F.silu(n.a(x))
        gate = torch.sigmoid(n.up(F.silu(n.down(x.mean((2, 3), keepdim=True)))))
        return n.fc(head(n.c(x * gate)))

    return Net(run, a=conv(3, 24), down=conv(24, 8, 1), up=conv(8, 24, 1), c=conv(24, 16), fc=nn.Linear(16, 5))


NETWORKS = (residual, concat, concat_and_add, depthwise, multiplied, grouped, flattened, twice, gated)
GROUPS = {
    "residual": {"a": ("a", "c"), "b": ("b",)},
    "concat": {"a": ("a",), "b": ("b",), "c": ("c",)},
    "concat_and_add": {"a": ("a",), "b": ("b",), "d": ("d",)},
    "depthwise": {"a": ("a",), "c": ("c",)},
    "multiplied": {"a": ("a",), "c": ("c",)},
    "grouped": {"a": ("a",), "c": ("c",)},
    "flattened": {"a": ("a",), "fc1": ("fc1",)},
    "twice": {"a": ("a", "b"), "c": ("c",)},
    "gated": {"a": ("a", "up"), "down": ("down",), "c": ("c",)},
}


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, ChannelGroups]:
    if make not in _MADE:
        torch.manual_seed(0)
        model, x = settled(make()), torch.randn(2, 3, SIZE, SIZE)
        _MADE[make] = (model, x, channel_groups(model, x))
    return _MADE[make]


_MADE: dict[Callable[[], nn.Module], tuple[nn.Module, Tensor, ChannelGroups]] = {}


@pytest.mark.parametrize("make", NETWORKS)
def test_layers_that_share_channels_are_one_group(make: Callable[[], nn.Module]) -> None:
    _, _, groups = made(make)
    assert {g.leader: g.writers for g in groups.coupling.groups.values()} == GROUPS[make.__name__]


@given(st.sampled_from(NETWORKS), st.integers(0, 10_000))
def test_the_smaller_network_gives_the_masked_ones_outputs(make: Callable[[], nn.Module], seed: int) -> None:
    model, x, groups = made(make)
    generator = torch.Generator().manual_seed(seed)
    kept, choices = {}, {}
    for leader, group in groups.coupling.groups.items():
        units = int(torch.randint(1, group.units + 1, (), generator=generator))
        kept[leader] = best_units(torch.rand(group.units, generator=generator), units)
        choices[leader] = group.choice_of(units * group.each)
    masked = copy.deepcopy(model)
    mask_channels(masked, groups, kept)
    smaller = take_out(masked, groups, kept)
    assert difference(outputs(masked, x), outputs(smaller, x)) <= 1e-5
    # Shapes are those that the search is told, before any network is made.
    wanted = groups.coupling.resized(trace(model, x), groups.coupling.expanded(choices))
    assert [(s.name, s.signature) for s in wanted] == [(s.name, s.signature) for s in trace(smaller, x)]
    # The policy is enough: which channels go is read off the zeros.
    policy = groups.coupling.expanded(choices)
    again = autoprune.compact(masked, policy, x, groups)
    assert difference(outputs(smaller, x), outputs(again, x)) <= 1e-5
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in smaller.parameters())


@pytest.mark.parametrize("make", NETWORKS)
def test_every_shape_a_layer_can_come_to_is_known_beforehand(make: Callable[[], nn.Module]) -> None:
    model, x, groups = made(make)
    coupling = groups.coupling
    options = {leader: (group.units, max(1, group.units // 2)) for leader, group in coupling.groups.items()}
    for layer in trace(model, x):
        shapes = variants(layer, coupling, options)
        assert layer in shapes.values()
        halved = {leader: units[1] for leader, units in options.items()}
        assert coupling.resize(layer, halved) in shapes.values()
        assert len({shape.signature for shape in shapes.values()}) == len(shapes)


def chunked() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        first, second = n.a(x).chunk(2, 1)
        return n.fc(head(n.b(first)) + head(n.c(second)))

    return Net(run, a=conv(3, 16), b=conv(8, 16), c=conv(8, 16), fc=nn.Linear(16, 5))


def shuffled() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        y = n.a(x)
        y = y.reshape(len(y), 2, 8, SIZE, SIZE).transpose(1, 2).reshape(len(y), 16, SIZE, SIZE)
        return n.fc(head(n.b(y)))

    return Net(run, a=conv(3, 16), b=conv(16, 16, 1, 2), fc=nn.Linear(16, 5))


def normalised() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        return n.fc(n.norm(head(n.a(x))))

    return Net(run, a=conv(3, 16), norm=nn.LayerNorm(16), fc=nn.Linear(16, 5))


def hidden_norm() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        y = n.a(x)
        return n.fc(head(y / (y.square().mean(1, keepdim=True) + 1.0)))

    return Net(run, a=conv(3, 16), fc=nn.Linear(16, 5))


def written_size() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        return n.fc(n.a(x).reshape(-1, 16 * SIZE * SIZE))

    return Net(run, a=conv(3, 16), fc=nn.Linear(16 * SIZE * SIZE, 5))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(3, 16), nn.Linear(16, 5)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(head(self.a(x) * self.scale))


def shared_weight() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        return n.fc(head(n.c(F.relu(n.b(F.relu(n.a(x)))))))

    net = Net(run, a=conv(3, 16), b=conv(16, 16), c=conv(16, 16), fc=nn.Linear(16, 5))
    net.c.weight = net.b.weight
    return net


@pytest.mark.parametrize(
    ("make", "layer", "reason"),
    [
        (residual, "fc", "no layer of the network reads them|outputs of the network"),
        (chunked, "a", "different ways"),
        (shuffled, "a", "outputs change|cannot follow|not one to one"),
        (normalised, "a", "LayerNorm 'norm'"),
        (hidden_norm, "a", "outputs change"),
        (written_size, "a", "outputs change"),
        (Scaled, "a", "bare parameter"),
        (shared_weight, "b", "share one weight"),
    ],
)
def test_what_cannot_leave_is_refused_by_name(make: Callable[[], nn.Module], layer: str, reason: str) -> None:
    groups = made(make)[2]
    assert layer not in groups.coupling.groups
    with pytest.raises(PolicyError, match=f"layer '{layer}' cannot take channels.*({reason})") as error:
        groups.coupling.kept({layer: Channels(0.5)})
    assert "\n" not in str(error.value)


def test_layers_of_one_group_must_agree() -> None:
    _, _, groups = made(residual)
    with pytest.raises(PolicyError, match=r"'a' and 'c' write the same channels.*give both the same choice"):
        groups.coupling.kept({"a": Channels(0.5)})
    with pytest.raises(PolicyError, match="write the same channels"):
        groups.coupling.kept({"a": Channels(0.5), "c": Channels(0.25)})
    assert groups.coupling.kept({"a": Channels(0.5), "c": Channels(0.5)}) == {"a": 8}
    with pytest.raises(PolicyError, match="leave 4 together; keep a multiple of 4"):
        made(grouped)[2].coupling.kept({"a": Channels(14 / 32)})


def test_choices_made_layer_by_layer_become_those_of_groups() -> None:
    coupling = made(residual)[2].coupling
    assert coupling.harmonised({"a": Dense(), "b": Channels(0.5), "c": Channels(0.5)}) == {
        "a": Dense(), "b": Channels(16 / 24), "c": Dense(),
    }  # fmt: skip
    both = coupling.harmonised({"a": Channels(0.1), "c": Channels(0.2), "fc": Channels(0.5)})
    assert both == {"a": Channels(0.5), "c": Channels(0.5), "fc": Dense()}


def test_an_aligned_block_of_channels_always_stays() -> None:
    for make in NETWORKS:
        for group in made(make)[2].coupling.groups.values():
            for keep in (1e-6, 0.3, 0.99):
                width = group.kept_units(group.aligned(keep)) * group.each
                assert width == group.filters or (width % 8 == 0 and width >= 8)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_channel_that_nothing_hears_goes_first(criterion: str) -> None:
    model, x, groups = made(residual)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor, dim in ((model.b.weight, 1), (model.fc.weight, 1), (model.a.weight, 0), (model.c.weight, 0)):
            tensor.select(dim, 5).mul_(1e-3)
        model.bn.weight[5] = 1e-3
    score = channel_scores(model, groups, "a", criterion)  # type: ignore[arg-type]
    assert int(score.argmin()) == 5
    choices = {"a": Channels(0.5), "c": Channels(0.5)}
    mask_by_policy(model, choices, x, groups=groups, criterion=criterion)  # type: ignore[arg-type]
    assert float(model.a.weight[5].abs().sum() + model.bn.bias[5].abs()) == 0.0
    with pytest.raises(ChoiceError, match="criterion 'taste'"):
        channel_scores(model, groups, "a", "taste")  # type: ignore[arg-type]


def test_a_network_that_is_not_masked_is_not_made_smaller() -> None:
    model, x, _ = made(residual)
    with pytest.raises(ModelError, match=r"layer 'b' has 24 of its 24 channel units.*keeps 12"):
        autoprune.compact(model, {"b": Channels(0.5)}, x)
    half = copy.deepcopy(model)
    with torch.no_grad():
        half.b.weight[12:] = 0.0  # its bias still speaks
    with pytest.raises(ModelError, match=r"differs from the masked one by .* scale: biases"):
        autoprune.compact(half, {"b": Channels(0.5)}, x)
    assert difference(outputs(model, x), outputs(autoprune.compact(model, {}, x), x)) == 0.0


def test_a_converted_network_is_the_smaller_one_and_says_so() -> None:
    model, x, groups = made(residual)
    model = copy.deepcopy(model)
    choices: dict[str, Choice] = {"a": Channels(0.5), "c": Channels(0.5), "b": Channels(1 / 3), "fc": Dense()}
    mask_by_policy(model, choices, x, groups=groups)
    deployed = convert(model, choices, x)
    assert difference(outputs(model, x), [deployed(x)]) <= 1e-5
    shown = {layer: (choice, kernel, why) for layer, choice, kernel, why in deployed.explain()}
    assert shown["b"][:2] == ("channels(keep=0.3333333333333333)", "dense")
    assert shown["b"][2] == "the 8 filters left of it run dense"
    weights = sum(value.numel() for name, value in deployed.named_buffers() if name.endswith("weight"))
    assert weights == 3 * 8 * 9 + 8 * 8 * 9 * 2 + 8 * 5


@pytest.mark.parametrize("name", ["resnet20", "vgg11"])
def test_built_in_networks_lose_channels_and_keep_their_outputs(name: str) -> None:
    torch.manual_seed(0)
    model, x = settled(build_model(name)), torch.randn(1, 1, 28, 28)
    groups = channel_groups(model, x, probe=name != "vgg11")
    choices = groups.coupling.expanded({leader: g.aligned(0.5) for leader, g in groups.coupling.groups.items()})
    mask_by_policy(model, choices, x, groups=groups)
    smaller = autoprune.compact(model, choices, x, groups)
    assert difference(outputs(model, x), outputs(smaller, x)) <= 1e-5
    assert sum(p.numel() for p in smaller.parameters()) < 0.3 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"), [("mobilenet_v2", 25), ("squeezenet1_1", 25), ("regnet_y_400mf", 37), ("resnet18", 12)]
)
def test_residual_depthwise_and_grouped_networks_of_torchvision_shrink(name: str, count: int) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    model, x = settled(get_model(name, weights=None)), torch.randn(1, 3, 64, 64)
    groups = channel_groups(model, x)
    assert len(groups.coupling.groups) == count
    choices = groups.coupling.expanded({leader: g.aligned(0.5) for leader, g in groups.coupling.groups.items()})
    mask_by_policy(model, choices, x, groups=groups)
    smaller = autoprune.compact(model, choices, x, groups)
    assert difference(outputs(model, x), outputs(smaller, x)) <= 1e-5
    assert sum(p.numel() for p in smaller.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_a_network_without_groups_has_no_coupling() -> None:
    coupling = Coupling()
    assert coupling.kept({"a": Dense()}) == {}
    assert coupling.group_of("a") is None


def test_the_search_of_the_graph_ends_where_positions_are_rearranged() -> None:
    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 8, [1, 1, 1], [1, 1, 1], [2, 2], num_classes=5).eval()
    groups = channel_groups(model, torch.randn(1, 3, 32, 32))
    assert set(groups.coupling.groups) == {f"features.{stage}.0.mlp.0" for stage in (1, 3, 5)}
    assert any("rearranged without end" in reason for reason in groups.coupling.refused.values())
    # Attention reads the weights of its layers itself: they are no layers that run.
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    named = set(groups.coupling.refused) | set(groups.coupling.groups)
    assert named == {name for name in layers if ".attn." not in name}


def test_the_hidden_widths_of_a_transformer_leave_and_its_heads_are_refused_by_name() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = settled(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5))
    x = torch.randn(2, 3, 32, 32)
    groups = channel_groups(model, x)
    assert set(groups.coupling.groups) == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}
    assert {"blocks.0.attn.qkv", "blocks.0.attn.proj"} <= set(groups.coupling.refused)
    choices = groups.coupling.expanded({leader: g.aligned(0.5) for leader, g in groups.coupling.groups.items()})
    mask_by_policy(model, choices, x, groups=groups)
    smaller = autoprune.compact(model, choices, x, groups)
    assert smaller.get_submodule("blocks.0.mlp.fc2").weight.shape == (192, 384)
    assert difference(outputs(model, x), outputs(smaller, x)) <= 1e-5
    deployed = convert(model, choices, x, groups=groups)
    assert difference(outputs(model, x), [deployed(x)]) <= 1e-5
    torch._dynamo.reset()
    compiled = torch.compile(deployed, backend="aot_eager")
    assert difference(outputs(model, x), [compiled(x)]) <= 1e-5


class _Keeping(nn.Module):
    """Keeps what it computed of a parameter, as LeViT does with its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = nn.Linear(8, 16), nn.Linear(16, 4), nn.Parameter(torch.ones(2, 4))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["bias"] = self.bias.sum(0)
        out: Tensor = self.b(F.relu(self.a(x))) + self.kept["bias"]
        return out


def test_a_model_that_keeps_tensors_of_its_last_run_has_groups() -> None:
    assert set(channel_groups(_Keeping(), torch.randn(2, 8)).coupling.groups) == {"a"}
