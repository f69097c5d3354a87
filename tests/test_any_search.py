"""What a search does with any network: moments, weights exchanged, BatchNorms folded, outputs of several parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.core.choices import Block, Choice, Fine
from autoprune.envs.database import build_database, measure_moments
from autoprune.envs.network import StitchedNetwork
from autoprune.envs.prefix import PrefixCache
from autoprune.search_spaces.trace import trace


class _ActNorm(nn.BatchNorm2d):
    """A BatchNorm with an activation inside, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Odd(nn.Module):
    """Reflected borders, an output read beside its BatchNorm, one weight in two layers, a dict at the end."""

    def __init__(self, *, read_twice: bool) -> None:
        super().__init__()
        self.read_twice = read_twice
        self.first = nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, (2, 4), padding="same")
        self.act = _ActNorm(16)
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.right.weight = self.left.weight
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        z = self.norm(y) + y if self.read_twice else self.norm(y)
        z = self.act(self.second(F.relu(z))).mean([2, 3])
        return {"maps": y, "logits": self.out(self.right(F.relu(self.left(z))))}


def _odd(*, read_twice: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, images = Odd(read_twice=read_twice), torch.randn(40, 3, 9, 8)
    with torch.no_grad():
        for _ in range(20):
            model(images)  # statistics of its own maps
    return model.eval(), images


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("read_twice", [False, True])
def test_a_stitched_network_judges_as_the_masked_model_does(read_twice: bool) -> None:
    model, images = _odd(read_twice=read_twice)
    layers = {layer.name: layer for layer in trace(model, images[:1])}
    assert set(layers) == {"first", "second", "left", "out"}
    options: dict[str, tuple[Choice, ...]] = {"second": (Block(keep=0.5),), "left": (Fine(keep=0.3),)}
    database = build_database(model, {layers[name]: choices for name, choices in options.items()}, images)
    network = StitchedNetwork(model, images)
    policy = {name: choices[0] for name, choices in options.items()}
    for choices in ({}, policy):
        network.load(database.policy_weights(choices))
        network.fold()
        masked = network.model
        with torch.no_grad():
            want = masked(images)["logits"]
        error = float((network.logits(images) - want).abs().max() / want.abs().max())
        assert error < 0.05  # the folded copy runs in bfloat16 where the machine has it
    assert torch.equal(masked.get_submodule("right").weight, database.weight("left", Fine(keep=0.3)))  # type: ignore[arg-type]
    cache = PrefixCache(network.folded, network.to_native(images), list(layers))
    torch.testing.assert_close(cache.logits("second"), network.logits(images), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_moments_see_the_border_that_a_layer_puts_around_its_map() -> None:
    model, images = _odd(read_twice=False)
    (first, second, *_) = trace(model, images[:1])
    moments = measure_moments(model, [first, second], images)
    with torch.no_grad():
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        hidden = F.relu(model.norm(model.first(images)))  # type: ignore[operator]
    columns = F.unfold(padded, 3).transpose(1, 2).reshape(-1, 27)
    torch.testing.assert_close(moments["first"].mean_D, columns.mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moments["first"].second_DD, columns.T @ columns / len(columns), rtol=1e-3, atol=1e-3)
    columns = F.unfold(F.pad(hidden, (1, 2, 0, 1)), (2, 4)).transpose(1, 2).reshape(-1, 128)
    torch.testing.assert_close(moments["second"].mean_D, columns.mean(0), rtol=1e-3, atol=1e-3)
