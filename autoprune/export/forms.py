"""A policy applied to weights: the masked network, and the one that is physically smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.errors import MeasurementError
from autoprune.export.architecture import Form
from autoprune.lut.deploy import masked_copy
from autoprune.sparsity.compact import compact
from autoprune.trainers.dead_channels import eliminate_dead_channels

# Outputs of a compact network against the masked one's, relative to the largest output.
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Applied:
    """A network under a policy.

    Attributes:
        network: In eval mode.
        masked: The network of the dense shapes with the same outputs.
        removed: Layer → channels that left; empty where none did.
        sparse: Layers that hold zeros which no shape tells of: layer → choice text.
    """

    network: nn.Module
    masked: nn.Module
    removed: dict[str, int]
    sparse: dict[str, str]


def apply_policy(model: nn.Module, choices: Mapping[str, Choice], form: Form, example: Tensor | None = None) -> Applied:
    """Return a model under a policy.

    Args:
        model: With the policy's trained weights, or dense ones, which are masked by magnitude.
        choices: Layer → choice.
        form: ``compact`` takes out the channels that the policy removes, and every other one that is all zero and can
            leave without changing any output; ``masked`` and ``packed`` keep the shapes.
        example: One input (1, …), by which channel groups are found; needed for channel choices.
    Raises:
        PolicyError: The policy does not fit the model.
        ModelError: ``compact``, and the model cannot be traced for its dead channels.
    """
    masked = masked_copy(model, choices, example)
    network, removed = masked, dict[str, int]()
    if form == "compact":
        if any(isinstance(choice, Channels) for choice in choices.values()):
            network = compact(masked, choices, example)
        network, _ = eliminate_dead_channels(network)
        removed = _narrowed(masked, network)
    sparse = {name: c.text for name, c in choices.items() if not isinstance(c, Dense | Channels)}
    return Applied(network, masked, removed, sparse)


def _narrowed(model: nn.Module, smaller: nn.Module) -> dict[str, int]:
    """Return layer → how many filters fewer the smaller network has."""
    layers = {name: m for name, m in smaller.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    fewer = {name: len(model.get_submodule(name).weight) - len(layer.weight) for name, layer in layers.items()}  # type: ignore[arg-type]
    return {name: count for name, count in fewer.items() if count}


def largest_difference(network: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Return the largest difference of two networks' outputs on images, relative to the largest output or 1."""
    with torch.inference_mode():
        found, want = network.eval()(images), other.eval()(images)
    scale = max(1.0, float(want.abs().max()))
    return float((found - want).abs().max()) / scale


def check_same_outputs(network: nn.Module, masked: nn.Module, images: Tensor) -> float:
    """Return ``largest_difference``.

    Raises:
        MeasurementError: It is above ``TOLERANCE`` or no number.
    """
    difference = largest_difference(network, masked, images)
    if not difference <= TOLERANCE:
        raise MeasurementError(
            f"the stored network's outputs differ from the masked network's by {difference:.2g} (at most {TOLERANCE:g} "
            "is allowed); use --form masked."
        )
    return difference
