"""Networks by name with an example input, untrained: what latency is measured of.

``resnet20`` is a built-in network on the data set's images; ``resnet20@3x32x32`` on images of another size;
``torchvision:resnet50`` one of torchvision's on 3×224×224.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.core.registry import unknown_name
from autoprune.tasks.data import load_data
from autoprune.tasks.models import build_model

_PREFIX = "torchvision:"
_IMAGENET = (3, 224, 224)
_SIZE = re.compile(r"(\d+)x(\d+)x(\d+)")


def untrained(name: str, data: str, seed: int = 0, data_dir: Path | None = None) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode with random weights, and an example (1, C, H, W) float32.

    Args:
        name: As in the module's own words.
        data: Data set that gives a built-in network its images' size and its number of classes.
        seed: Of weights and example; torch's global generator is left as it was.
        data_dir: Folder of the full data set; None uses the data inside the package.
    Raises:
        UnknownName: No such network.
        ModelError: A size that cannot be read.
    """
    base, at, size = name.partition("@")
    shape = _shape(name, size) if at else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base.startswith(_PREFIX):
            model, shape = _torchvision(base), shape or _IMAGENET
        else:
            data_set = load_data(data, data_dir)
            channels, height, width = (int(number) for number in data_set.train.images.shape[1:])
            shape = shape or (channels, height, width)
            model = build_model(base, shape[0], data_set.classes)
        return model.eval(), torch.randn(1, *shape)


def _shape(name: str, text: str) -> tuple[int, int, int]:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ModelError(f"model '{name}': the size after @ must be CHANNELSxHEIGHTxWIDTH, such as 3x32x32.")
    channels, height, width = (int(number) for number in match.groups())
    return channels, height, width


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model, list_models

    own = name.removeprefix(_PREFIX)
    if own not in list_models():
        raise unknown_name("torchvision model", own, list_models())
    model: nn.Module = get_model(own, weights=None)
    return model
