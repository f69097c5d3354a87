"""The EfficientNet example: padded convolutions rewritten without another output, and crops of photographs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from image_folders import photo
from torch import Tensor, nn

from autoprune.tasks.pictures import read_rgb

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("efficientnet")


class Padded(nn.Conv2d):
    """A convolution that pads its input itself, as networks that came from TensorFlow do."""

    def __init__(self, sides: tuple[int, int, int, int], stride: int, groups: int) -> None:
        super().__init__(8, 8, 3, stride, groups=groups, bias=False)
        self.static_padding = nn.ZeroPad2d(sides) if any(sides) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, None, self.stride, 0, 1, self.groups)


@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0), (1, 1, 0, 0)])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 8)])
def test_a_padded_convolution_is_rewritten_without_another_output(
    sides: tuple[int, int, int, int], stride: int, groups: int, example: ModuleType
) -> None:
    module, x = Padded(sides, stride, groups), torch.randn(2, 8, 12, 12)
    plain = example.plain(module)
    assert all(type(part) in (nn.Conv2d, nn.ZeroPad2d, nn.Sequential) for part in plain.modules())
    assert torch.equal(plain(x), module(x))


def test_crops_are_squares_of_every_photograph_and_the_same_each_time(example: ModuleType, tmp_path: Path) -> None:
    for seed in range(3):
        photo(seed, 80, 120).save(tmp_path / f"{seed}.png")
    photos = sorted(tmp_path.glob("*.png"))
    for name in ("first", "second"):
        example.cut(photos, tmp_path / name, 6)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("first", "second"))
    assert len(first) == 6
    assert all(read_rgb(path).shape == (3, 256, 256) for path in first)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len({path.read_bytes() for path in first}) == 6
