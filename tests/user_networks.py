"""Networks as a user's own package has them: factories that ``package.module:name`` points to."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def small(width: int = 16, classes: int = 10, channels: int = 1) -> nn.Module:
    """Two convolutions and a classifier, always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
        )


class Pair(nn.Module):
    """Wants two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1) + y.flatten(1))
        return out


class Dictionary(nn.Module):
    """Returns its scores in a dict, beside something else."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x, "logits": self.body(x)}


class Broken(nn.Module):
    """Returns NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) * float("nan")
        return out


def no_network() -> int:
    return 3


def failing() -> nn.Module:
    raise ValueError("no such depth")


not_callable = 7
