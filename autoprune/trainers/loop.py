"""The built-in training loop: one recipe, checkpoints every epoch, and the same result after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.core.errors import RunError
from autoprune.core.rundir import atomic_path
from autoprune.tasks.data import DataSet
from autoprune.tasks.metrics import accuracy
from autoprune.trainers.recipe import Recipe, augment, make_optimizer


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of a training log; accuracy in 0..1 on validation data."""

    epoch: int
    train_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float


@dataclass(slots=True)
class TrainState:
    """Everything an epoch changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    log: list[Epoch]


def train(
    model: nn.Module,
    data: DataSet,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train ``model`` in place and return its log, an entry an epoch.

    Args:
        model: Trained in channels-last memory format.
        data: ``train`` and ``validation`` are used.
        recipe: How.
        seed: Decides order and augmentation of every epoch, so that a resumed run sees what an unbroken one sees.
        checkpoint: Written after every epoch; an existing one is gone on from.
        on_epoch: Called after every epoch.
    Raises:
        RunError: The checkpoint is damaged or of another recipe.
    """
    model.to(memory_format=torch.channels_last)
    state = _start(model, recipe, steps_per_epoch(data, recipe))
    if checkpoint is not None and checkpoint.exists():
        _load(checkpoint, state, recipe, seed)
    images = data.normalize(data.validation.images)
    for epoch in range(len(state.log), recipe.epochs):
        started = time.perf_counter()
        loss = _train_epoch(state, data, recipe, seed * 10_007 + epoch)
        score = accuracy(model, images, data.validation.labels)
        rate = state.scheduler.get_last_lr()[0]
        state.log.append(Epoch(epoch, loss, score, rate, time.perf_counter() - started))
        if checkpoint is not None:
            _save(checkpoint, state, recipe, seed)
        on_epoch(state.log[-1])
    model.eval()
    return state.log


def steps_per_epoch(data: DataSet, recipe: Recipe) -> int:
    """Return the optimizer steps of one epoch; a ragged last batch is dropped."""
    return max(1, len(data.train) // recipe.batch_size)


def _start(model: nn.Module, recipe: Recipe, steps: int) -> TrainState:
    optimizer = make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.peak_lr,
        total_steps=steps * recipe.epochs,
        pct_start=recipe.rise,
        cycle_momentum=False,
    )
    return TrainState(model, optimizer, scheduler, [])


def _train_epoch(state: TrainState, data: DataSet, recipe: Recipe, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator)
    state.model.train()
    total = torch.zeros(())
    steps = steps_per_epoch(data, recipe)
    for step in range(steps):
        index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        images = data.normalize(augment(data.train.images[index], recipe, generator))
        total += _train_step(state, images, data.train.labels[index], recipe)
    return float(total / steps)


def _train_step(state: TrainState, images: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        loss = nn.functional.cross_entropy(state.model(images).float(), labels)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    state.scheduler.step()
    return loss.detach()


def _save(path: Path, state: TrainState, recipe: Recipe, seed: int) -> None:
    payload = {
        "recipe": asdict(recipe),
        "seed": seed,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "log": [asdict(entry) for entry in state.log],
    }
    with atomic_path(path) as temporary:
        torch.save(payload, temporary)


def _load(path: Path, state: TrainState, recipe: Recipe, seed: int) -> None:
    try:
        payload = torch.load(path, weights_only=True)
        same = payload["recipe"] == asdict(recipe) and payload["seed"] == seed
    except Exception:
        raise RunError(f"checkpoint {path} is damaged; delete it to train from the start.") from None
    if not same:
        raise RunError(f"checkpoint {path} is of another recipe or seed; give another --run name, or --fresh.")
    state.model.load_state_dict(payload["model"])
    state.optimizer.load_state_dict(payload["optimizer"])
    state.scheduler.load_state_dict(payload["scheduler"])
    state.log.extend(Epoch(**entry) for entry in payload["log"])
