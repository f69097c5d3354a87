"""A task: a trained dense network and the data it is judged by."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.tasks.data import DataSet, load_data
from autoprune.tasks.metrics import Metric, labelled_by, metric_of
from autoprune.tasks.names import parse_model
from autoprune.tasks.networks import network_for
from autoprune.tasks.outputs import check_logits
from autoprune.tasks.preprocessing import prepared
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
        metric: ``accuracy``, or ``agreement`` with the dense network, which needs no labels.
        evaluate: The user's own judge of finalists: a network in, a score out, more being better.
    """

    name: str
    model_name: str
    model: nn.Module
    example: Tensor
    data: DataSet
    metric: Metric = "accuracy"
    evaluate: Callable[[nn.Module], float] | None = None

    @property
    def scored_by(self) -> str:
        """What the figures of finalists are: ``accuracy``, ``agreement`` or ``score``."""
        return "score" if self.evaluate is not None else self.metric


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
    data = prepared(data, model)
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


def judged_task(task: Task, metric: str | None = None) -> Task:
    """Return the task ready to be searched: by accuracy, or by agreement with its dense network.

    Args:
        task: Its own metric counts where ``metric`` is None.
        metric: ``accuracy`` or ``agreement``.
    Raises:
        UnknownName: No such metric.
        DataError: Accuracy is asked of images without labels, and no own ``evaluate`` stands in for it.
    """
    wanted = metric or task.metric
    if task.evaluate is not None and not task.data.labelled:
        wanted = "agreement"  # the search's own signal; finalists are judged by the user's function
    found = metric_of(wanted, task.data)
    data = labelled_by(task.model, task.data) if found == "agreement" else task.data
    return replace(task, metric=found, data=data)
