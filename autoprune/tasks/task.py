"""A task: a trained dense network and the data it is judged by."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.tasks.data import DataSet, load_data
from autoprune.tasks.names import parse_model
from autoprune.tasks.networks import network_for
from autoprune.tasks.outputs import check_logits
from autoprune.tasks.weights import load_weights


@dataclass(frozen=True, slots=True)
class Task:
    """What a search starts from.

    Attributes:
        name: Data set name.
        model_name: As in ``--model``.
        model: Trained dense network, eval mode, float32.
        example: One normalised image ``(1, C, H, W)`` float32.
        data: Images and splits.
    """

    name: str
    model_name: str
    model: nn.Module
    example: Tensor
    data: DataSet


def load_task(model: str, data: str, *, data_dir: Path | None = None, weights: Path | None = None) -> Task:
    """Return a task of a model with trained weights.

    Args:
        model, data: Names as on the command line.
        data_dir: Folder of the full data set; None uses the data inside the package.
        weights: File of a state dict; None takes what a factory or a pretrained model brings, else the checkpoint
            inside the package.
    Raises:
        UnknownName: No such model or data set.
        ModelError: There is no checkpoint for this model inside the package and none was given.
    """
    data_set = load_data(data, data_dir)
    example = data_set.normalize(data_set.validation.images[:1])
    network = network_for(model, example, data_set.classes)
    name = parse_model(model)
    if weights is not None:
        load_weights(network, weights)
        check_logits(network, example, data_set.classes, name.text)
    elif not name.brings_weights:
        resource = importlib.resources.files("autoprune.assets") / f"{name.base}-{data}.safetensors"
        with importlib.resources.as_file(resource) as path:
            if not path.exists():
                raise ModelError(
                    f"no trained weights of '{name.text}' on '{data}' in the package; train them with "
                    f"`autoprune train --model '{name.text}'` and give the file by --weights."
                )
            load_weights(network, path)
    return Task(data, name.text, network.eval(), example, data_set)
