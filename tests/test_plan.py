"""What planning promises: the same network, fused, or a refusal that names what is in the way."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import PLANNED, resnet, settled
from torch import Tensor, nn

from autoprune.kernels.plan import Plan, PlanRefusal, build_plan
from autoprune.kernels.plan_ops import ConvOp, PoolOp
from autoprune.kernels.plan_trace import linear_shape


def _planned(model: nn.Module, example: Tensor) -> Plan:
    plan = build_plan(model, example, {})
    assert isinstance(plan, Plan), str(plan)
    return plan


def _run(plan: Plan, x: Tensor) -> Tensor:
    batch = x.shape[0]
    value = plan.input
    out = plan.program(batch).run(x.reshape(batch, value.channels, value.height, value.width))
    return out.reshape(batch, *plan.output_shape)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PLANNED)
def test_plan_computes_what_the_model_computes(name: str, batch: int) -> None:
    make, shape = PLANNED[name]
    model = make()
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2))
    want = model(x)
    got = _run(_planned(model, x[:1]), x)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_residual_block_becomes_two_convolutions() -> None:
    plan = _planned(resnet(), torch.randn(1, 1, 12, 12))
    assert plan.op_names == (
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer2.0.shortcut.0",
        "layer3.0.conv1",
        "layer3.0.conv2",
        "layer3.0.shortcut.0",
        "pool",
        "fc",
    )
    by_name = {op.name: op for op in plan.convs}
    assert by_name["layer1.0.conv1"].relu
    assert by_name["layer1.0.conv1"].residual is None
    # The sum and its ReLU go to the operand computed last: the projection, where there is one.
    assert by_name["layer1.0.conv2"].residual == by_name["conv1"].out
    assert by_name["layer2.0.shortcut.0"].residual == by_name["layer2.0.conv2"].out
    assert by_name["layer2.0.shortcut.0"].relu
    assert not by_name["layer2.0.conv2"].relu


def test_layers_carry_the_shapes_of_the_run() -> None:
    plan = _planned(resnet(), torch.randn(1, 1, 13, 12))
    layer = {op.name: op.layer for op in plan.convs}
    assert layer["layer2.0.conv1"].signature == "conv-k32-c16-3x3-in13x12-s2x2-p1x1"
    assert layer["layer2.0.conv1"].output_hw == (7, 6)
    assert layer["fc"].signature == "linear-o10-i64-n1"
    shape = linear_shape(layer["fc"], (2, 2))
    assert (shape.weight_shape, shape.input_hw, shape.output_hw) == ((10, 16, 2, 2), (2, 2), (1, 1))


def test_convolution_that_is_read_twice_keeps_its_own_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return F.relu(y) + self.b(y)

    model, x = settled(Twice()), torch.randn(2, 3, 5, 5)
    plan = _planned(model, x)
    assert plan.op_names == ("a", "relu", "b")
    torch.testing.assert_close(_run(plan, x), model(x), rtol=0, atol=1e-5)


def test_sum_of_two_pooled_maps_stays_an_operation() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 17, 3, padding=1)
            self.max, self.avg = nn.MaxPool2d(2), nn.AvgPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return F.relu(self.max(y) + self.avg(y))

    model, x = settled(Pools()), torch.randn(2, 3, 8, 8)
    plan = _planned(model, x)
    assert plan.op_names == ("a", "max", "avg", "add")
    torch.testing.assert_close(_run(plan, x), model(x), rtol=0, atol=1e-5)


def test_planning_leaves_the_model_alone() -> None:
    model = resnet().train()
    before = copy.deepcopy(model.state_dict())
    _planned(model, torch.randn(2, 1, 12, 12))
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_plan_keeps_its_weights_when_the_model_trains_on() -> None:
    model = resnet()
    x = torch.randn(1, 1, 12, 12)
    plan = _planned(model, x)
    want = _run(plan, x)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    assert torch.equal(_run(plan, x), want)


class _Body(nn.Module):
    """A convolution, then whatever ``forward`` a test gives it."""

    def __init__(self, then: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.reflected = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.thin = nn.Conv2d(16, 3, 1)
        self.loose = nn.Parameter(torch.zeros(8, 16, 1, 1))
        self.again = nn.Conv2d(16, 16, 1)
        self.wide = nn.Linear(16 * 64, 5)
        self.rows = nn.Embedding(5, 16 * 64)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.conv(x))  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize(
    ("then", "where", "reason"),
    [
        (lambda m, x: m.reflected(x), "reflected", "reflect"),
        (lambda m, x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), "avg_pool2d", "ceil mode"),
        (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d", "own divisor"),
        (lambda m, x: F.relu(F.pad(x, (1, 1, 0, 0))), "relu", "not read by a convolution"),
        (lambda m, x: F.pad(x, (1, 1, 0, 0), value=1.0), "pad", "other values than zero"),
        (lambda m, x: m.again(F.pad(x, (2, 1, 0, 0))), "again", "padding of 2 left and 1 right"),
        (lambda m, x: F.conv2d(x, m.again.weight * 2.0), "mul", "not a feature map"),
        (lambda m, x: F.conv2d(x, m.loose), "conv2d", "no layer's own"),
        (lambda m, x: F.conv2d(x, m.again.weight), "conv2d", "bias that is not its layer's"),
        (lambda m, x: F.linear(x.flatten(1), m.wide.weight * 2.0), "mul", "not a feature map"),
        (lambda m, x: F.linear(x.flatten(1), m.wide.weight), "linear", "bias that is not its layer's"),
        (lambda m, x: F.linear(x.flatten(1), m.rows.weight), "linear", "no linear layer's own"),
        (lambda m, x: F.hardtanh(x), "hardtanh", "from -1.0"),
        (lambda m, x: x * x.mean(1, keepdim=True), "mean", "other dimensions"),
        (lambda m, x: torch.cat([x[:, :3], x], 1), "getitem", "no rule"),
        (lambda m, x: torch.cat([m.thin(x), x], 1), "cat", "3 channels, not a multiple of 16"),
        (lambda m, x: F.gelu(x), "gelu", "no rule"),
        (lambda m, x: torch.cat([x, x], 2), "cat", "something else than channels"),
        (lambda m, x: x + 1.0, "add", "not a feature map"),
        (lambda m, x: x + x.mean([2, 3], keepdim=True), "add", "broadcasts"),
        (lambda m, x: m.relu(x) + x, "relu", "in place"),
        (lambda m, x: m.again(m.again(x)), "again", "more than once"),
        (lambda m, x: x if x.sum() > 0 else -x, "forward", "cannot be traced"),
        (lambda m, x: (x, x), "output", "one tensor"),
        (lambda m, x: x.flatten(2), "flatten", "flattening"),
        (lambda m, x: F.avg_pool2d(x, (2, 4)), "avg_pool2d", "square"),
        (lambda m, x: F.adaptive_avg_pool2d(x, 3), "adaptive_avg_pool2d", "8x8 to 3x3"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(then: object, where: str, reason: str) -> None:
    refusal = build_plan(settled(_Body(then)), torch.randn(1, 4, 8, 8), {})
    assert isinstance(refusal, PlanRefusal)
    assert refusal.where.startswith(where)
    assert reason in refusal.reason
    assert where in str(refusal)


class _OwnLinear(nn.Linear):
    """As in networks that cast their weights themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias=self.bias)


