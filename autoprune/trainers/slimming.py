"""Network slimming: an L1 penalty on BatchNorm scales makes channels' importance visible, then the lowest go.

Source: Liu et al., "Learning efficient convolutional networks through network slimming" (arXiv 1708.06519).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autoprune.core.choices import Channels
from autoprune.sparsity.ranking import top_mask
from autoprune.trainers.magnitude import prune_epochs
from autoprune.trainers.method import (
    METHODS,
    Clock,
    PrunedLayer,
    Restart,
    State,
    Subject,
    check_setting,
    read_settings,
)
from autoprune.trainers.norms import Norm, attach_companions, need_example, norms_behind
from autoprune.trainers.penalty import Decay
from autoprune.trainers.projection import Projection, Rule
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.scheduled import Parts, Scheduled, Staircase


@dataclass(frozen=True, slots=True)
class SlimmingSettings:
    """Parameters of network slimming.

    Attributes:
        prune_epoch: Epoch at which channels go; None: after 60 % of the epochs.
        l1: Strength of the penalty on the scales γ.
        scope: ``layer`` keeps the policy's width of each layer; ``global`` is the source's one threshold over all
            layers: the total is the policy's, the split over the layers is learnt.
        finetune_lr: Height of the learning-rate schedule that begins anew at the pruning; 0 leaves it alone.
    """

    prune_epoch: int | None = None
    l1: float = 1e-4
    scope: Literal["layer", "global"] = "layer"
    finetune_lr: float = 0.1

    def __post_init__(self) -> None:
        check_setting("slimming", "l1", self.l1, self.l1 >= 0, "0 or more")
        check_setting("slimming", "scope", self.scope, self.scope in ("layer", "global"), "'layer' or 'global'")
        check_setting("slimming", "finetune_lr", self.finetune_lr, self.finetune_lr >= 0, "0 or more")


@METHODS.register("slimming")
class Slimming(Scheduled):
    """Network slimming as a method of a session.

    Its nature is channels, so it executes ``channels`` choices of layers with a BatchNorm behind them. A removed
    channel's bias, scale and shift are zero with its filter, so it is dead and can be taken out losslessly.
    """

    name = "slimming"
    settings_class = SlimmingSettings
    kinds = (Channels,)

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        self.gammas: dict[str, nn.Parameter] = {}
        self.widths: dict[str, int] = {}
        self.subject: Subject | None = None
        super().__init__(layers, clock, settings)

    def make_parts(self, settings: object | None) -> Parts:
        self.settings = read_settings(SlimmingSettings, self.name, settings)
        self.levels = prune_epochs(self.name, self.clock.epochs, self.settings.prune_epoch, 1, None)
        return Parts(Staircase(self.levels, self.clock), Projection(Rule()))

    def bind(self, subject: Subject) -> None:
        self.subject = subject

    def observe(self, example: Tensor) -> None:
        assert self.subject is not None
        norms: dict[str, Norm] = norms_behind(self.subject.model, example)
        absent = next((layer.name for layer in self.layers if layer.name not in norms), None)
        if absent is not None:
            raise TrainerError(
                f"trainer 'slimming': layer '{absent}' has no BatchNorm behind it to rank its channels by; leave it "
                "dense in the policy, or use --trainer magnitude."
            )
        attach_companions(self.layers, self.subject.model, norms)
        self.gammas = {layer.name: norms[layer.name].weight for layer in self.layers}
        self.parts.regulariser = Decay(list(self.gammas.values()), self.settings.l1)

    @property
    def restarts(self) -> tuple[Restart, ...]:
        if self.settings.finetune_lr == 0 or self.levels[0] == 0:
            return ()
        return (Restart(self.levels[0], self.settings.finetune_lr),)

    def regularised(self, step: int) -> bool:
        return self.progress < 1.0

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        if self.layers and not self.gammas:
            raise need_example(self.name)
        super().before_step(step, scale)

    def mask(self, layer: PrunedLayer) -> Tensor:
        if not self.widths:
            self.widths = self._widths()
        kept_K = top_mask(self.gammas[layer.name].detach().abs().float()[None], self.widths[layer.name])[0]
        shape = layer.parameter.shape
        return kept_K.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()

    def _widths(self) -> dict[str, int]:
        widths: dict[str, int] = {}
        for layer in self.layers:
            assert isinstance(layer.choice, Channels)
            widths[layer.name] = layer.choice.width(int(layer.parameter.shape[0]))
        if self.settings.scope == "layer":
            return widths
        total = sum(widths.values())
        scores = {name: gamma.detach().abs().float().cpu() for name, gamma in self.gammas.items()}
        for score in scores.values():
            score[score.argmax()] = torch.inf  # a layer without any channel would cut the network
        kept = top_mask(torch.cat(list(scores.values()))[None], total)[0]
        parts = torch.split(kept, [len(score) for score in scores.values()])
        return {name: int(part.sum()) for name, part in zip(scores, parts, strict=True)}

    def state_dict(self) -> State:
        return {**super().state_dict(), "widths": dict(self.widths)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.widths = {name: int(width) for name, width in state["widths"].items()}
