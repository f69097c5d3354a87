"""Trainings under channel choices: layers that share channels lose the same ones, and the result can shrink."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprune
from autoprune.core.choices import Channels, Choice
from autoprune.core.errors import PolicyError
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.sparsity.channel_graph import channel_groups
from autoprune.sparsity.channels import difference, outputs
from autoprune.trainers.session import Session, attach

STEPS, EPOCHS = 2, 6


class Net(nn.Module):
    """A residual add, a depthwise convolution, a flattened map: four groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide, self.norm3 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depth, self.norm4 = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 4, 24)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = (self.norm2(self.second(x)) + x).relu()
        x = self.norm4(self.depth(self.norm3(self.wide(x)).relu())).sigmoid()
        out: Tensor = self.fc(self.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1)).relu())
        return out


CHOICES: dict[str, Choice] = {
    "first": Channels(0.5), "second": Channels(0.5), "wide": Channels(0.25), "hidden": Channels(1 / 3),
}  # fmt: skip


def started(method: str, choices: dict[str, Choice] | None = None, seed: int = 0) -> tuple[Net, Session, Tensor]:
    torch.manual_seed(seed)
    net, x = Net(), torch.randn(4, 1, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    own = CHOICES if choices is None else choices
    session = attach(net, optimizer, own, steps_per_epoch=STEPS, epochs=EPOCHS, method=method, example=x)
    return net, session, x


def trained(net: Net, session: Session, steps: int = STEPS * EPOCHS) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 4, (8,))
        session.optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        session.optimizer.step()


@pytest.mark.parametrize("method", ["agp", "magnitude", "clicktrain", "campfire", "prunetrain"])
def test_a_trained_network_shrinks_with_equal_outputs(method: str) -> None:
    choices = {name: c for name, c in CHOICES.items() if name != "hidden"} if method == "prunetrain" else CHOICES
    net, session, x = started(method, choices)
    trained(net, session)
    session.finalize()
    assert torch.equal(session.masks["first"].flatten(1).any(1), session.masks["second"].flatten(1).any(1))
    smaller = autoprune.compact(net, choices, x)
    assert difference(outputs(net, x), outputs(smaller, x)) <= 1e-5
    assert smaller.first.out_channels == smaller.second.out_channels == smaller.wide.in_channels == 8  # type: ignore[union-attr]
    assert smaller.depth.groups == 8  # type: ignore[union-attr]


def test_masks_agree_at_every_step_and_what_belongs_to_a_channel_dies_with_it() -> None:
    net, session, _ = started("agp")
    seen = []
    for _ in range(STEPS * EPOCHS):
        trained(net, session, 1)
        masks = session.masks
        if "first" not in masks:
            continue
        kept = masks["first"].flatten(1).any(1)
        seen.append(int(kept.sum()))
        assert torch.equal(kept, masks["second"].flatten(1).any(1))
        for dead in (net.norm1.weight, net.norm2.bias, net.second.bias, net.wide.weight[:, :, 0, 0].T):
            assert not bool(dead[~kept].any())
        wide = masks["wide"].flatten(1).any(1)
        assert not bool(net.depth.weight[~wide].any() | net.depth.bias[~wide].any())
        assert not bool(net.hidden.weight.reshape(24, 32, 4)[:, ~wide].any())
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 8


def test_a_resumed_training_ends_as_an_unbroken_one() -> None:
    net, session, _ = started("agp")
    trained(net, session)
    first, half, _ = started("agp")
    # Steps of the second half see the same batches: the generator is set anew at each call.
    trained(first, half, 6)
    state, weights, inner = half.state_dict(), first.state_dict(), half.optimizer.state_dict()
    second, rest, _ = started("agp", seed=5)
    second.load_state_dict(weights)
    rest.load_state_dict(state)
    rest.optimizer.load_state_dict(copy.deepcopy(inner))  # loading shares the buffers
    assert {name: mask.tolist() for name, mask in rest.masks.items()} == {
        name: mask.tolist() for name, mask in half.masks.items()
    }
    trained(first, half, 6)
    trained(second, rest, 6)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_layers_with_choices_of_their_own_are_refused_when_they_are_to_shrink() -> None:
    choices: dict[str, Choice] = {"first": Channels(0.5)}
    net, session, x = started("agp", choices)
    trained(net, session)
    session.finalize()
    with pytest.raises(PolicyError, match="'first' and 'second' write the same channels"):
        autoprune.compact(net, choices, x)


def test_a_uniform_policy_keeps_groups_whole() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(1, 1, 8, 8)
    layers = trace(net, x)
    coupling = channel_groups(net, x).coupling
    policy = uniform_policy(layers, ["channels(keep=0.5)"], model="net", coupling=coupling)
    pruned = {name: choice.text for name, choice in policy.choices.items() if isinstance(choice, Channels)}
    # The first convolution stays dense, and so do the layers that it is added to.
    assert pruned == {"wide": "channels(keep=0.5)", "hidden": Channels(16 / 24).text}
    assert coupling.kept(policy.choices) == {"wide": 16, "hidden": 16}
    smaller = sum(layer.weights for layer in coupling.resized(layers, policy.choices))
    assert policy.file.predicted.params_ratio == pytest.approx(smaller / sum(layer.weights for layer in layers))
