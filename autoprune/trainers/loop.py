"""The built-in training loop: one recipe, checkpoints every epoch, and the same result after a kill.

It prunes as any loop would: a session attached to its optimizer, nothing else. Under torchrun every process trains on
its share of each batch, so a recipe means the same for any number of them (BatchNorm's statistics are of a share).
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice
from autoprune.core.errors import RunError
from autoprune.core.policy import Policy
from autoprune.core.rundir import atomic_path, write_text
from autoprune.tasks.data import DataSet
from autoprune.tasks.metrics import accuracy
from autoprune.tasks.outputs import main_output
from autoprune.trainers.layers import choices_of
from autoprune.trainers.recipe import Recipe, augment, make_optimizer, mix, segment_factor
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.session import Session, SessionReport, attach
from autoprune.trainers.steps import StepChooser, StepSettings, StepTable
from autoprune.trainers.team import Team, watched


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of a training log; accuracy in 0..1 on validation data, sparsity of the policy's weights in 0..1."""

    epoch: int
    train_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float
    phase: str = "dense"
    sparsity: float = 0.0


@dataclass(frozen=True, slots=True)
class Pruning:
    """How a training prunes: towards which policy, by which method, with which of the method's settings.

    With ``steps`` layers run on the sparse kernels that these rows, or else a measurement, say are faster, once their
    masks are final; None trains on dense kernels throughout.
    """

    policy: Policy | Mapping[str, Choice]
    method: str = "clicktrain"
    settings: Mapping[str, object] = field(default_factory=dict)
    steps: StepTable | None = None

    def record(self) -> dict[str, object]:
        """Return what a checkpoint is compared by."""
        choices = {name: choice.text for name, choice in choices_of(self.policy).items()}
        return {"policy": choices, "method": self.method, "settings": dict(self.settings)}


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished training: an entry an epoch, and the session's report if it pruned."""

    log: list[Epoch]
    report: SessionReport | None


@dataclass(slots=True)
class TrainState:
    """Everything an epoch changes; ``runner`` is the model as it is called, data-parallel among several processes."""

    model: nn.Module
    runner: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    log: list[Epoch]
    session: Session | None = None


