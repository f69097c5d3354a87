"""Operations done strip by strip give what whole maps give, but for the order of a tile's sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.core.choices import Block
from autoprune.kernels.convert import convert
from autoprune.kernels.cpu import strips
from autoprune.kernels.cpu.program import Program
from autoprune.kernels.plan import Plan, build_plan


class MobileBlock(nn.Module):
    """Widens, filters each channel, narrows; adds its input where it can."""

    def __init__(self, channels: int, width: int, out: int, window: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            act,
            nn.Conv2d(width, width, window, stride, window // 2, groups=width),
            act,
            nn.Conv2d(width, out, 1),
        )
        self.skip = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x if self.skip else self.body(x)


def plan_of(model: nn.Module, x: Tensor, threads: int = 1) -> Plan:
    plan = build_plan(model, x, {}, threads=threads)
    assert isinstance(plan, Plan)
    return plan


def both(plan: Plan, x: Tensor, limits: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
    """Return the output by strips and by whole maps, and how many buffers of the first are parts of others."""
    finish, found = Program.finish, []
    results = []
    for wanted in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strips, "STRIP_BYTES", limits[0])
            patch.setattr(strips, "RUN_BYTES", 0)
            patch.setattr(strips, "LINK_BYTES", limits[1])
            patch.setattr(Program, "finish", lambda self, *, strips, wanted=wanted: finish(self, strips=wanted))
            program = plan.program(len(x))
        found.append(len(program.memory.strides))
        program.run(torch.full_like(x, 9.0))  # what an earlier run left must not matter
        results.append(program.run(x))
    return *results, found[0] - found[1]


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardswish, nn.SiLU, nn.LeakyReLU])
@pytest.mark.parametrize("limit", [1, 6_000, 30_000])
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 1), (5, 2), (1, 2)])
def test_mobile_blocks_by_strips_equal_whole_maps(
    act: Callable[[], nn.Module], limit: int, batch: int, threads: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3, 2, 1),
        nn.ReLU(),
        MobileBlock(20, 48, 24, 3, 1, act()),
        MobileBlock(24, 50, 24, 5, 1, act()),
        MobileBlock(24, 40, 24, 3, 1, act()),
        MobileBlock(24, 40, 40, 5, 2, act()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 7),
    ).eval()
    x = torch.randn(batch, 3, 45, 37)
    by_strips, whole, parts = both(plan_of(model, x, threads), x, (limit, 0))
    assert (parts > 0) == (batch >= 2 * threads or threads == 1)
    torch.testing.assert_close(by_strips, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_strips, model(x).detach(), rtol=1e-4, atol=1e-5)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A stack of convolutions of any kind, and an input."""
    channels, layers = draw(st.integers(1, 40)), list[nn.Module]()
    x = torch.randn(draw(st.integers(1, 3)), channels, draw(st.integers(5, 23)), draw(st.integers(5, 23)))
    size = min(x.shape[2:])
    for _ in range(draw(st.integers(2, 6))):
        kind = draw(st.sampled_from(["point", "depthwise", "full", "relu"]))
        window, stride = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 1, 2, 3]))
        dilation = draw(st.sampled_from([1, 1, 2]))
        padding = draw(st.integers(0, dilation * (window - 1) // 2 + 1))
        after = (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1
        if kind == "relu":
            layers.append(nn.Hardswish())
        elif kind == "point" or after < 1:
            out = draw(st.integers(1, 40))
            layers.append(nn.Conv2d(channels, out, 1))
            channels = out
        else:
            out = channels if kind == "depthwise" else draw(st.integers(1, 40))
            groups = channels if kind == "depthwise" else 1
            layers.append(nn.Conv2d(channels, out, window, stride, padding, dilation, groups))
            channels, size = out, after
    return nn.Sequential(*layers).eval(), x


@settings(max_examples=60, deadline=None)
@given(stacks(), st.sampled_from([1, 4_000, 40_000]), st.sampled_from([0, 2_000]))
def test_any_stack_by_strips_equals_whole_maps(stack: tuple[nn.Module, Tensor], limit: int, link: int) -> None:
    model, x = stack
    by_strips, whole, _ = both(plan_of(model, x), x, (limit, link))
    torch.testing.assert_close(by_strips, whole, rtol=1e-5, atol=1e-5)


def test_a_pruned_mobile_network_by_strips_equals_torch_and_takes_less_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), MobileBlock(16, 96, 24, 3, 2, nn.ReLU6())).eval()
    block = model[1].body[0].weight
    with torch.no_grad():
        block[:16] = 0.0
    x = torch.randn(1, 3, 224, 224)
    network = convert(model, {"1.body.0": Block(keep=5 / 6)}, x)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
    by_strips = plan_of(model, x).program(1)
    maps = 4 * (16 * 112 * 112 + 96 * 112 * 112 + 96 * 56 * 56)
    assert by_strips.memory.size_bytes < 0.5 * maps
    assert [len(times) for times in by_strips.profile_us(3)] == [3, 3, 3, 3]
    assert np.all(np.array(by_strips.profile_us(3)) > 0)
