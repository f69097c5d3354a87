"""Tries channel groups out: units are masked and taken out, outputs are compared, and what disagrees is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from autoprune.core.coupling import Coupling, Side
from autoprune.sparsity.channels import (
    ChannelGroups,
    Place,
    Slot,
    difference,
    mask_channels,
    outputs,
    take_out,
)

# In double precision masked and smaller network agree to rounding, however deep.
_PROBE_TOLERANCE = 1e-7


def tried(model: nn.Module, example: object, groups: ChannelGroups) -> ChannelGroups:
    """Return the groups that leave the network's outputs as the mask does, as far as a trial shows.

    Args:
        model: In double precision; its weights are overwritten.
        example: What it is called with.
        groups: Of the model.
    """
    leaders = [leader for leader, group in groups.coupling.groups.items() if group.units > 1]
    _randomise(model)
    wrong = _wrong(model, example, groups, leaders)
    if not wrong:
        return groups
    right = [leader for leader in leaders if leader not in wrong]
    if right and not _agrees(model, example, groups, right):
        wrong, right = leaders, []
    return without(groups, {leader: "the network's outputs change when they are taken out" for leader in wrong})


def _wrong(model: nn.Module, example: object, groups: ChannelGroups, leaders: list[str]) -> list[str]:
    if not leaders or _agrees(model, example, groups, leaders):
        return []
    if len(leaders) == 1:
        return leaders
    half = len(leaders) // 2
    return _wrong(model, example, groups, leaders[:half]) + _wrong(model, example, groups, leaders[half:])


@torch.no_grad()
def _agrees(model: nn.Module, example: object, groups: ChannelGroups, leaders: list[str]) -> bool:
    generator = torch.Generator().manual_seed(len(leaders))
    kept = {}
    for leader in leaders:
        units = groups.coupling.groups[leader].units
        kept[leader] = torch.zeros(units, dtype=torch.bool)
        kept[leader][torch.randperm(units, generator=generator)[: -(-units // 2)]] = True
    masked = copy.deepcopy(model)
    try:
        mask_channels(masked, groups, kept)
        smaller = take_out(masked, groups, kept)
        return difference(outputs(masked, example), outputs(smaller, example)) <= _PROBE_TOLERANCE
    except Exception:  # sizes written into a forward: whatever it raises, these channels cannot leave
        return False


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Give every parameter values that let a mistake show: heads and layer scales often start at zero, or nearly."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if parameter.dim() > 1:
            parameter.copy_(noise * (2.0 / max(1, parameter[0].numel())) ** 0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def without(groups: ChannelGroups, reasons: Mapping[str, str]) -> ChannelGroups:
    """Return the groups but for some leaders', which are refused for the reasons given."""
    index = {leader: place for place, leader in enumerate(groups.leaders)}
    left = [leader for leader in groups.leaders if leader not in reasons]
    table = torch.full((len(groups.leaders) + 1,), -1)  # the last entry is found by -1
    for number, leader in enumerate(left):
        table[index[leader]] = number
    slots: dict[Place, Slot] = {}
    for place, slot in groups.slots.items():
        group_P = table[slot.group_P]
        if bool((group_P >= 0).any()):
            slots[place] = Slot(group_P, torch.where(group_P >= 0, slot.unit_P, -1))
    coupling = groups.coupling
    refused = dict(coupling.refused)
    for leader, reason in reasons.items():
        refused.update({writer: reason for writer in coupling.groups[leader].writers})
    sides = {
        name: replace(
            own,
            inputs=_owned(own.inputs, left, coupling),
            outputs=_owned(own.outputs, left, coupling),
            grouped=None if own.grouped is None else _owned(own.grouped, left, coupling),
        )
        for name, own in coupling.layers.items()
    }
    sides = {name: own for name, own in sides.items() if own.leaders}
    kept = {leader: coupling.groups[leader] for leader in left}
    return ChannelGroups(Coupling(kept, sides, refused), tuple(left), slots)


def _owned(side: Side, left: list[str], coupling: Coupling) -> Side:
    lost = sum(s.each * coupling.groups[s.leader].units for s in side.shares if s.leader not in left)
    return Side(tuple(s for s in side.shares if s.leader in left), side.fixed + lost)