@dataclass(frozen=True, slots=True)
class Mixed:
    """Labels of a batch, and those mixed into them: ``share`` of the first, the rest of the second."""

    labels: Tensor
    partners: Tensor | None = None
    share: float = 1.0

    def to(self, device: torch.device) -> Mixed:
        """Return the labels on a device."""
        partners = None if self.partners is None else self.partners.to(device)
        return Mixed(self.labels.to(device), partners, self.share)

    def loss(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy of ``logits`` (N, classes)."""
        own = nn.functional.cross_entropy(logits, self.labels)
        if self.partners is None:
            return own
        return self.share * own + (1.0 - self.share) * nn.functional.cross_entropy(logits, self.partners)


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a checkpoint must agree with: recipe, seed and pruning."""

    recipe: Recipe
    seed: int
    pruning: Pruning | None


def train(
    model: nn.Module,
    data: DataSet,
    recipe: Recipe,
    *,
    seed: int,
    pruning: Pruning | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Train ``model`` in place.

    Args:
        model: Trained in channels-last memory format on the device it lies on.
        data: ``train`` and ``validation`` are used.
        recipe: How.
        seed: Decides order and augmentation of every epoch, so that a resumed run sees what an unbroken one sees.
        pruning: Towards which policy; None trains dense.
        checkpoint: Written after every epoch; an existing one is gone on from.
        on_epoch: Called after every epoch, those of an existing checkpoint included.
    Raises:
        RunError: The checkpoint is damaged or of another recipe, seed or policy.
        TrainerError: The loss became infinite or NaN, or the method's settings do not fit the epochs.
        PolicyError: The policy is for another model.
        PeerLost: Another process of this training has ended.
    """
    team = Team.current()
    with watched(team):
        return _train(model, data, _Identity(recipe, seed, pruning), team, checkpoint, on_epoch)


def _train(
    model: nn.Module,
    data: DataSet,
    identity: _Identity,
    team: Team,
    checkpoint: Path | None,
    on_epoch: Callable[[Epoch], None],
) -> Trained:
    recipe = identity.recipe
    model.to(memory_format=torch.channels_last)
    state = _start(model, data, identity, team)
    device = _device(model)
    if checkpoint is not None:
        # Only the leader's folder need hold it: other machines may have disks of their own.
        stored = checkpoint.read_bytes() if team.leads and checkpoint.exists() else None
        stored = team.bytes_from_lead(stored, device)
        if stored is not None:
            _load(checkpoint, stored, state, identity)
            for entry in state.log:
                on_epoch(entry)
    judge = _judge(data, device) if team.leads else None
    for epoch in range(len(state.log), recipe.epochs):
        started = time.perf_counter()
        phase = "dense" if state.session is None else state.session.phase
        loss = _train_epoch(state, data, identity, epoch)
        if not math.isfinite(loss):
            raise TrainerError(f"training diverged: the loss of epoch {epoch} is {loss}; lower the learning rate.")
        score = team.from_lead(0.0 if judge is None else judge(model), device)
        sparsity = 0.0 if state.session is None else state.session.sparsity
        rate = float(state.scheduler.get_last_lr()[0])
        state.log.append(Epoch(epoch, loss, score, rate, time.perf_counter() - started, phase, sparsity))
        if checkpoint is not None and team.leads:
            _save(checkpoint, state, identity)
        on_epoch(state.log[-1])
    model.eval()
    return Trained(state.log, None if state.session is None else state.session.finalize())


def _judge(data: DataSet, device: torch.device) -> Callable[[nn.Module], float]:
    images, labels = data.normalize(data.validation.images).to(device), data.validation.labels.to(device)
    return lambda model: accuracy(model, images, labels)


def steps_per_epoch(data: DataSet, recipe: Recipe) -> int:
    """Return the optimizer steps of one epoch; a ragged last batch is dropped."""
    return max(1, len(data.train) // recipe.batch_size)


def write_metrics(path: Path, log: list[Epoch]) -> None:
    """Write a log as CSV, a header and a line an epoch; the whole file is replaced at once."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in fields(Epoch))
    writer.writerows(astuple(entry) for entry in log)
    write_text(path, text.getvalue())


def _start(model: nn.Module, data: DataSet, identity: _Identity, team: Team) -> TrainState:
    recipe, pruning = identity.recipe, identity.pruning
    if recipe.batch_size % team.size:
        raise TrainerError(
            f"a batch of {recipe.batch_size} images cannot be shared evenly by {team.size} processes; start a number "
            "of processes that divides it."
        )
    runner = team.wrap(model)
    steps = steps_per_epoch(data, recipe)
    optimizer = make_optimizer(model, recipe)
    session = None
    if pruning is not None:
        session = attach(
            runner,
            optimizer,
            pruning.policy,
            steps_per_epoch=steps,
            epochs=recipe.epochs,
            method=pruning.method,
            settings=pruning.settings,
            example=data.normalize(data.validation.images[:1]),
        )
        if team.size > 1:
            session.compress_gradients()
        if pruning.steps is not None:
            settings = StepSettings(recipe.batch_size // team.size, recipe.precision == "bf16")
            session.run_sparse(StepChooser(settings, pruning.steps))
    restarts = [] if session is None else [(restart.epoch, restart.scale) for restart in session.method.restarts]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: segment_factor(recipe, restarts, step, steps)
    )
    return TrainState(model, runner, optimizer, scheduler, [], session)


def _train_epoch(state: TrainState, data: DataSet, identity: _Identity, epoch: int) -> float:
    recipe, team = identity.recipe, Team.current()
    seed = identity.seed * 10_007 + epoch
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator)
    if team.rank > 0:
        # The order is common, augmentation and dropout are each process's own.
        seed += 1_000_003 * team.rank
        generator.manual_seed(seed)
    device = _device(state.model)
    state.runner.train()
    total = torch.zeros((), device=device)
    steps = steps_per_epoch(data, recipe)
    with torch.random.fork_rng():
        # Dropout draws from the global generator; by epoch, so that a resumed run draws the same.
        torch.manual_seed(seed)
        for step in range(steps):
            index = team.share(order[step * recipe.batch_size : (step + 1) * recipe.batch_size])
            images = data.normalize(augment(data.train.images[index], recipe, generator))
            mixed = Mixed(data.train.labels[index])
            if recipe.mixup > 0 and len(state.log) >= recipe.mixup_start:
                images, partner, share = mix(images, recipe.mixup, generator)
                mixed = Mixed(mixed.labels, mixed.labels[partner], share)
            total += _train_step(state, images.to(device), mixed.to(device), recipe)
    return float(team.mean(total / steps))


def _train_step(state: TrainState, images: Tensor, target: Mixed, recipe: Recipe) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        loss = target.loss(main_output(state.runner(images)).float())
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    state.optimizer.step()
    state.scheduler.step()
    return loss.detach()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _save(path: Path, state: TrainState, identity: _Identity) -> None:
    payload = {
        "recipe": identity.recipe.record(),
        "seed": identity.seed,
        "pruning": None if identity.pruning is None else identity.pruning.record(),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "session": None if state.session is None else state.session.state_dict(),
        "log": [asdict(entry) for entry in state.log],
    }
    try:
        with atomic_path(path) as temporary:
            torch.save(payload, temporary)
    except (OSError, RuntimeError) as error:
        raise RunError(f"cannot write {path} ({error}); choose another folder or free the disk.") from None


def _load(path: Path, stored: bytes, state: TrainState, identity: _Identity) -> None:
    try:
        payload = torch.load(io.BytesIO(stored), weights_only=True, map_location="cpu")
        log = [Epoch(**entry) for entry in payload["log"]]
        found = (payload["recipe"], payload["seed"], payload.get("pruning"))
    except Exception:
        raise RunError(f"checkpoint {path} is damaged; delete it to train from the start.") from None
    pruning = None if identity.pruning is None else identity.pruning.record()
    if found != (identity.recipe.record(), identity.seed, pruning):
        raise RunError(
            f"checkpoint {path} is of another recipe, seed or policy; give another --run name, or --fresh."
        )
    # The session first: a method that takes channels out gives the model the shapes of its weights.
    if state.session is not None:
        state.session.load_state_dict(payload["session"])
    state.model.load_state_dict(payload["model"])
    state.optimizer.load_state_dict(payload["optimizer"])
    state.scheduler.load_state_dict(payload["scheduler"])
    state.log.extend(log)
