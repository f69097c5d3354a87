"""PruneTrain: whole channels are pulled to zero from the first step on, and taken out of the model while it trains.

    λ Σ_l ( Σ_out ‖W_l[k]‖ + Σ_in ‖W_l[:, c]‖ ),   λ = r·L / (R·(1 − r))

with L the loss and R the sum of norms at the first step. Every few epochs a filter whose weights have all fallen below
a threshold is dead; dead channels that no residual add keeps alive leave the model physically, so steps get cheaper.

Source: Lym et al., "PruneTrain: fast neural network training by dynamic sparse model reconfiguration" (arXiv
1901.09290).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.core.choices import Channels
from autoprune.sparsity.ranking import top_mask
from autoprune.trainers.method import METHODS, Clock, Method, PrunedLayer, State, Subject, check_setting, read_settings
from autoprune.trainers.norms import attach_companions, need_example, norms_behind
from autoprune.trainers.penalty import GroupLasso, Term
from autoprune.trainers.reconfigure import Elements, compose, put, restore, shrink, surviving, take
from autoprune.trainers.schedule import TrainerError


@dataclass(frozen=True, slots=True)
class PruneTrainSettings:
    """Parameters of PruneTrain.

    Attributes:
        ratio: r, the penalty's share of the loss at the start.
        loss: L; None: ln of the number of outputs, the cross-entropy of a network that knows nothing yet.
        threshold: Largest |w| of a dead filter.
        interval: Epochs between two reconfigurations.
        hard_epoch: Epoch at which every layer is brought to its policy's width; None: after 60 % of the epochs.
        reconfigure: Whether dead channels leave the model physically.
    """

    ratio: float = 0.2
    loss: float | None = None
    threshold: float = 1e-4
    interval: int = 10
    hard_epoch: int | None = None
    reconfigure: bool = True

    def __post_init__(self) -> None:
        name = "prunetrain"
        check_setting(name, "ratio", self.ratio, 0 <= self.ratio < 1, "0 or more and below 1")
        check_setting(name, "loss", self.loss, self.loss is None or self.loss > 0, "above 0")
        check_setting(name, "threshold", self.threshold, self.threshold >= 0, "0 or more")
        check_setting(name, "interval", self.interval, self.interval >= 1, "1 or more")


def lasso_strength(ratio: float, loss: float, norms: float) -> float:
    """Return λ = r·L / (R·(1 − r)), by which the penalty is the share ``ratio`` of loss and penalty together."""
    return ratio * loss / (norms * (1.0 - ratio))


@METHODS.register("prunetrain")
class PruneTrain(Method):
    """PruneTrain as a method of a session.

    Its nature is channels, and how many go is what the lasso leaves: here it acts on the layers with a ``channels``
    choice, never takes more than the policy does, and at ``hard_epoch`` the weakest filters follow until each layer
    has its policy's width. ``finalize`` gives the model its shapes back, dead channels as zeros, so that weights fit
    the policy's model. Parameters are replaced at a reconfiguration: ask the model or the optimizer for them. To
    resume, load the session's state before the model's.
    """

    name = "prunetrain"
    settings_class = PruneTrainSettings
    kinds = (Channels,)

    def __init__(self, layers: Sequence[PrunedLayer], clock: Clock, settings: object | None) -> None:
        super().__init__(layers, clock, settings)
        self.settings = read_settings(PruneTrainSettings, self.name, settings)
        last = clock.epochs - 1
        self.hard = min(int(0.6 * clock.epochs), last) if self.settings.hard_epoch is None else self.settings.hard_epoch
        if not 0 <= self.hard <= last:
            raise TrainerError(
                f"prunetrain setting hard_epoch={self.hard}: must lie between 0 and {last}, the last of "
                f"{clock.epochs} epochs."
            )
        self.subject: Subject | None = None
        self.example: Tensor | None = None
        self.elements: Elements | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.widths = {layer.name: _width(layer) for layer in layers}
        self.outputs = 0
        self.strength = 0.0
        self.lasso: GroupLasso | None = None
        self.pruned = False

    def bind(self, subject: Subject) -> None:
        if subject.wrapped and self.settings.reconfigure:
            raise TrainerError(
                "trainer 'prunetrain' changes shapes, which a data-parallel wrapper does not follow; set "
                "reconfigure=false or train on one device."
            )
        self.subject = subject
        self.shapes = {name: tuple(value.shape) for name, value in subject.model.state_dict().items()}

    def observe(self, example: Tensor) -> None:
        assert self.subject is not None
        model = self.subject.model
        self.example = example.detach().clone()
        attach_companions(self.layers, model, norms_behind(model, example))
        was_training = model.training
        with torch.no_grad():
            self.outputs = int(model.eval()(example.to(next(model.parameters()).device)).shape[-1])
        model.train(was_training)

    def phase(self, epoch: int) -> str:
        return "lasso" if epoch < self.hard else "pruned"

    def finished(self) -> bool:
        return self.pruned

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        if self.pruned or not self.layers:
            return
        if self.example is None:
            raise need_example(self.name)
        if self.lasso is None:
            self._make_lasso()
        assert self.lasso is not None
        self.lasso.add_gradients(scale)

    def _make_lasso(self) -> None:
        terms = []
        for layer in self.layers:
            everything = torch.ones_like(layer.parameter, dtype=torch.bool)
            terms += [Term(layer.parameter, everything, by="filter"), Term(layer.parameter, everything, by="channel")]
        if self.strength == 0.0:
            loss = math.log(max(2, self.outputs)) if self.settings.loss is None else self.settings.loss
            norms = float(GroupLasso(terms, 1.0).value())
            self.strength = lasso_strength(self.settings.ratio, loss, norms) if norms > 0 else 0.0
        self.lasso = GroupLasso(terms, self.strength)

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        epoch, offset = divmod(step, self.clock.steps_per_epoch)
        if self.pruned or offset or (epoch < self.hard and (epoch == 0 or epoch % self.settings.interval)):
            return False
        self.pruned = epoch >= self.hard
        changed = False
        for layer in self.layers:
            changed = self._remove(layer) or changed
        if changed and self.settings.reconfigure:
            self._reconfigure()
        return changed

    def _remove(self, layer: PrunedLayer) -> bool:
        """Mask the filters that are dead, down to the policy's width; at the hard epoch the weakest as well."""
        weight_KD = layer.parameter.detach().float().flatten(1)
        alive_K = weight_KD.abs().amax(1) >= self.settings.threshold
        wanted = self.widths[layer.name]
        if self.pruned or int(alive_K.sum()) < wanted:
            alive_K = top_mask(weight_KD.norm(dim=1)[None], min(wanted, len(weight_KD)))[0]
        if layer.mask is not None:
            alive_K &= layer.mask.flatten(1).any(1)
        before = len(weight_KD) if layer.mask is None else int(layer.mask.flatten(1).any(1).sum())
        shape = layer.parameter.shape
        layer.set_mask(alive_K.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous())
        return int(alive_K.sum()) < before

    def _reconfigure(self) -> None:
        assert self.subject is not None
        assert self.example is not None
        model = self.subject.model
        # Dead filters first become zeros: what leaves must be nothing.
        for layer in self.layers:
            for parameter, factor in layer.factors():
                parameter.mul_(factor)
        dead = {layer.name: ~layer.mask.flatten(1).any(1).cpu() for layer in self.layers if layer.mask is not None}
        self._shrink(surviving(model, self.example, dead))

    def _shrink(self, elements: Elements) -> None:
        assert self.subject is not None
        model = self.subject.model
        masks = {layer.name: layer.mask for layer in self.layers}
        shrink(model, self.subject.optimizer, elements)
        self.elements = compose(self.elements, elements)
        for layer in self.layers:
            module = model.get_submodule(layer.name)
            assert isinstance(module.weight, nn.Parameter)
            layer.parameter = module.weight
            mask = masks[layer.name]
            if mask is not None:
                layer.set_mask(take(mask, elements[f"{layer.name}.weight"]))
        if self.example is not None:
            attach_companions(self.layers, model, norms_behind(model, self.example))
        self.lasso = None

    def closing(self) -> None:
        if self.elements is None or self.subject is None:
            return
        elements, self.elements = self.elements, None
        masks = {layer.name: layer.mask for layer in self.layers}
        restore(self.subject.model, self.subject.optimizer, elements, self.shapes)
        for layer in self.layers:
            module = self.subject.model.get_submodule(layer.name)
            assert isinstance(module.weight, nn.Parameter)
            layer.parameter = module.weight
            mask, key = masks[layer.name], f"{layer.name}.weight"
            if mask is not None:
                layer.set_mask(put(mask, elements[key], self.shapes[key]))
        layer_norms = norms_behind(self.subject.model, self.example) if self.example is not None else {}
        attach_companions(self.layers, self.subject.model, layer_norms)

    def state_dict(self) -> State:
        return {
            "pruned": self.pruned,
            "strength": self.strength,
            "elements": None if self.elements is None else dict(self.elements),
        }

    def load_state_dict(self, state: State) -> None:
        self.pruned, self.strength = bool(state["pruned"]), float(state["strength"])
        self.lasso = None
        if state["elements"] is not None:
            self._shrink(state["elements"])


def _width(layer: PrunedLayer) -> int:
    assert isinstance(layer.choice, Channels)
    return layer.choice.width(int(layer.parameter.shape[0]))
