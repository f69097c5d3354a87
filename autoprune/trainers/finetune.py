"""A short masked fine-tune: what a pruned network recovers within an epoch or two.

The dense network's outputs are the target beside the labels (Hinton et al., "Distilling the knowledge in a neural
network", arXiv 1503.02531): on a few thousand images they say more than the labels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoprune.tasks.data import DataSet
from autoprune.tasks.outputs import main_output
from autoprune.trainers.recipe import Precision, Recipe, augment, make_optimizer, native_precision


@dataclass(frozen=True, slots=True)
class FinetuneRecipe:
    """How long and how fast.

    Attributes:
        epochs: Passes over the training images at hand.
        batch_size: Images a step.
        peak_lr: Highest learning rate of the cycle.
        rise: Fraction of the steps in which it rises.
        distill: Weight of the dense network's outputs against the labels, 0..1.
        temperature: Of the distillation.
        shift: Largest random shift in pixels.
        precision: ``bf16`` autocast or ``fp32``.
    """

    epochs: int = 2
    batch_size: int = 128
    peak_lr: float = 0.02
    rise: float = 0.2
    distill: float = 0.9
    temperature: float = 4.0
    shift: int = 2
    precision: Precision = field(default_factory=native_precision)


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    masks: Mapping[str, Tensor],
    data: DataSet,
    recipe: FinetuneRecipe,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Fine-tune ``model`` in place; weights outside ``masks`` (layer name → bool mask) stay exactly zero.

    Args:
        model: Pruned network; left in eval mode.
        teacher: Dense network in eval mode, untouched.
        masks: Of the pruned layers.
        data: ``train`` is used.
        recipe: How.
        seed: Decides order and augmentation.
        on_step: Called after every optimizer step.
    """
    base = Recipe(batch_size=recipe.batch_size, peak_lr=recipe.peak_lr, shift=recipe.shift)
    optimizer = make_optimizer(model, base)
    steps = finetune_steps(len(data.train), recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_lr, total_steps=max(2, steps), pct_start=recipe.rise, cycle_momentum=False
    )
    masked = [(model.get_submodule(name).weight, mask) for name, mask in masks.items()]
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        if step % (len(data.train) // recipe.batch_size) == 0:
            order = torch.randperm(len(data.train), generator=generator)
            start = 0
        index = order[start : start + recipe.batch_size]
        start += recipe.batch_size
        images = data.normalize(augment(data.train.images[index], base, generator))
        loss = _loss(model, teacher, images, data.train.labels[index], recipe)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for weight, mask in masked:
                weight.mul_(mask)  # type: ignore[operator]
        on_step()
    model.eval()


def finetune_steps(images: int, recipe: FinetuneRecipe) -> int:
    """Return the optimizer steps of one fine-tune."""
    return recipe.epochs * max(1, images // recipe.batch_size)


def _loss(model: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, recipe: FinetuneRecipe) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = main_output(model(images)).float()
        with torch.no_grad():
            target = main_output(teacher(images)).float()
    t = recipe.temperature
    soft = nn.functional.kl_div(
        torch.log_softmax(logits / t, 1), torch.log_softmax(target / t, 1), log_target=True, reduction="batchmean"
    )
    hard = nn.functional.cross_entropy(logits, labels)
    return recipe.distill * t * t * soft + (1.0 - recipe.distill) * hard
