"""Channels of a model as positions of its tensors: scored, masked, and taken out.

A mask of channels covers everything that belongs to a removed unit: filters and bias of the layers that write it, scale
and shift of the BatchNorms it passes, and the input weights of the layers that read it. So the masked network computes
what the smaller one does, whatever an activation makes of zero.

Shapes: U units of a group, P positions of one side of a module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice
from autoprune.core.coupling import Coupling
from autoprune.core.errors import ChoiceError, ModelError

Place: TypeAlias = tuple[str, Literal["in", "out"]]
"""Module name and side."""
Kept: TypeAlias = Mapping[str, Tensor]
"""Leader → which units stay, (U,) boolean; groups not named stay whole."""
Criterion = Literal["input", "filter", "both", "norm"]
CRITERIA: tuple[Criterion, ...] = ("input", "filter", "both", "norm")

Norm = nn.BatchNorm1d | nn.BatchNorm2d
Layer = nn.Conv2d | nn.Linear
# Outputs of the masked and the smaller network differ by the order of summation alone.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Slot:
    """Which unit of which group owns each position of one side of a module; -1 where none does.

    Attributes:
        group_P: Index into ``ChannelGroups.leaders``.
        unit_P: Unit within the group.
    """

    group_P: Tensor
    unit_P: Tensor


@dataclass(frozen=True)
class ChannelGroups:
    """The channel groups of a model.

    Attributes:
        coupling: The same by numbers alone.
        leaders: Of the groups, in the coupling's order.
        slots: Where each module's positions belong.
    """

    coupling: Coupling = field(default_factory=Coupling)
    leaders: tuple[str, ...] = ()
    slots: Mapping[Place, Slot] = field(default_factory=dict)

    def staying(self, place: Place, kept: Kept) -> Tensor | None:
        """Return which positions of one side of a module stay, (P,) boolean; None where no pruned group is."""
        slot = self.slots.get(place)
        pruned = [i for i, leader in enumerate(self.leaders) if leader in kept]
        if slot is None or not any(bool((slot.group_P == index).any()) for index in pruned):
            return None
        stay_P = torch.ones(len(slot.group_P), dtype=torch.bool)
        for index in pruned:
            own_P = slot.group_P == index
            stay_P[own_P] = kept[self.leaders[index]].cpu()[slot.unit_P[own_P]]
        return stay_P

    def readers(self, leader: str) -> tuple[str, ...]:
        """Return the layers with input weights of their own for a group's channels."""
        return self._with_side(leader, "in")

    def writers(self, leader: str) -> tuple[str, ...]:
        """Return every module with an output position in a group: layers, grouped convolutions and BatchNorms."""
        return self._with_side(leader, "out")

    def _with_side(self, leader: str, side: str) -> tuple[str, ...]:
        index = self.leaders.index(leader)
        return tuple(
            name for (name, own), slot in self.slots.items() if own == side and bool((slot.group_P == index).any())
        )

    def unit_sums(self, leader: str, place: Place, value_P: Tensor) -> Tensor:
        """Return the sums of one value per position over each unit of a group, (U,) float32."""
        slot, index = self.slots[place], self.leaders.index(leader)
        own_P = slot.group_P == index
        sums_U = torch.zeros(self.coupling.groups[leader].units)
        return sums_U.index_add_(0, slot.unit_P[own_P], value_P.detach().float().cpu()[own_P])


def input_sums(module: nn.Module) -> Tensor:
    """Return Σ|w| over the weights that read each input position of a layer, (P,)."""
    return _layer(module).weight.detach().abs().transpose(0, 1).flatten(1).sum(1)


def filter_sums(module: nn.Module) -> Tensor:
    """Return Σ|w| over each filter of a layer, (P,)."""
    return _layer(module).weight.detach().abs().flatten(1).sum(1)


