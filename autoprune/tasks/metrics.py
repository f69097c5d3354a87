"""What a network's outputs are worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from autoprune.core.errors import DataError, ModelError
from autoprune.core.registry import unknown_name
from autoprune.tasks.dataset import DataSet, Split
from autoprune.tasks.outputs import main_output

Metric = Literal["accuracy", "agreement"]
METRICS: tuple[Metric, ...] = ("accuracy", "agreement")


def evaluate_logits(model: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """Return the logits ``(N, classes)`` float32 of normalised images, in eval mode without gradients."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = torch.cat(
            [main_output(model(images[start : start + batch])).float() for start in range(0, len(images), batch)]
        )
    model.train(was_training)
    return logits


def top1(logits: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in 0..1."""
    return float((logits.argmax(1) == labels).double().mean())


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Return the top-1 accuracy in 0..1 of ``model`` on normalised images."""
    return top1(evaluate_logits(model, images, batch), labels)


def split_logits(model: nn.Module, split: Split, data: DataSet, batch: int = 50) -> Tensor:
    """Return the logits ``(N, classes)`` of a split's images, normalised a batch at a time: files need not fit at once.

    Args:
        model: On the CPU.
        split: Which images.
        data: Says how they are normalised.
        batch: Images a step.
    """
    parts = [
        evaluate_logits(model, data.normalize(split.images[start : start + batch]), batch)
        for start in range(0, len(split), batch)
    ]
    return torch.cat(parts)


def split_accuracy(model: nn.Module, split: Split, data: DataSet, batch: int = 50) -> float:
    """Return the top-1 accuracy in 0..1 on a split; see ``split_logits``."""
    return top1(split_logits(model, split, data, batch), split.labels)


def metric_of(name: str | None, data: DataSet) -> Metric:
    """Return the metric of that name, accuracy for None.

    Raises:
        UnknownName: There is none.
        DataError: Accuracy, of images without labels.
    """
    if name is not None and name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    metric: Metric = "agreement" if name == "agreement" else "accuracy"
    if metric == "accuracy" and not data.labelled:
        raise DataError(
            f"data '{data.name}' has no labels, so no accuracy; give --metric agreement to judge by the dense "
            "network's answers, or a folder a class."
        )
    return metric


def labelled_by(model: nn.Module, data: DataSet) -> DataSet:
    """Return the data with a network's own answers as labels of validation and test images.

    Top-1 accuracy on them is the agreement with that network. Training images keep theirs: who fine-tunes by
    distillation alone needs none.

    Args:
        model: Dense network, on the CPU.
        data: With labels or without.
    """

    def answered(split: Split) -> Split:
        return Split(split.images, split_logits(model, split, data).argmax(1))

    return replace(data, validation=answered(data.validation), test=answered(data.test))


def own_score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """Return what the user's function says of a network; more is better.

    Raises:
        ModelError: It fails, or returns no finite number.
    """
    try:
        value = float(evaluate(model))
    except Exception as error:  # the user's code
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(f"evaluate(model) failed: {type(error).__name__}: {reason[:160]}") from error
    if not math.isfinite(value):
        raise ModelError(f"evaluate(model) returned {value}; it must return a finite number, more being better.")
    return value
