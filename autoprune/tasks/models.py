"""The built-in networks, sized for 28×28 and 32×32 images.

Source: He et al., "Deep residual learning for image recognition" (arXiv 1512.03385) §4.2, with projection shortcuts;
Simonyan & Zisserman, "Very deep convolutional networks" (arXiv 1409.1556), with BatchNorm and one classifier layer;
Sandler et al., "MobileNetV2" (arXiv 1801.04381), with the strides of its first two stages taken out.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

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


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a residual add; the last widens fourfold."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class WideCifarResNet(nn.Module):
    """ImageNet's ResNet on small images: four stages of widths 64 to 512, a 3×3 first convolution and no pooling.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        blocks: Of each stage.
        channels: Image channels.
        classes: Outputs.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...], channels: int, classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        now, expansion = 64, 4 if block is Bottleneck else 1
        for stage, count in enumerate(blocks):
            width = 64 << stage
            layers = []
            for index in range(count):
                layers.append(block(now, width, 2 if stage > 0 and index == 0 else 1))
                now = width * expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(now, classes)
        _init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(self.flatten(self.pool(x)))
        return out


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise 3×3, 1×1 projection; a residual add where the shape stays."""

    def __init__(self, channels: int, filters: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        layers += [
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, filters, 1, bias=False), nn.BatchNorm2d(filters),
        ]
        self.body = nn.Sequential(*layers)
        self.is_residual = stride == 1 and channels == filters

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.is_residual else y


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 on small images."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        # expansion, filters, blocks, stride of the first
        plan = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        now = 32
        for expansion, filters, blocks, stride in (*plan, (6, 320, 1, 1)):
            for index in range(blocks):
                layers.append(InvertedResidual(now, filters, stride if index == 0 else 1, expansion))
                now = filters
        layers += [nn.Conv2d(now, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(1280, classes)
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


def _wide_resnet(block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...]) -> ModelFactory:
    return lambda channels, classes: WideCifarResNet(block, blocks, channels, classes)


def _vgg(stages: tuple[int, ...]) -> ModelFactory:
    return lambda channels, classes: CifarVGG(stages, channels, classes)


for _depth in (20, 32, 44, 56):
    MODELS.register(f"resnet{_depth}")(_resnet((_depth - 2) // 6))
MODELS.register("vgg11")(_vgg((1, 1, 2, 2, 2)))
MODELS.register("vgg13")(_vgg((2, 2, 2, 2, 2)))
MODELS.register("vgg16")(_vgg((2, 2, 3, 3, 3)))
MODELS.register("vgg19")(_vgg((2, 2, 4, 4, 4)))
MODELS.register("resnet18-cifar")(_wide_resnet(BasicBlock, (2, 2, 2, 2)))
MODELS.register("resnet34-cifar")(_wide_resnet(BasicBlock, (3, 4, 6, 3)))
MODELS.register("resnet50-cifar")(_wide_resnet(Bottleneck, (3, 4, 6, 3)))
MODELS.register("mobilenetv2-cifar")(CifarMobileNetV2)


def build_model(name: str, channels: int = 1, classes: int = 10) -> nn.Module:
    """Return a freshly initialised network (torch's global generator).

    Raises:
        UnknownName: No such model.
    """
    return MODELS.get(name)(channels, classes)