def channel_scores(model: nn.Module, groups: ChannelGroups, leader: str, criterion: Criterion = "input") -> Tensor:
    """Return how much each unit of a group is worth, (U,) float32, by the weights alone.

    Every layer counts equally: its sums are divided by their mean first.

    Args:
        model: Dense, or masked: removed units score 0.
        groups: Of the model.
        leader: Of the group.
        criterion: ``input``: L1 over the weights that read the channel, which at fixed widths beats the channel's own
            filter by 3 to 7 points of accuracy (ResNet-20, untuned); ``filter``: L1 of the filters that write it (Li et
            al., arXiv 1608.08710); ``both``: their sum; ``norm``: |γ| of the BatchNorms it passes (Liu et al., arXiv
            1708.06519), filters where there is none.
    Raises:
        ChoiceError: No such criterion.
    """
    if criterion not in CRITERIA:
        raise ChoiceError(f"criterion '{criterion}': no such one; known: {', '.join(CRITERIA)}.")
    writers = groups.writers(leader)
    parts: list[tuple[Place, Tensor]] = []
    if criterion in ("input", "both"):
        parts += [((name, "in"), input_sums(model.get_submodule(name))) for name in groups.readers(leader)]
    norms = [name for name in writers if isinstance(model.get_submodule(name), Norm)]
    if criterion == "norm":
        parts += [((name, "out"), _vector(model.get_submodule(name)).abs()) for name in norms]
    if criterion in ("filter", "both") or not parts:
        layers = [name for name in writers if isinstance(model.get_submodule(name), Layer)]
        parts += [((name, "out"), filter_sums(model.get_submodule(name))) for name in layers]
    score_U = torch.zeros(groups.coupling.groups[leader].units)
    for place, value_P in parts:
        sums_U = groups.unit_sums(leader, place, value_P)
        score_U += sums_U / sums_U.mean().clamp_min(1e-30)
    return score_U


def best_units(score_U: Tensor, count: int) -> Tensor:
    """Return the ``count`` units of the largest scores, (U,) boolean; of equal ones the earlier stays."""
    kept_U = torch.zeros(len(score_U), dtype=torch.bool)
    kept_U[score_U.argsort(descending=True, stable=True)[:count].cpu()] = True
    return kept_U


def choose_units(
    model: nn.Module, groups: ChannelGroups, choices: Mapping[str, Choice], criterion: Criterion = "input"
) -> dict[str, Tensor]:
    """Return leader → the units that stay under a policy, ranked by ``criterion``.

    Raises:
        PolicyError: The policy does not fit the groups.
    """
    kept = groups.coupling.kept(choices)
    return {leader: best_units(channel_scores(model, groups, leader, criterion), n) for leader, n in kept.items()}


def parameter_masks(model: nn.Module, groups: ChannelGroups, kept: Kept) -> dict[str, Tensor]:
    """Return parameter name → which of its elements stay, boolean in its shape, of every parameter of a pruned group.

    Args:
        model: In the shapes that the groups were found in.
        groups: Of the model.
        kept: Units that stay.
    """
    masks: dict[str, Tensor] = {}

    def add(name: str, leaf: str, stay_P: Tensor, dim: int) -> None:
        parameter = getattr(model.get_submodule(name), leaf, None)
        if isinstance(parameter, nn.Parameter):
            shape = [1] * parameter.dim()
            shape[dim] = -1
            key = f"{name}.{leaf}"
            known = masks.get(key, torch.ones((), dtype=torch.bool, device=parameter.device))
            masks[key] = known & stay_P.to(parameter.device).reshape(shape).expand(parameter.shape)

    for name, side in groups.slots:
        stay_P = groups.staying((name, side), kept)
        if stay_P is None:
            continue
        if side == "in":
            add(name, "weight", stay_P, 1)
        else:
            add(name, "weight", stay_P, 0)
            add(name, "bias", stay_P, 0)
    return masks


@torch.no_grad()
def mask_channels(model: nn.Module, groups: ChannelGroups, kept: Kept) -> None:
    """Set everything that belongs to removed units to zero, in place."""
    for name, mask in parameter_masks(model, groups, kept).items():
        model.get_parameter(name).mul_(mask)