def test_a_linear_layer_with_a_forward_of_its_own_is_planned_under_its_name() -> None:
    model = settled(nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), _OwnLinear(16 * 36, 7)))
    x = torch.randn(2, 4, 8, 8)
    plan = _planned(model, x)
    assert plan.op_names == ("0", "2")
    torch.testing.assert_close(_run(plan, x), model(x), rtol=0, atol=1e-5)


def test_norm_by_batch_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16, track_running_stats=False)).eval()
    refusal = build_plan(model, torch.randn(2, 3, 4, 4), {})
    assert isinstance(refusal, PlanRefusal)
    assert "batch's own statistics" in refusal.reason


def test_pooling_over_the_whole_map_is_a_global_mean() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.AvgPool2d(6)).eval()
    x = torch.randn(2, 3, 6, 6)
    plan = _planned(model, x)
    assert isinstance(plan.ops[1], PoolOp)
    assert plan.ops[1].kind == "global"
    torch.testing.assert_close(_run(plan, x), model(x), rtol=0, atol=1e-5)


def test_folding_is_exact_to_float32() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 16, 3, bias=True), nn.BatchNorm2d(16)))
    plan = _planned(model, torch.randn(1, 3, 5, 5))
    (op,) = plan.ops
    assert isinstance(op, ConvOp)
    conv, norm = model[0], model[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert torch.equal(op.weight_KCRS, (conv.weight.double() * scale[:, None, None, None]).float())
    assert op.bias_K is not None
    want = (conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    torch.testing.assert_close(op.bias_K, want.float(), rtol=1e-6, atol=1e-7)
