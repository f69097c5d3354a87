"""The units that a choice keeps or drops whole, as one flat vector a layer.

For the kinds whose units are equal and exchangeable: single weights (fine), blocks (block), tiles (tile), kernels (ck)
and filters (channels). Methods that move units around, rather than only drop them, work on this vector.
Shapes: as in ``masks``; U units of a layer.
"""

from __future__ import annotations

from torch import Tensor

from autoprune.core.choices import CK, Block, Channels, Choice, Fine, Tile
from autoprune.sparsity.masks import group_mean, spread

UNIT_KINDS: tuple[type[Choice], ...] = (Fine, Block, Tile, CK, Channels)


def unit_values(value: Tensor, choice: Choice) -> Tensor:
    """Return the mean of ``value`` over the weights of each unit, (U,) float32.

    Args:
        value: (K, C, R, S) or (O, I).
        choice: Of ``UNIT_KINDS``.
    """
    share, merged = _shape(value, choice)
    value_BDP = group_mean(value.float().reshape(value.shape[0], value.shape[1], -1), share)
    return (value_BDP.mean(-1) if merged else value_BDP).flatten()


def unit_mask(kept_U: Tensor, weight: Tensor, choice: Choice) -> Tensor:
    """Return the weights of the kept units, boolean in the shape of ``weight``.

    Args:
        kept_U: (U,) boolean.
        weight: (K, C, R, S) or (O, I); its shape is used.
        choice: Of ``UNIT_KINDS``.
    """
    share, merged = _shape(weight, choice)
    k, c = int(weight.shape[0]), int(weight.shape[1])
    groups = (-(-k // share[0]), -(-c // share[1]))
    mask_BDP = kept_U.reshape(*groups, -1)
    positions = weight[0, 0].numel()
    mask_KCP = spread(mask_BDP.expand(*groups, positions) if merged else mask_BDP, share, (k, c))
    return mask_KCP.reshape(weight.shape).contiguous()


def unit_size(choice: Choice, weight: Tensor) -> int:
    """Return how many weights a whole unit has; units at a short end have fewer."""
    share, merged = _shape(weight, choice)
    return share[0] * share[1] * (weight[0, 0].numel() if merged else 1)


def _shape(weight: Tensor, choice: Choice) -> tuple[tuple[int, int], bool]:
    """Return filters × channels of a unit, and whether it takes all positions of the window."""
    if isinstance(choice, Block):
        return (choice.filters, 1), False
    if isinstance(choice, Tile):
        return (choice.size, choice.size), False
    if isinstance(choice, CK):
        return (1, 1), True
    if isinstance(choice, Channels):
        return (1, int(weight.shape[1])), True
    return (1, 1), False
