"""Small networks for the tests of planning and conversion; every one in eval mode, with lively BatchNorms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.tasks.models import CifarResNet


def settled(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and parameters that folding must not get wrong."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    return model.eval().requires_grad_(False)


def resnet(channels: int = 1) -> nn.Module:
    """A residual network with two projection shortcuts, widths 16, 32, 64."""
    torch.manual_seed(0)
    return settled(CifarResNet(1, channels, 10))


class Functional(nn.Module):
    """Everything written as functions and methods, residual with two sums and a flattened map at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding="same")
        self.second = nn.Conv2d(16, 16, (1, 3), padding=(0, 1), bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 4 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = self.norm(self.second(x))
        y += x
        y = torch.add(y, x).relu()
        y = F.max_pool2d(y, 2)
        y = F.avg_pool2d(y, kernel_size=2, stride=2)
        y = F.dropout(y, 0.5, self.training)
        return self.fc(y.view(y.size(0), -1))


class Perceptron(nn.Module):
    """Linear layers and a BatchNorm on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(20, 33), nn.BatchNorm1d(33), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(33, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Strided(nn.Module):
    """Dilation, padded max pooling, a mean at the end, a map as an output of odd size."""

    def __init__(self, *, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.a = nn.Conv2d(3, 20, 5, stride=2, padding=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.b = nn.Conv2d(20, 33, 3, padding=2, dilation=2)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.pool(self.a(x))))
        return x.mean([2, 3]) if self.mean else x


class Concatenated(nn.Module):
    """Two branches side by side, and an activation that no flat plan has."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(3, 32, 1)
        self.c = nn.Conv2d(48, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c(torch.cat([self.a(x), self.b(x)], 1)))
        return self.fc(x.mean([2, 3]))


class Depthwise(nn.Module):
    """A grouped convolution between two that are not, and an activation that no flat plan has."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 32, 1)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.project = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.depth(F.relu6(self.expand(x)))))


class Tokens(nn.Module):
    """A linear layer on a sequence of vectors per image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.mix = nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.patch(x).flatten(2).transpose(1, 2)).mean(1)


PLANNED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (resnet, (1, 12, 12)),
    "functional": (lambda: settled(Functional()), (3, 16, 16)),
    "perceptron": (lambda: settled(Perceptron()), (20,)),
    "strided-mean": (lambda: settled(Strided(mean=True)), (3, 17, 13)),
    "strided-map": (lambda: settled(Strided(mean=False)), (3, 17, 13)),
}
NESTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "concatenated": (lambda: settled(Concatenated()), (3, 10, 10)),
    "depthwise": (lambda: settled(Depthwise()), (3, 9, 9)),
    "tokens": (lambda: settled(Tokens()), (3, 16, 16)),
}
