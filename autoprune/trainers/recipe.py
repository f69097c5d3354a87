"""How a network is trained: the numbers that must be equal for two results to be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.tasks.precision import native_dtype

Precision = Literal["bf16", "fp32"]
OptimizerName = Literal["sgd", "adam"]
ScheduleName = Literal["cycle", "steps", "cosine"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """An optimizer under a learning-rate schedule, and what happens to the images.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step.
        peak_lr: Highest learning rate.
        momentum: Of SGD.
        weight_decay: On convolution and linear weights only.
        rise: Fraction of the steps in which the learning rate rises under ``cycle``.
        shift: Largest random shift in pixels; 0 for none.
        flip: Whether images are mirrored at random.
        precision: ``bf16`` autocast or ``fp32``.
        optimizer: ``sgd`` (Nesterov momentum) or ``adam``.
        schedule: ``cycle`` (rise and cosine fall), ``steps`` (a tenth at each of ``drops``) or ``cosine``.
        drops: Epochs of the drops.
        mixup: α of the Beta distribution by which pairs of images are mixed; 0 for none.
        mixup_start: First epoch with mixed images.
    """

    epochs: int = 16
    batch_size: int = 128
    peak_lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rise: float = 0.25
    shift: int = 2
    flip: bool = True
    precision: Precision = "fp32"
    optimizer: OptimizerName = "sgd"
    schedule: ScheduleName = "cycle"
    drops: tuple[int, ...] = ()
    mixup: float = 0.0
    mixup_start: int = 0

    def record(self) -> dict[str, object]:
        """Return the recipe as JSON values, by which two trainings are compared."""
        return {**asdict(self), "drops": list(self.drops)}

    def lasting(self, epochs: int) -> Recipe:
        """Return the recipe for another number of epochs; its own epochs move in proportion."""
        drops = tuple(scaled_epoch(drop, self.epochs, epochs) for drop in self.drops)
        start = scaled_epoch(self.mixup_start, self.epochs, epochs)
        return replace(self, epochs=epochs, drops=drops, mixup_start=start)


def scaled_epoch(epoch: int, of: int, to: int) -> int:
    """Return where an epoch of a training of ``of`` epochs falls in one of ``to``."""
    return round(epoch * to / of)


def rate_factor(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of a step relative to ``peak_lr``.

    Args:
        recipe: Its schedule is laid over ``steps``.
        step: 0..steps − 1 since the schedule began.
        steps: Length of the schedule.
    """
    if recipe.schedule == "steps":
        epoch = step * recipe.epochs / steps
        return float(0.1 ** sum(epoch >= drop for drop in recipe.drops))
    top = recipe.rise * steps - 1 if recipe.schedule == "cycle" else 0.0
    if step < top:
        return _cosine(1 / 25, 1.0, step / top)
    low = 4e-6 if recipe.schedule == "cycle" else 0.0
    length = steps - 1 - max(0.0, top)
    return _cosine(1.0, low, (step - max(0.0, top)) / length if length > 0 else 0.0)


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * min(1.0, fraction)))


def segment_factor(recipe: Recipe, restarts: Sequence[tuple[int, float]], step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step relative to ``peak_lr`` when the schedule begins anew on the way.

    Args:
        recipe: Its schedule is laid over each stretch between two beginnings.
        restarts: Epoch and height of every beginning after the first, in order.
        step: Optimizer steps since the start of the training.
        steps_per_epoch: Of the training.
    """
    bounds = [(0, 1.0), *((epoch * steps_per_epoch, scale) for epoch, scale in restarts)]
    end = recipe.epochs * steps_per_epoch
    for first, scale in reversed(bounds):
        if step >= first:
            return scale * rate_factor(recipe, min(step, end - 1) - first, max(1, end - first))
        end = first
    return 1.0


def native_precision() -> Precision:
    """Return the name of ``native_dtype``."""
    return "bf16" if native_dtype() == torch.bfloat16 else "fp32"


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD | torch.optim.Adam:
    """Return the recipe's optimizer with weight decay on weights and none on biases and BatchNorm."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.peak_lr)
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum, nesterov=True)


def mix(images: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Return images mixed in pairs, who the partner of each is, and the share of an image's own label.

    Args:
        images: (N, C, H, W).
        alpha: λ ~ Beta(α, α).
        generator: Of every draw.
    Source: Zhang et al., "mixup: beyond empirical risk minimization" (arXiv 1710.09412).
    """
    share = _beta(alpha, generator)
    partner = torch.randperm(len(images), generator=generator)
    return share * images + (1.0 - share) * images[partner], partner, share


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(α, α); torch's own draw takes no generator."""
    seed = int(torch.randint(0, 2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return the images ``(N, C, H, W)`` shifted by up to ``shift`` pixels (zero fill) and mirrored at random."""
    if recipe.flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if recipe.shift:
        count, _, height, width = images.shape
        pad = recipe.shift
        padded = nn.functional.pad(images, (pad, pad, pad, pad))
        top, left = (torch.randint(0, 2 * pad + 1, (count, 1), generator=generator) for _ in range(2))
        rows = (top + torch.arange(height))[:, :, None]
        columns = (left + torch.arange(width))[:, None, :]
        first = torch.arange(count)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[first, rows, columns].permute(0, 3, 1, 2)
    return images