def living_units(model: nn.Module, groups: ChannelGroups, leader: str) -> Tensor:
    """Return which units of a group have a filter and a reader that are not all zero, (U,) boolean."""
    written_U = torch.zeros(groups.coupling.groups[leader].units)
    read_U = torch.zeros_like(written_U)
    for name in groups.writers(leader):
        module = model.get_submodule(name)
        if isinstance(module, Layer):
            written_U += groups.unit_sums(leader, (name, "out"), (filter_sums(module) > 0).float())
    for name in groups.readers(leader):
        read_U += groups.unit_sums(leader, (name, "in"), (input_sums(model.get_submodule(name)) > 0).float())
    return (written_U > 0) & (read_U > 0)


def kept_units(model: nn.Module, groups: ChannelGroups, choices: Mapping[str, Choice]) -> dict[str, Tensor]:
    """Return leader → the units that stay, read off the zeros of a masked model.

    Raises:
        PolicyError: The policy does not fit the groups.
        ModelError: More units are alive than the policy keeps.
    """
    found = {}
    for leader, count in groups.coupling.kept(choices).items():
        alive_U = living_units(model, groups, leader)
        if int(alive_U.sum()) > count:
            raise ModelError(
                f"layer '{leader}' has {int(alive_U.sum())} of its {len(alive_U)} channel units, its choice "
                f"{choices[leader].text} keeps {count}; mask or train the model by the policy first."
            )
        found[leader] = best_units(alive_U.float(), count)
    return found


@torch.no_grad()
def take_out(model: nn.Module, groups: ChannelGroups, kept: Kept) -> nn.Module:
    """Return a copy of the model without the units that do not stay.

    Branches that the pass by which the groups were found did not run (heads for training alone) keep their shapes.
    """
    smaller = copy.deepcopy(model)
    modules = dict(smaller.named_modules())
    for name, side in groups.slots:
        stay_P, module = groups.staying((name, side), kept), modules[name]
        if stay_P is None:
            continue
        for leaf, dim in _leaves(module, side):
            value = getattr(module, leaf, None)
            if isinstance(value, Tensor):
                index = stay_P.nonzero().flatten().to(value.device)
                part = value.detach().index_select(dim, index)
                own = nn.Parameter(part, value.requires_grad) if isinstance(value, nn.Parameter) else part
                setattr(module, leaf, own)
        set_sizes(module)
    return smaller


def check_equal(masked: nn.Module, smaller: nn.Module, example: object) -> None:
    """Refuse a smaller network whose outputs are not the masked one's.

    Raises:
        ModelError: They differ by more than 1e-5 of their scale; a channel that was to leave is not zero everywhere.
    """
    want, got = outputs(masked, example), outputs(smaller, example)
    error = difference(want, got)
    if not error <= _TOLERANCE:
        raise ModelError(
            f"the network without its removed channels differs from the masked one by {error:.1e} of its outputs' "
            "scale: biases or BatchNorm shifts of removed channels are not zero; mask or train it by the policy first."
        )


def outputs(model: nn.Module, example: object) -> list[Tensor]:
    """Return every tensor that the model gives in eval mode; its mode stays as it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            return flattened(model(*as_arguments(example)))
    finally:
        for module, training in flags:
            module.training = training


def difference(want: list[Tensor], got: list[Tensor]) -> float:
    """Return the largest difference of outputs over their scale; infinite where shapes differ or values are NaN."""
    if [t.shape for t in want] != [t.shape for t in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.numel() else 0.0
        worst = max(worst, error if error == error else float("inf"))
    return worst


def as_arguments(example: object) -> tuple[object, ...]:
    """Return what a model is called with: a tensor alone, or several arguments."""
    return tuple(example) if isinstance(example, tuple | list) else (example,)


def flattened(value: object) -> list[Tensor]:
    """Return the tensors in a model's answer: of a tuple, list or mapping each in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in flattened(part)]
    return [tensor for part in value for tensor in flattened(part)] if isinstance(value, tuple | list) else []


def _leaves(module: nn.Module, side: str) -> list[tuple[str, int]]:
    if side == "in":
        return [("weight", 1)]
    return [(leaf, 0) for leaf in ("weight", "bias", "running_mean", "running_var")]


def set_sizes(module: nn.Module) -> None:
    """Let a module say of itself what its weights are."""
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            module.groups = module.groups * len(module.weight) // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Norm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _layer(module: nn.Module) -> Layer:
    assert isinstance(module, Layer)
    return module


def _vector(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
