"""A short masked fine-tune: what a pruned network recovers within an epoch or two.

The dense network's outputs are the target beside the labels (Hinton et al., "Distilling the knowledge in a neural
network", arXiv 1503.02531): on a few thousand images they say more than the labels do.
"""

from __future__ import annotations

import threading
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
        distill: Weight of the dense network's outputs against the labels, 0..1; with 1 no labels are needed.
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


class Teacher:
    """A dense network's logits by step, made once for all networks that learn from the same batches.

    Args:
        model: In eval mode, untouched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[int, Tensor] = {}
        self._making = threading.Lock()

    def logits(self, step: int, images: Tensor) -> Tensor:
        """Return float32 logits (N, classes) of a step's images, the same ones for every network that asks."""
        with self._making:
            if step not in self._known:
                with torch.no_grad():
                    self._known[step] = main_output(self._model(images)).float()
            return self._known[step]


def finetune(
    model: nn.Module,
    teacher: Teacher,
    masks: Mapping[str, Tensor],
    data: DataSet,
    recipe: FinetuneRecipe,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Fine-tune ``model`` in place; what lies outside ``masks`` stays exactly zero.

    Args:
        model: Pruned network; left in eval mode.
        teacher: The dense network's; shared only by fine-tunes of one recipe and seed on the same data.
        masks: Name of a layer (its weight) or of a parameter → bool mask of what is kept.
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
    parameters = dict(model.named_parameters())
    masked = [(parameters[name if name in parameters else f"{name}.weight"], mask) for name, mask in masks.items()]
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        if step % max(1, len(data.train) // recipe.batch_size) == 0:
            order = torch.randperm(len(data.train), generator=generator)
            start = 0
        index = order[start : start + recipe.batch_size]
        start += recipe.batch_size
        images = data.normalize(augment(data.train.images[index], base, generator))
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits, target = main_output(model(images)).float(), teacher.logits(step, images)
        loss = _loss(logits, target, data.train.labels[index], recipe)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for weight, mask in masked:
                weight.mul_(mask)
        on_step()
    model.eval()


def finetune_steps(images: int, recipe: FinetuneRecipe) -> int:
    """Return the optimizer steps of one fine-tune."""
    return recipe.epochs * max(1, images // recipe.batch_size)


def _loss(logits: Tensor, target: Tensor, labels: Tensor, recipe: FinetuneRecipe) -> Tensor:
    t = recipe.temperature
    soft = nn.functional.kl_div(
        torch.log_softmax(logits / t, 1), torch.log_softmax(target / t, 1), log_target=True, reduction="batchmean"
    )
    if recipe.distill >= 1.0:
        return t * t * soft
    hard = nn.functional.cross_entropy(logits, labels)
    return recipe.distill * t * t * soft + (1.0 - recipe.distill) * hard
