"""The EfficientNet example: padded convolutions rewritten without another output, crops, and a whole search."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from image_folders import photo
from networks import settled
from small_task import quick_measurements
from torch import Tensor, nn

from autoprune.core.policy import Policy

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


def mobile() -> nn.Module:
    """Two inverted bottlenecks in small."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, filters, window, groups in ((3, 32, 3, 1), (32, 64, 1, 1), (64, 64, 3, 64), (64, 64, 1, 1)):
        conv = nn.Conv2d(channels, filters, window, 2 if window == 3 else 1, window // 2, groups=groups, bias=False)
        layers += [conv, nn.BatchNorm2d(filters), nn.ReLU6()]
    return settled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1000)))


def test_a_folder_of_crops_is_searched_end_to_end(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        photo(seed, 80, 120).save(tmp_path / "photos" / f"{seed}.png")
    monkeypatch.setattr(example, "network", mobile)
    monkeypatch.setattr(example, "TRANSFORM", "size=32,resize=36")
    words = f"--images {tmp_path}/images --photos {tmp_path}/photos --crops 40 --budget macs=75% --evaluations 2 "
    words += f"--train 16 --validation 8 --test 4 --agent knapsack --runs-dir {tmp_path}/runs"
    monkeypatch.setattr(sys, "argv", ["efficientnet.py", *words.split()])
    with quick_measurements():
        example.main()
    out = capsys.readouterr().out
    assert "Figures are agreement, not accuracy" in out
    policy = Policy.load(tmp_path / "runs" / "efficientnet-lite0" / "policy.json")
    assert policy.file.metric == "agreement"
    pruned = {name for name, choice in policy.file.choices.items() if choice != "dense"}
    # Stem, depthwise convolution and classifier stay as they are.
    assert pruned
    assert pruned <= {"3", "9"}
    assert len(list((tmp_path / "images").iterdir())) == 40
