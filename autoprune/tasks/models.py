"""The built-in networks, sized for 28×28 and 32×32 images.

Source: He et al., "Deep residual learning for image recognition" (arXiv 1512.03385) §4.2, with projection shortcuts;
Simonyan & Zisserman, "Very deep convolutional networks" (arXiv 1409.1556), with BatchNorm and one classifier layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.core.registry import Registry

ModelFactory = Callable[[int, int], nn.Module]
MODELS: Registry[ModelFactory] = Registry("model")


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a residual add; a 1×1 projection where the shape changes."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """ResNet of 6n+2 layers: three stages of n basic blocks, widths 16, 32, 64.

    Args:
        blocks: n, blocks a stage.
        channels: Image channels.
        classes: Outputs.
    """

    def __init__(self, blocks: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)
        _init_he(self)

    @staticmethod
    def _stage(channels: int, filters: int, stride: int, blocks: int) -> nn.Sequential:
        rest = [BasicBlock(filters, filters, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(channels, filters, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.fc(self.flatten(self.pool(x)))
        return out


class CifarVGG(nn.Module):
    """VGG with BatchNorm; convolutions per stage given, max pooling between stages, one linear classifier."""

    def __init__(self, stages: tuple[int, ...], channels: int, classes: int) -> None:
        super().__init__()
        widths = (64, 128, 256, 512, 512)
        layers: list[nn.Module] = []
        for stage, (count, width) in enumerate(zip(stages, widths, strict=True)):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            if stage < 4:  # the fifth pooling would leave nothing of a 28×28 image
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)
        _init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.flatten(self.pool(self.features(x))))
        return out


def _init_he(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet(blocks: int) -> ModelFactory:
    return lambda channels, classes: CifarResNet(blocks, channels, classes)


def _vgg(stages: tuple[int, ...]) -> ModelFactory:
    return lambda channels, classes: CifarVGG(stages, channels, classes)


for _depth in (20, 32, 44, 56):
    MODELS.register(f"resnet{_depth}")(_resnet((_depth - 2) // 6))
MODELS.register("vgg11")(_vgg((1, 1, 2, 2, 2)))
MODELS.register("vgg13")(_vgg((2, 2, 2, 2, 2)))
MODELS.register("vgg16")(_vgg((2, 2, 3, 3, 3)))


def build_model(name: str, channels: int = 1, classes: int = 10) -> nn.Module:
    """Return a freshly initialised network (torch's global generator).

    Raises:
        UnknownName: No such model.
    """
    return MODELS.get(name)(channels, classes)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors state dict into ``model``; every key must match.

    Raises:
        ModelError: The file is absent or damaged, or keys or shapes differ (the first one is named).
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"weights {path}: cannot be read as safetensors ({error}).") from None
    own = model.state_dict()
    for key, tensor in own.items():
        if key not in state:
            raise ModelError(f"weights {path}: key '{key}' is missing; these weights are of another model.")
        if state[key].shape != tensor.shape:
            got, want = tuple(state[key].shape), tuple(tensor.shape)
            raise ModelError(f"weights {path}: '{key}' has shape {got}, this model wants {want}.")
    extra = sorted(set(state) - set(own))
    if extra:
        raise ModelError(f"weights {path}: key '{extra[0]}' is unknown to this model.")
    with torch.no_grad():
        model.load_state_dict(state)
