"""What a session reports of the training it pruned."""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.sparsity.metrics import SparsityReport


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
    """

    method: str
    steps: int
    finished: bool
    phases: tuple[Phase, ...]
    sparsity: SparsityReport
    training_macs_saved: float | None
    scoring_passes: float = 0.0
