"""Dead channels leave without a change of the outputs, and stay where they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import settled
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.trainers.dead_channels import eliminate_dead_channels


class Plain(nn.Module):
    """Padded and unpadded convolutions, two kinds of flattening, a perceptron."""

    def __init__(self, *, flatten: bool) -> None:
        super().__init__()
        self.flatten = flatten
        self.a = nn.Conv2d(1, 6, 3, padding=1)
        self.na = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 8, 3, bias=False)
        self.nb = nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 7, 3, padding=1)
        self.fc1 = nn.Linear(7 * 9 if flatten else 7, 9)
        self.fc2 = nn.Linear(9, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.na(self.a(x)))
        x = self.nb(self.b(x)).relu()
        x = F.max_pool2d(self.c(x).relu(), 2)
        x = torch.flatten(x, 1) if self.flatten else x.mean((2, 3))
        out: Tensor = self.fc2(self.fc1(x).relu())
        return out


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = (self.norm(self.b(x)) + x).relu()
        out: Tensor = self.fc(x.mean([2, 3]))
        return out


def kill(model: nn.Module, **channels: list[int]) -> nn.Module:
    for name, numbers in channels.items():
        with torch.no_grad():
            model.get_submodule(name).weight[numbers] = 0  # type: ignore[operator, union-attr]
    return model


def make(cls: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return settled(cls())


def check(model: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller, eliminated = eliminate_dead_channels(model)
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(smaller(images), model(images), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    counts: dict[str, int] = {}
    for found in eliminated:
        counts[found.layer] = counts.get(found.layer, 0) + len(found.channels)
    return smaller, counts


@pytest.mark.parametrize("flatten", [True, False])
def test_channels_leave_losslessly_with_their_constants_folded(flatten: bool) -> None:
    model = kill(make(lambda: Plain(flatten=flatten)), a=[0, 3], c=[2, 5, 6], fc1=[1, 8])
    smaller, counts = check(model)
    assert counts == {"a": 2, "c": 3, "fc1": 2}
    shapes = {name: tuple(value.shape) for name, value in smaller.named_parameters()}
    assert shapes["a.weight"] == (4, 1, 3, 3)
    assert shapes["b.weight"] == (8, 4, 3, 3)
    assert shapes["fc1.weight"] == (7, 4 * (9 if flatten else 1))
    assert shapes["fc2.weight"] == (4, 7)
    assert "fc2.bias" in shapes  # the classifier had none to fold into
    assert smaller.na.num_features == 4  # type: ignore[union-attr]


def test_a_padded_reader_keeps_channels_that_emit_anything() -> None:
    model = kill(make(lambda: Plain(flatten=False)), b=[1, 2, 3])
    with torch.no_grad():
        model.nb.bias[1:4] = torch.tensor([5.0, -5.0, -5.0])  # type: ignore[union-attr, operator, index]
    _, counts = check(model)
    assert counts == {"b": 2}


def test_what_a_residual_add_reads_stays() -> None:
    _, counts = check(kill(make(Residual), a=[0, 1], b=[2, 3]))
    assert counts == {}


def test_a_layer_that_dies_by_another_leaves_too() -> None:
    model = make(lambda: Plain(flatten=False))
    with torch.no_grad():
        model.b.weight[:2, 1:] = 0  # type: ignore[union-attr, operator, index]
        model.a.weight[0] = 0  # type: ignore[union-attr, operator, index]
        model.nb.bias[:2] = -50.0  # type: ignore[union-attr, operator, index]
    _, counts = check(model)
    # Filters 0 and 1 of b read only channel 0 of a; once that is gone they are all zero.
    assert counts == {"a": 1, "b": 2}


def test_a_layer_keeps_its_last_filter() -> None:
    smaller, counts = check(kill(make(lambda: Plain(flatten=False)), c=list(range(7))))
    assert counts == {"c": 6}
    assert smaller.c.out_channels == 1  # type: ignore[union-attr]


def test_a_model_that_branches_on_its_input_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="cannot be traced to find its dead channels"):
        eliminate_dead_channels(Branching())
