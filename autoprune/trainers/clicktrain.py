"""ClickTrain: pruning during training (METHODS §2), for every kind of choice.

1. Dense warm-up until epoch e_c. 2.–3. Over the first K steps of e_c the importance Σ (G⊙W)² is summed from the
gradients that training computes anyway; pattern pool, patterns and the units to keep follow from it, once.
4. Until e_h the modified group lasso pulls what will be removed towards zero, and nothing is forced. 5. From the first
step of e_h on, the removed weights are zero after every step.

Lasso groups by kind: pattern and combined have two terms as in the source, each kernel's weights outside its pattern
(or window) and each removed kernel. ck has the second only, window the first only. block groups the filters of a
removed block at its one position. channels groups a removed filter. fine, tile and nm group a kernel's removed weights;
in 1×1 and linear layers every weight is its own group, as the source has it for 1×1 layers. The groups of all but
pattern and ck are our choice.

Source: ClickTrain, arXiv 2011.10170, ICS'21.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.core.choices import Block, Channels, Combined, Pattern
from autoprune.sparsity.masks import Balance, assign_patterns, choose_pool, project, spread, target_of
from autoprune.sparsity.patterns import PoolKind
from autoprune.sparsity.ranking import top_mask
from autoprune.trainers.method import (
    METHODS,
    Clock,
    Method,
    PrunedLayer,
    State,
    Subject,
    check_setting,
    read_settings,
)
from autoprune.trainers.penalty import Grouping, GroupLasso, Term
from autoprune.trainers.projection import Rule
from autoprune.trainers.schedule import TrainerError, clicktrain_phase, make_stages
from autoprune.trainers.score import Saliency


@dataclass(frozen=True, slots=True)
class ClickTrainSettings:
    """Parameters of ClickTrain.

    Attributes:
        warmup_epochs: e_c; None: 20 % of the epochs.
        hard_epoch: e_h; None: 50 % of the epochs.
        lasso: λ; the source uses 1.5e-4 to 8e-4.
        balance: Rank units within the ``layer``, or within each ``filter``.
        pool: Pattern pool: ``patdnn`` (what a search scores policies with), or the source's ``generic`` or ``dynamic``.
        batches: K, training batches whose importance is summed; the source's artifact takes 1.
    """

    warmup_epochs: int | None = None
    hard_epoch: int | None = None
    lasso: float = 2.5e-4
    balance: Balance = "layer"
    pool: PoolKind = "patdnn"
    batches: int | None = None

    def __post_init__(self) -> None:
        name = "clicktrain"
        check_setting(name, "lasso", self.lasso, self.lasso >= 0, "0 or more")
        Rule(balance=self.balance, pool=self.pool).check(name)
        check_setting(name, "batches", self.batches, self.batches is None or self.batches >= 1, "1 or more")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one layer will lose.

    Attributes:
        mask: Weights that stay, boolean, shape of the weight.
        outside: Weights outside their kernel's pattern or window; None for kinds without one.
    """

    mask: Tensor
    outside: Tensor | None = None


def plan_layer(importance: Tensor, layer: PrunedLayer, pool: PoolKind, balance: Balance) -> Plan:
    """Return what a layer will lose, given its importance.

    Args:
        importance: Σ (G⊙W)² over batches, float32, shape of the weight.
        layer: Its choice and weight shape are used.
        pool: Pattern pool kind.
        balance: As in ``make_mask``.
    """
    choice = layer.choice
    target = target_of(layer.parameter, choice, balance)
    if isinstance(choice, Pattern):
        patterns_BDP = assign_patterns(importance, choice, choose_pool(importance, choice, pool))
        shape_KC = (importance.shape[0], importance.shape[1])
        inside = spread(patterns_BDP, choice.share, shape_KC).reshape(importance.shape)
        return Plan(project(importance, choice, target, patterns=patterns_BDP, balance=balance), ~inside)
    mask = project(importance, choice, target, balance=balance)
    if isinstance(choice, Combined):
        return Plan(mask, ~top_mask(importance.flatten(2), target.entries).reshape(importance.shape))
    return Plan(mask)


