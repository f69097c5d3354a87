"""From a policy with channel choices to the physically smaller network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from autoprune.core.choices import Channels, Choice
from autoprune.core.errors import ModelError
from autoprune.core.policy import Policy
from autoprune.sparsity.channel_graph import channel_groups
from autoprune.sparsity.channels import (
    ChannelGroups,
    Criterion,
    check_equal,
    choose_units,
    kept_units,
    mask_channels,
    take_out,
)


def compact(
    model: nn.Module, policy: Policy | Mapping[str, Choice], example: object, groups: ChannelGroups | None = None
) -> nn.Module:
    """Return a copy of a masked model without the channels that its policy removes; its outputs are the same.

    Zeros of the weights decide which channels go: a search's or a training's own. Sparse choices of other layers stay
    as they are, zeros among their weights. Heads that only training runs keep their shapes.

    Args:
        model: Masked by the policy; left as it was.
        policy: A policy, or layer names → choices.
        example: One input with batch dimension, or a tuple of several.
        groups: Of the model, where they are known; found by ``example`` otherwise.
    Raises:
        PolicyError: Layers of one group have different choices, or a layer's channels cannot leave (it says why).
        ModelError: The model keeps more channels than its policy, or would change by what is taken out.
    """
    choices = channel_choices(policy)
    if not choices:
        return take_out(model, ChannelGroups(), {})
    known = channel_groups(model, example, probe=False) if groups is None else groups
    kept = kept_units(model, known, choices)
    try:
        smaller = take_out(model, known, kept)
        check_equal(model, smaller, example)
    except (RuntimeError, ValueError) as error:  # sizes written into the model's own code
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ModelError(f"the network does not run without its removed channels: {line}") from error
    return smaller


def mask_by_policy(
    model: nn.Module,
    policy: Policy | Mapping[str, Choice],
    example: object,
    *,
    groups: ChannelGroups | None = None,
    criterion: Criterion = "input",
) -> None:
    """Set the channels that a policy removes to zero, in place; which ones, ``criterion`` says.

    Args:
        model: Dense.
        policy: A policy, or layer names → choices; only channel choices are looked at.
        example: One input with batch dimension, or a tuple of several.
        groups: Of the model, where they are known.
        criterion: See ``channels.channel_scores``.
    Raises:
        PolicyError: As ``compact``.
    """
    choices = channel_choices(policy)
    if choices:
        known = channel_groups(model, example, probe=False) if groups is None else groups
        mask_channels(model, known, choose_units(model, known, choices, criterion))


def channel_choices(policy: Policy | Mapping[str, Choice]) -> dict[str, Choice]:
    """Return the channel choices of a policy."""
    choices = policy.choices if isinstance(policy, Policy) else policy
    return {name: choice for name, choice in choices.items() if isinstance(choice, Channels)}
