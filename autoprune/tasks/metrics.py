"""What a network's outputs are worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.tasks.outputs import main_output


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
