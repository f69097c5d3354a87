"""Channel masks of layers that share channels, kept alike while a method decides them layer by layer.

A method masks the filters of each layer under a ``channels`` choice by its own score. Layers that an addition joins
must lose the same channels, so their masks vote: the units that most of them keep stay, as many as the widest of them
keeps, ties going to the larger weights that read the channel. What else belongs to a removed channel (biases,
BatchNorms, depthwise convolutions, the readers' input weights) is masked with it, so that the trained network can be
made smaller with equal outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.core.choices import Channels, Choice
from autoprune.sparsity.channel_graph import channel_groups
from autoprune.sparsity.channel_trial import without
from autoprune.sparsity.channels import ChannelGroups, best_units, channel_scores, parameter_masks
from autoprune.trainers.method import PrunedLayer


class GroupMasks:
    """Masks of the channel groups of one model.

    Args:
        model: Without wrappers.
        layers: Under a policy.
        choices: Layer → choice; without channels among them nothing is done.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PrunedLayer], choices: Mapping[str, Choice]) -> None:
        self._model = model
        self._layers = {layer.name: layer for layer in layers if isinstance(layer.choice, Channels)}
        self._choices = {name: choice for name, choice in choices.items() if isinstance(choice, Channels)}
        self._example: Tensor | None = None
        self._groups = ChannelGroups()
        self._shapes: list[torch.Size] = []

    @property
    def needed(self) -> bool:
        """Whether the policy has channel choices."""
        return bool(self._choices)

    def observe(self, example: Tensor) -> None:
        """Find the groups by one input of the model."""
        if self.needed:
            self._example = example.detach()
            self._find()

    def _follow(self) -> None:
        """Find the groups anew where the method took dead channels out of the model, or brought them back."""
        if self._example is not None and [p.shape for p in self._model.parameters()] != self._shapes:
            self._find()

    def _find(self) -> None:
        assert self._example is not None
        groups = channel_groups(self._model, self._example)
        # Layers whose group the policy does not prune as one lose filters by themselves, and nothing can be taken out:
        # ``compact`` and ``convert`` say so by name.
        apart = {
            leader: "the policy gives the layers of this group different choices"
            for leader, group in groups.coupling.groups.items()
            if len({self._choices.get(writer) for writer in group.writers}) > 1
        }
        self._groups = without(groups, apart)
        self._shapes = [parameter.shape for parameter in self._model.parameters()]

    def agree(self) -> None:
        """Give the layers of each group one mask, from those that the method has set."""
        self._follow()
        for leader, group in self._groups.coupling.groups.items():
            members = [self._layers[name] for name in group.writers if name in self._layers]
            if not any(layer.mask is not None for layer in members):
                continue
            votes = torch.stack([self._living(leader, layer) for layer in members])
            kept_U = self._elected(leader, votes)
            for layer, own_U in zip(members, votes, strict=True):
                if layer.mask is None or not torch.equal(own_U, kept_U):
                    self._set(layer, leader, kept_U)

    def _living(self, leader: str, layer: PrunedLayer) -> Tensor:
        """Return which units a layer's mask keeps, (U,) boolean on the CPU."""
        if layer.mask is None:
            return torch.ones(self._groups.coupling.groups[leader].units, dtype=torch.bool)
        alive_K = layer.mask.flatten(1).any(1)
        return self._groups.unit_sums(leader, (layer.name, "out"), alive_K) > 0

    def _elected(self, leader: str, votes: Tensor) -> Tensor:
        if bool((votes == votes[0]).all()):
            return votes[0]
        score_U = channel_scores(self._model, self._groups, leader)
        # Below one vote, so that the weights decide among equals alone.
        score_U = score_U / (score_U.max().clamp_min(1e-30) * 2.0)
        return best_units(votes.sum(0) + score_U, int(votes.sum(1).max()))

    def _set(self, layer: PrunedLayer, leader: str, kept_U: Tensor) -> None:
        alive_K = self._groups.staying((layer.name, "out"), {leader: kept_U})
        assert alive_K is not None
        shape = layer.parameter.shape
        mask = alive_K.to(layer.parameter.device).reshape(-1, *[1] * (len(shape) - 1))
        layer.set_mask(mask.expand(shape).contiguous())

    def factors(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return every parameter that a removed channel touches, with its 0/1 factor, the layers' own among them."""
        self._follow()
        kept = {}
        for leader, group in self._groups.coupling.groups.items():
            masked = [self._layers[name] for name in group.writers if name in self._layers]
            if masked and all(layer.mask is not None for layer in masked):
                kept[leader] = self._living(leader, masked[0])
        masks = parameter_masks(self._model, self._groups, kept) if kept else {}
        parameters = dict(self._model.named_parameters())
        return [(parameters[name], mask.to(parameters[name].dtype)) for name, mask in masks.items()]