def penalty_terms(layer: PrunedLayer, plan: Plan) -> list[Term]:
    """Return the lasso terms of one layer; see the module for the groups of each kind."""
    if plan.outside is None:
        filters = layer.choice.filters if isinstance(layer.choice, Block) else 1
        by: Grouping = "filter" if isinstance(layer.choice, Channels) else "kernel"
        return [Term(layer.parameter, ~plan.mask, filters, by)]
    dead_kernels = ~plan.mask.flatten(2).any(-1)
    return [
        Term(layer.parameter, plan.outside),
        Term(layer.parameter, dead_kernels[..., None, None].expand_as(plan.mask)),
    ]


@METHODS.register("clicktrain")
class ClickTrain(Method):
    """ClickTrain as a method of a session; see the module."""

    name = "clicktrain"
    settings_class = ClickTrainSettings

    def __init__(self, layers: list[PrunedLayer], clock: Clock, settings: object | None) -> None:
        super().__init__(layers, clock, settings)
        self.settings = read_settings(ClickTrainSettings, self.name, settings)
        self.stages = make_stages(clock.epochs, self.settings.warmup_epochs, self.settings.hard_epoch)
        self.batches = self.settings.batches or min(16, clock.steps_per_epoch)
        steps_left = (clock.epochs - self.stages.warmup) * clock.steps_per_epoch
        if self.batches > steps_left:
            raise TrainerError(
                f"clicktrain setting batches={self.batches}: only {steps_left} steps follow the warm-up; lower batches."
            )
        self.collected = 0
        self.importance = Saliency(power=2)
        self.plans: dict[str, Plan] = {}
        self.penalty: GroupLasso | None = None
        self.pruned = False
        self.subject: Subject | None = None

    def bind(self, subject: Subject) -> None:
        self.subject = subject

    def phase(self, epoch: int) -> str:
        return clicktrain_phase(epoch, self.stages)

    def finished(self) -> bool:
        return self.pruned

    @torch.no_grad()
    def before_step(self, step: int, scale: float | Tensor) -> None:
        if self.pruned or step < self.stages.warmup * self.clock.steps_per_epoch:
            return
        if not self.plans:
            self._collect(scale)
        if self.penalty is not None:
            self.penalty.add_gradients(scale)

    def after_step(self, step: int) -> bool:
        if self.pruned or not self.plans or step < self.stages.hard * self.clock.steps_per_epoch:
            return False
        for layer in self.layers:
            layer.set_mask(self.plans[layer.name].mask)
        self.pruned = True
        self.plans, self.penalty = {}, None
        return True

    def _collect(self, scale: float | Tensor) -> None:
        self.importance.collect(self.layers, scale)
        self.collected += 1
        if self.collected == self.batches:
            for layer in self.layers:
                importance = self.importance.of(layer)
                self.plans[layer.name] = plan_layer(importance, layer, self.settings.pool, self.settings.balance)
            self.importance = Saliency(power=2)
            if self.subject is not None:
                plans = self.plans.values()
                self.subject.agree([plan.mask for plan in plans])
                self.subject.agree([plan.outside for plan in plans if plan.outside is not None])
            self._make_penalty()

    def _make_penalty(self) -> None:
        terms = [term for layer in self.layers for term in penalty_terms(layer, self.plans[layer.name])]
        if terms and self.settings.lasso > 0:
            self.penalty = GroupLasso(terms, self.settings.lasso)

    def state_dict(self) -> State:
        return {
            "collected": self.collected,
            "pruned": self.pruned,
            "importance": self.importance.state_dict(),
            "masks": {name: plan.mask for name, plan in self.plans.items()},
            "outside": {name: plan.outside for name, plan in self.plans.items() if plan.outside is not None},
        }

    def load_state_dict(self, state: State) -> None:
        device = {layer.name: layer.parameter.device for layer in self.layers}
        self.collected, self.pruned = int(state["collected"]), bool(state["pruned"])
        self.importance.load_state_dict(state["importance"], self.layers)
        self.plans, self.penalty = {}, None
        for name, mask in state["masks"].items():
            outside = state["outside"].get(name)
            self.plans[name] = Plan(mask.to(device[name]), None if outside is None else outside.to(device[name]))
        if self.plans:
            self._make_penalty()
