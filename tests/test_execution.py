"""Layers run on the operators that they are given once their masks are final, forward and backward, and never else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.core.choices import Choice, parse_choice
from autoprune.trainers.execution import FrozenLayer, SparseForward
from autoprune.trainers.session import Session, attach

STEPS, EPOCHS = 3, 4


def gathered(layer: FrozenLayer) -> SparseForward:
    """Compute from the kept values alone, as the kernels' operators do on a CPU: one gather, one scatter."""
    index = layer.mask.flatten().nonzero().flatten()
    module = layer.module

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = weight.flatten()[index]
        dense = torch.zeros(weight.numel()).index_put((index,), values).reshape(weight.shape)
        if isinstance(module, nn.Linear):
            return F.linear(x, dense, bias)
        return F.conv2d(x, dense, bias, module.stride, module.padding)

    return run


def convolutions_only(layer: FrozenLayer) -> SparseForward | None:
    assert layer.spec is not None
    return gathered(layer) if layer.spec.op == "conv" else None


def make() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 9, 12), nn.ReLU(), nn.Linear(12, 3),
        )  # fmt: skip


CHOICES: dict[str, Choice] = {"2": parse_choice("pattern(count=4,kernels=0.5)"), "5": parse_choice("fine(keep=0.2)")}


def start(method: str) -> tuple[nn.Sequential, torch.optim.Optimizer, Session]:
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    session = attach(
        net, optimizer, CHOICES, steps_per_epoch=STEPS, epochs=EPOCHS, method=method,
        settings={"freeze": 2} if method == "nm" else None, example=torch.zeros(1, 1, 6, 6),
    )  # fmt: skip
    return net, optimizer, session


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        images = torch.randn(4, 1, 6, 6, generator=generator)
        F.cross_entropy(net(images), torch.randint(0, 3, (4,), generator=generator)).backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["clicktrain", "campfire", "nm"])
def test_training_on_kept_values_is_the_training_under_masks(method: str) -> None:
    plain, optimizer, session = start(method)
    train(plain, optimizer, 0, STEPS * EPOCHS)
    wanted = session.finalize()
    net, optimizer, session = start(method)
    session.run_sparse(gathered)
    running = []
    for number in range(STEPS * EPOCHS):
        train(net, optimizer, number, number + 1)
        running.append(session.sparse_layers)
    assert running[0] == ()
    assert running[-1] == ("2", "5")
    assert session.finalize() == wanted
    assert session.sparse_layers == ()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_a_layer_without_an_operator_stays_dense_and_copies_are_their_own() -> None:
    net, optimizer, session = start("clicktrain")
    session.run_sparse(convolutions_only)
    train(net, optimizer, 0, STEPS * EPOCHS)
    assert session.sparse_layers == ("2",)
    images = torch.randn(2, 1, 6, 6)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(images), net(images))
    with torch.no_grad():
        twin[2].weight.zero_()
    assert not torch.allclose(twin(images), net(images))


def test_a_resumed_training_runs_sparse_at_once() -> None:
    net, optimizer, session = start("campfire")
    train(net, optimizer, 0, 10)
    state = session.state_dict()
    again, _, session = start("campfire")
    session.run_sparse(gathered)
    assert session.sparse_layers == ()
    session.load_state_dict(state)
    assert session.sparse_layers == ("2", "5")
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(torch.ones(1, 1, 6, 6)), net(torch.ones(1, 1, 6, 6)))
