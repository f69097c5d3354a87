"""Loops of many kinds: averaged weights, autocast, accumulation, wrapped optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autoprune.core.choices import Fine, parse_choice
from autoprune.core.errors import PolicyError
from autoprune.trainers.session import Session, attach

STEPS, EPOCHS = 3, 5
CHOICES = {"0": Fine(0.5), "3": parse_choice("pattern(count=4,entries=4,kernels=0.5,share=1x1)")}


def make_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
        )  # fmt: skip


def start(net: nn.Module, optimizer: torch.optim.Optimizer, method: str = "campfire") -> Session:
    return attach(net, optimizer, CHOICES, steps_per_epoch=STEPS, epochs=EPOCHS, method=method)


def loss(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 2, (8,), generator=generator)
    return nn.functional.cross_entropy(net(images).float(), labels)


def step_once(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss(net, step).backward()
    optimizer.step()


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_average_of_weights_is_sparse_once_it_is_masked(made: str) -> None:
    net = make_net()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if made == "before" else None
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    session = start(net, optimizer)
    average = average or AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(STEPS * EPOCHS - 2):
        step_once(net, optimizer, step)
        average.update_parameters(net)
    mask = session.masks["3"]
    kept = average.module[3].weight[mask].clone()
    assert average.module[3].weight[~mask].any(), "it remembers what was removed"
    session.mask_copy(average)
    assert not average.module[3].weight[~mask].any()
    assert torch.equal(average.module[3].weight[mask], kept)
    for step in range(STEPS * EPOCHS - 2, STEPS * EPOCHS):
        step_once(net, optimizer, step)
        average.update_parameters(net)
    assert not average.module[3].weight[~mask].any(), "masks are final, so it stays sparse"
    assert not torch.equal(average.module[3].weight[mask], kept)


def test_a_copy_of_an_attached_model_does_not_copy_the_session() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session = start(net, optimizer)
    other = copy.deepcopy(net)
    loss(other, 0).backward()
    assert session.state_dict()["specs"] is None
    step_once(net, optimizer, 0)
    assert session.state_dict()["specs"] is not None
    assert all(hook is not session for hook in other._forward_pre_hooks.values())


def test_another_structure_cannot_be_masked() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session = start(net, optimizer)
    for step in range(STEPS * EPOCHS):
        step_once(net, optimizer, step)
    with pytest.raises(PolicyError, match=r"no '0\.weight'"):
        session.mask_copy(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("method", ["campfire", "clicktrain"])
def test_autocast_scaler_and_accumulation_together(method: str) -> None:
    net = make_net().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    session = start(net, optimizer, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(STEPS * EPOCHS + 1):
        for part in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(net, 2 * step + part) / 2
            scaler.scale(value * (float("inf") if step == 4 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for name, mask in session.masks.items():
            assert not net.get_submodule(name).weight[~mask].any()  # type: ignore[index, operator]
    assert session.steps == STEPS * EPOCHS, "the step that overflowed does not count"
    assert session.finalize().finished
    assert all(bool(p.isfinite().all()) for p in net.parameters())


class Wrapper(torch.optim.Optimizer):
    """An optimizer by name that never called the base class, as training libraries make them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:  # type: ignore[override]
        self.optimizer.step()


def test_a_wrapped_optimizer_is_looked_through() -> None:
    net = make_net()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    session = start(net, Wrapper(Wrapper(inner)))
    for step in range(STEPS * EPOCHS):
        step_once(net, inner, step)
    assert session.steps == STEPS * EPOCHS
    session.detach()
    step_once(net, inner, 0)
    assert session.steps == STEPS * EPOCHS


def test_finalize_takes_every_hook_off() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    session = start(net, optimizer)
    for step in range(STEPS * EPOCHS):
        step_once(net, optimizer, step)
    report = session.finalize()
    assert report.finished
    removed = ~session.masks["3"]
    assert not net[3].weight[removed].any()  # type: ignore[index, operator]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not net._forward_pre_hooks
