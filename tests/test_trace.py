"""Tracing a model into layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.search_spaces.trace import trace, trace_report


class Net(nn.Module):
    """Declared in another order than it runs; one layer runs twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.unused = nn.Conv2d(3, 3, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding="same", bias=False)
        self.stem = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2))
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.deep = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = self.twice(torch.relu(self.twice(x)))
        x = self.drop(self.deep(x))
        return self.head(x.mean((2, 3)))


def test_layers_come_in_execution_order_with_their_shapes() -> None:
    layers = trace(Net(), torch.zeros(1, 3, 10, 12))
    assert [layer.name for layer in layers] == ["stem", "twice", "deep", "head"]
    stem, twice, deep, head = layers
    assert (stem.op, stem.weight_shape, stem.stride, stem.padding) == ("conv", (8, 3, 3, 5), (2, 1), (1, 2))
    assert (stem.input_hw, stem.output_hw, stem.bias, stem.calls) == ((10, 12), (5, 12), True, 1)
    assert (twice.padding, twice.calls, twice.bias) == ((1, 1), 2, False)
    assert twice.macs == 8 * 8 * 9 * 5 * 12 * 2
    assert (deep.groups, deep.dilation, deep.weight_shape, deep.channels) == (4, (2, 2), (8, 2, 3, 3), 8)
    assert (head.op, head.weight_shape, head.input_hw, head.macs) == ("linear", (5, 8), (1, 1), 40)


def test_macs_of_a_linear_layer_count_every_token() -> None:
    (layer,) = trace(nn.Sequential(nn.Linear(4, 6)), torch.zeros(2, 7, 4))
    assert (layer.input_hw, layer.macs) == ((7, 1), 6 * 4 * 7)


def test_uncalled_layers_are_listed_apart() -> None:
    assert trace_report(Net(), torch.zeros(1, 3, 10, 12)).uncalled == ("unused",)


def test_a_layer_shared_by_maps_of_two_sizes_is_reported() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(3, 3, 1)
            self.other = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(x).mean() + self.shared(x[..., ::2, ::2]).mean() + self.other(self.other(x)).mean()

    report = trace_report(Pyramid(), torch.zeros(1, 3, 8, 8))
    assert report.varying == ("shared",)
    assert [layer.calls for layer in report.layers] == [2, 2]
    assert report.layers[0].input_hw == (8, 8)


def test_the_model_is_left_as_it_was() -> None:
    model = Net().train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    trace(model, torch.ones(1, 3, 10, 12))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


class Noisy(nn.Module):
    """Draws random numbers in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + torch.rand_like(x))


def test_random_generators_are_left_alone_by_a_noisy_model() -> None:
    model = Noisy()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    trace(model, torch.zeros(1, 1, 4, 4))
    assert torch.equal(torch.rand(4), expected)


def test_a_model_that_fails_says_so_in_one_line_and_keeps_no_hook() -> None:
    model = Net().train()
    with pytest.raises(ModelError, match=r"Net failed on an example of shape \(1, 4, 10, 12\)") as error:
        trace(model, torch.zeros(1, 4, 10, 12))
    assert "\n" not in str(error.value)
    assert model.training
    assert model.stem.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to prune"):
        trace(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.zeros(1, 3, 4, 4))


def test_a_layer_called_by_keyword_is_traced() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    assert [layer.output_hw for layer in trace(Keyword(), torch.zeros(1, 1, 4, 4))] == [(4, 4)]
