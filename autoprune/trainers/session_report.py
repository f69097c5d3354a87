"""What a session reports of the training it pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from autoprune.core.choices import Choice
from autoprune.core.layers import LayerSpec
from autoprune.sparsity.metrics import SparsityReport, summarise, training_macs_saved
from autoprune.trainers.execution import LayerRun

if TYPE_CHECKING:
    from autoprune.trainers.ledger import Ledger
    from autoprune.trainers.method import Method


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: its name, first epoch and optimizer steps."""

    name: str
    first_epoch: int
    steps: int


@dataclass(frozen=True, slots=True)
class SessionReport:
    """What a training under a policy came to.

    Attributes:
        method: Name of the trainer.
        steps: Optimizer steps taken.
        finished: Whether the policy's final masks were reached; if not, the training was stopped too early.
        phases: In order.
        sparsity: Counts per layer and of the network, inference MACs saved included.
        training_macs_saved: Fraction of a dense training's MACs that the masks made unnecessary; None when the layers'
            feature-map sizes stayed unknown (no example given, and the model does not run on its first argument alone).
            Counted, not measured: what time it saved is for a clock to say.
        scoring_passes: Dense forward and backward passes that the method spent on scores beside the steps; the MACs
            saved have them subtracted.
        layers_run: What each layer was trained on once its mask was final, and why; empty where nobody measured.
    """

    method: str
    steps: int
    finished: bool
    phases: tuple[Phase, ...]
    sparsity: SparsityReport
    training_macs_saved: float | None
    scoring_passes: float = 0.0
    layers_run: tuple[LayerRun, ...] = ()


def make_report(
    method: Method,
    model: nn.Module,
    choices: Mapping[str, Choice],
    specs: Sequence[LayerSpec] | None,
    ledger: Ledger,
    steps: int,
) -> SessionReport:
    """Return the report of a training, counted on the weights as they are now.

    Args:
        method: That pruned.
        model: Without wrappers, in its original shapes.
        choices: Layer name → choice.
        specs: As traced; None where the model could not be.
        ledger: Counts of all steps.
        steps: Taken by the optimizer.
    """
    weights = {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    saved = None
    if specs is not None:
        saved = training_macs_saved(specs, ledger.density_steps(), steps, method.scoring_passes)
    return SessionReport(
        method=method.name,
        steps=steps,
        finished=method.finished(),
        phases=tuple(ledger.phases),
        sparsity=summarise(weights, choices, parameters, specs),
        training_macs_saved=saved,
        scoring_passes=method.scoring_passes,
    )
