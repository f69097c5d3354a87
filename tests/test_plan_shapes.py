"""Every operation that today's networks are made of runs in a plan, with their outputs, at any batch size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import settled
from torch import Tensor, nn

from autoprune.core.choices import Block, Choice
from autoprune.kernels.convert import PlannedModel, convert
from autoprune.kernels.cpu.program import Program
from autoprune.kernels.cpu.recorder import ungrouped
from autoprune.kernels.cpu.rows import Curve
from autoprune.lut.deploy import masked_copy
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.tasks.models import build_model


class _Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(20, 8, 1), nn.Conv2d(8, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class _Branches(nn.Module):
    """Maps side by side, a BatchNorm behind them, the input read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(20, 32, 1), nn.Conv2d(20, 16, 3, padding=1), nn.BatchNorm2d(68)
        self.c = nn.Conv2d(68, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.relu(self.norm(torch.cat([self.a(x), self.b(x), x], 1))))
        return out


class _OwnPadding(nn.Conv2d):
    """Pads its map itself, more on the far sides."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 1, 2)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _Leaky(nn.Module):
    """Leaky by call, with its slope named, by place and by default."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(F.leaky_relu(F.leaky_relu(x, negative_slope=0.2), 0.5))


def _then(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(5, 20, 1), *modules)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "depthwise": _then(nn.Conv2d(20, 20, 3, padding=1, groups=20), nn.BatchNorm2d(20), nn.ReLU6()),
    "depthwise-strided": _then(nn.ReLU(), nn.Conv2d(20, 20, 5, stride=2, padding=2, groups=20, bias=False)),
    "depthwise-dilated": _then(nn.Conv2d(20, 20, 3, padding=(0, 2), dilation=(1, 2), groups=20), nn.Hardswish()),
    "multiplied": _then(nn.Conv2d(20, 40, 3, padding=1, groups=20), nn.ReLU()),
    "grouped": _then(nn.Conv2d(20, 36, 3, stride=2, padding=1, groups=4), nn.BatchNorm2d(36), nn.ReLU()),
    "same-even": _then(nn.Conv2d(20, 17, (4, 2), padding="same"), nn.ReLU()),
    "zero-pad": _then(nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(20, 16, 3, stride=2)),
    "own-padding": _then(_OwnPadding(20, 20, 3, stride=2, groups=20), nn.ReLU()),
    "relu6": _then(nn.ReLU6(), nn.Conv2d(20, 9, 1), nn.Hardtanh(0.0, 0.5)),
    "silu": _then(nn.SiLU(inplace=True)),
    "sigmoid": _then(nn.Sigmoid()),
    "leaky": _then(nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(20, 9, 1), nn.LeakyReLU()),
    "leaky-call": _then(_Leaky()),
    "hardsigmoid": _then(nn.Hardsigmoid()),
    "norm-first": _then(nn.ReLU(), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 4, 3)),
    "max-ceil": _then(nn.MaxPool2d(3, 2, ceil_mode=True)),
    "max-ceil-padded": _then(nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)),
    "avg-inside": _then(nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)),
    "avg-ceil": _then(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)),
    "gate": _then(_Gate()),
    "branches": _then(nn.ReLU(), _Branches()),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", BODIES)
def test_every_operation_of_a_plan_equals_torch(kind: str) -> None:
    torch.manual_seed(3)
    model = settled(BODIES[kind]())
    deployed = convert(model, {}, torch.zeros(1, 5, 11, 13))
    assert isinstance(deployed, PlannedModel), getattr(deployed, "refusal", "")
    for batch, scale in ((1, 1.0), (3, 30.0)):
        x = scale * torch.randn(batch, 5, 11, 13)
        want = model(x)
        torch.testing.assert_close(deployed(x), want, rtol=0, atol=1e-5 * float(want.abs().max()))


CURVES: dict[Curve, Callable[[Tensor], Tensor]] = {
    Curve.HARDSWISH: F.hardswish,
    Curve.HARDSIGMOID: F.hardsigmoid,
    Curve.SILU: F.silu,
    Curve.SIGMOID: torch.sigmoid,
    Curve.LEAKY: lambda x: F.leaky_relu(x, 0.3),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("halo", [0, 1])  # pixels side by side in memory, or with a gap between lines
def test_curves_are_exact_to_float32_over_the_whole_range(curve: Curve, halo: int) -> None:
    program = Program(2, 1)
    x, out = program.buffer(16, 30, 40, halo=halo), program.buffer(16, 30, 40)
    program.curve(x, out, curve, 0.3)
    program.set_input(x)
    program.set_output(out)
    program.finish()
    image = torch.linspace(-80, 80, 2 * 16 * 30 * 40).reshape(2, 16, 30, 40)
    torch.testing.assert_close(program.run(image).double(), CURVES[curve](image.double()), rtol=5e-7, atol=1e-7)
    ends = torch.full((2, 16, 30, 40), 1e4) * torch.tensor([-1.0, 1.0]).repeat(20)
    torch.testing.assert_close(program.run(ends), CURVES[curve](ends), rtol=1e-6, atol=1e-6)
    assert program.run(torch.full((2, 16, 30, 40), float("nan"))).isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [3, 16, 48])
@pytest.mark.parametrize("last", [False, True])
def test_maps_come_and_go_in_either_memory_format(channels: int, last: bool, threads: int) -> None:
    program = Program(3, threads)
    x, out = program.buffer(channels, 19, 37, halo=1), program.buffer(channels, 19, 37)
    program.relu(x, out)
    program.set_input(x)
    program.set_output(out)
    program.finish()
    image = torch.randn(3, channels, 19, 37)
    given = image.contiguous(memory_format=torch.channels_last) if last else image
    got = program.run(given)
    assert torch.equal(got, image.relu())
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_a_grouped_weight_is_the_whole_one_with_zeros() -> None:
    conv = nn.Conv2d(6, 9, 3, groups=3, bias=False)
    x = torch.randn(2, 6, 5, 5)
    whole = torch.from_numpy(ungrouped(conv.weight.detach().numpy(), 3))
    torch.testing.assert_close(F.conv2d(x, whole), conv(x).detach(), rtol=0, atol=1e-5)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "vgg11": lambda: build_model("vgg11", 3, 10),
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "densenet121": torchvision.models.densenet121,
    "squeezenet1_1": torchvision.models.squeezenet1_1,
    "mobilenetv2-cifar": lambda: build_model("mobilenetv2-cifar", 3, 10),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_run_as_plans_sparse_layers_included(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    size = 32 if name == "vgg11" else 64
    x = torch.randn(2, 3, size, size)
    choices: dict[str, Choice] = dict(uniform_policy(trace(model, x), ["block(keep=0.3)"], model=name).choices)
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, x)
    assert isinstance(deployed, PlannedModel), getattr(deployed, "refusal", "")
    with torch.no_grad():
        want = masked(x)
    torch.testing.assert_close(deployed(x), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    kernels = {layer: kernel for layer, _, kernel, _ in deployed.explain()}
    assert all(kernels[layer] == "block" for layer, choice in choices.items() if isinstance(choice, Block))
