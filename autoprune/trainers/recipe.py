"""How a network is trained: the numbers that must be equal for two results to be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autoprune.tasks.precision import native_dtype

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """SGD with Nesterov momentum under one learning-rate cycle.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step.
        peak_lr: Highest learning rate of the cycle.
        momentum: Of SGD.
        weight_decay: On convolution and linear weights only.
        rise: Fraction of the steps in which the learning rate rises.
        shift: Largest random shift in pixels; 0 for none.
        flip: Whether images are mirrored at random.
        precision: ``bf16`` autocast or ``fp32``.
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


def native_precision() -> Precision:
    """Return the name of ``native_dtype``."""
    return "bf16" if native_dtype() == torch.bfloat16 else "fp32"


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Return SGD with weight decay on weights and none on biases and BatchNorm."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum, nesterov=True)


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
