"""Masks applied to a model: its gradients, weights and optimizer state, all layers in one call each.

What is multiplied with what is listed once per change of masks, so a step makes no loop over layers of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from autoprune.core.errors import PolicyError
from autoprune.trainers.group_masks import GroupMasks
from autoprune.trainers.layers import inner_module
from autoprune.trainers.method import PrunedLayer

# Parameters whose gradients are masked, and the 0/1 factor of each.
Pairs = tuple[list[Tensor], list[Tensor]]


class Masking:
    """The masks of some layers, ready to be applied.

    Args:
        layers: Under a policy; their masks are read by ``refresh``.
        groups: Of the layers that share channels.
    """

    def __init__(self, layers: Sequence[PrunedLayer], groups: GroupMasks | None = None) -> None:
        self.layers = layers
        self.groups = groups
        self.weights: Pairs = ([], [])
        self.gradients: Pairs = ([], [])
        self.refresh()

    def refresh(self) -> None:
        """Read the layers' masks anew; called after every change of one."""
        shared = [] if self.groups is None else self.groups.factors()
        self.weights = _pairs(self.layers, shared)
        self.gradients = _pairs([layer for layer in self.layers if not layer.straight], shared)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of removed weights to zero, but for layers whose gradients pass the mask."""
        parameters, factors = self.gradients
        if not parameters:
            return
        grads = [parameter.grad for parameter in parameters]
        if None in grads:
            factors = [factor for grad, factor in zip(grads, factors, strict=True) if grad is not None]
        present = [grad for grad in grads if grad is not None]
        if present:
            torch._foreach_mul_(present, factors)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set removed weights to zero."""
        parameters, factors = self.weights
        if parameters:
            torch._foreach_mul_(parameters, factors)

    @torch.no_grad()
    def mask_state(self, optimizer: Optimizer) -> None:
        """Set the optimizer's state of removed weights to zero: momentum would revive them."""
        for parameter, factor in zip(*self.gradients, strict=True):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(factor)

    @torch.no_grad()
    def mask_copy(self, trained: nn.Module, copy: nn.Module) -> None:
        """Set removed weights to zero in another model of the same structure, such as an average of weights.

        Args:
            trained: The model that the layers belong to.
            copy: An ``AveragedModel``, a deep copy, or one of these in a wrapper.
        Raises:
            PolicyError: It lacks a masked parameter, or has it in another shape.
        """
        inner = inner_module(copy)
        if isinstance(inner, AveragedModel):
            inner = inner_module(inner.module)
        names: dict[Tensor, str] = {parameter: name for name, parameter in trained.named_parameters()}
        targets = dict(inner.named_parameters())
        for parameter, factor in zip(*self.weights, strict=True):
            target = targets.get(names[parameter])
            if target is None or target.shape != factor.shape:
                raise PolicyError(
                    f"cannot mask this model: it has no '{names[parameter]}' of the trained one's shape; give a copy "
                    "or an average of the model that is trained."
                )
            target.mul_(factor.to(target.device, target.dtype))

    def count(self) -> dict[str, int]:
        """Return how many weights each masked layer keeps."""
        masked = [(layer.name, layer.mask) for layer in self.layers if layer.mask is not None]
        if not masked:
            return {}
        device = masked[0][1].device
        counts = torch.stack([mask.sum().to(device) for _, mask in masked]).tolist()
        return dict(zip((name for name, _ in masked), counts, strict=True))

    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter that a mask covers, with what of it is kept, boolean."""
        return [(parameter, factor != 0) for parameter, factor in zip(*self.gradients, strict=True)]


def _pairs(layers: Sequence[PrunedLayer], shared: Sequence[tuple[nn.Parameter, Tensor]]) -> Pairs:
    """Return each parameter once: a layer may lose filters of its own and the inputs that another one wrote."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for parameter, factor in [*(pair for layer in layers for pair in layer.factors()), *shared]:
        known = found.get(id(parameter))
        found[id(parameter)] = (parameter, factor if known is None else known[1] * factor)
    return [parameter for parameter, _ in found.values()], [factor for _, factor in found.values()]
