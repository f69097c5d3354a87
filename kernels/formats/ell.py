"""Block-ELL: for each tile of filters an equal-length list of groups of 8 input channels, each group with its own tap.

Legend: K filters, C input channels, R × S window; NT tiles of BN filters; a list has S steps of BK rows, a row is one
input channel at one tap, a group is 8 rows. Any mask can be packed: what is stored is the union, over a tile's filters,
of the (8 channels × tap) groups with a kept weight, so a mask that is finer than (BN filters × 8 channels) stores zeros
too; ``density`` says what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from autoprune.core.errors import ModelError

GROUP = 8  # 8 channels of 2 bytes are one 16-byte asynchronous copy
CHANNEL_BITS, TAP_BITS = 20, 4
# A code with this bit is a padding group: it points at the first group of the first tap and its weights are 0.
PADDING = 1 << (CHANNEL_BITS + 2 * TAP_BITS)
_CHUNK = 8  # groups of one 128-byte line


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """Unit of the pack: ``filters`` (BN) share one list, ``depth`` (BK) list rows are one step of the kernel."""

    filters: int = 64
    depth: int = 64

    def __post_init__(self) -> None:
        if self.filters not in (16, 32, 64, 128, 256) or self.depth not in (16, 32, 64, 128):
            raise ModelError(
                f"Block-ELL tile {self.filters}x{self.depth}: allowed are 16 to 256 filters and 16 to 128 rows, "
                "powers of 2."
            )


def padded(size: int, multiple: int) -> int:
    """Return ``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def take_or_zero(source: Tensor, index: Tensor) -> Tensor:
    """Return ``source.flatten()[index]`` in the index's shape; an index of ``source.numel()`` gives 0."""
    return F.pad(source.reshape(-1), (0, 1)).index_select(0, index.reshape(-1)).reshape(index.shape)


@dataclass(frozen=True, slots=True)
class BlockELL:
    """A packed weight.

    Attributes:
        shape: K, C, R, S of the unpacked weight.
        tile: BN and BK.
        weight: (NT, S, BK, BN), any float dtype; zeros where padded.
        groups: (NT, S, BK / 8) int32 codes of channel group, row and column of the tap (``encode``).
        keep: (NT, S, BK, BN) bool, where weights may be non-zero; None when the mask is the union itself.
    """

    shape: tuple[int, int, int, int]
    tile: Tile
    weight: Tensor
    groups: Tensor
    keep: Tensor | None = None

    @classmethod
    def pack(cls, weight_KCRS: Tensor, mask_KCRS: Tensor | None = None, tile: Tile | None = None) -> BlockELL:
        """Pack the weights of a mask; without one, those that are not 0.

        Args:
            weight_KCRS: (K, C, R, S), any float dtype and device.
            mask_KCRS: Boolean, same shape; any mask.
            tile: 64 × 64 when None.
        Raises:
            ModelError: The window or the number of channels does not fit a code, or the mask not the weight.
        """
        tile = Tile() if tile is None else tile
        k, c, r, s = weight_KCRS.shape
        if max(r, s) > 1 << TAP_BITS or c > GROUP << CHANNEL_BITS or min(k, c, r, s) < 1:
            raise ModelError(f"Block-ELL: a weight of shape {(k, c, r, s)}: windows reach 16x16, nothing may be empty.")
        weight = weight_KCRS.detach()
        mask = weight != 0 if mask_KCRS is None else mask_KCRS.detach().to(weight.device, torch.bool)
        if mask.shape != weight.shape:
            raise ModelError(f"Block-ELL: mask {tuple(mask.shape)} for a weight {(k, c, r, s)}; they must be equal.")
        packed = cls((k, c, r, s), tile, weight, _encode(_union(mask, tile.filters), s, tile.depth // GROUP))
        index = packed.gather_index()
        real = index < weight.numel()
        keep = take_or_zero(mask, index)
        if bool((keep == real).all()):
            return replace(packed, weight=take_or_zero(weight, index))
        packed = replace(packed, keep=keep)
        return replace(packed, weight=take_or_zero(weight, packed.gather_index()))

    def gather_index(self) -> Tensor:
        """Return int32 (NT, S, BK, BN): where in the flattened (K, C, R, S) weight each entry stands.

        Entries that are always 0 hold the number of weights, one past the end. One gather by this index packs the
        weights of a training step (ClickTrain's fast conversion).
        """
        k, c, r, s = self.shape
        bn, device = self.tile.filters, self.groups.device
        channel, row, column = decode(self.groups)
        filters = torch.arange(self.groups.shape[0] * bn, device=device).reshape(-1, 1, 1, bn)
        lane = torch.arange(GROUP, device=device)
        channels = (channel[..., None] * GROUP + lane).flatten(2)[..., None]
        taps = (row * s + column).repeat_interleave(GROUP, 2)[..., None]
        index = (filters * c + channels) * (r * s) + taps
        absent = (filters >= k) | (channels >= c) | self.padding_rows()[..., None]
        if self.keep is not None:
            absent = absent | ~self.keep
        return index.masked_fill(absent, k * c * r * s).to(torch.int32)

    def scatter_index(self) -> Tensor:
        """Return int32 (K, C, R, S): where in the flattened pack each weight stands; pruned ones are one past the end.

        The inverse of ``gather_index``: one gather by it unpacks weights, or brings a packed gradient back.
        """
        index = self.gather_index().flatten()
        places = torch.arange(index.numel(), dtype=torch.int32, device=index.device)
        inverse = torch.full((self.weights + 1,), index.numel(), dtype=torch.int32, device=index.device)
        inverse[index.long()] = places
        return inverse[:-1].reshape(self.shape)

    def padding_rows(self) -> Tensor:
        """Return bool (NT, S, BK): list rows that exist only to make lists equally long."""
        return (self.groups >= PADDING).repeat_interleave(GROUP, 2)

    def unpack(self) -> Tensor:
        """Return the (K, C, R, S) weight, in the pack's dtype."""
        return take_or_zero(self.weight, self.scatter_index())

    def transpose(self, tile: Tile | None = None) -> BlockELL:
        """Return the pack of the stride-1 input gradient: taps flipped, filters and channels swapped.

        Its lists are unions over BN *channels*: a mask shared by (64 filters × 8 channels) is not shared by
        (64 channels × 8 filters), so the transposed density can be far higher; compare before using it.
        """
        mask = self.scatter_index() < self.weight.numel()
        weight, mask = (t.flip(2, 3).transpose(0, 1).contiguous() for t in (self.unpack(), mask))
        return BlockELL.pack(weight, mask, self.tile if tile is None else tile)

    def index_into(self, other: BlockELL) -> Tensor:
        """Return int32 (NT, S, BK, BN): where in the flattened pack ``other`` each entry of this transpose stands.

        Args:
            other: The pack of which this one is the ``transpose``.
        """
        places = other.scatter_index().flip(2, 3).transpose(0, 1).contiguous()
        return _take_or(places, self.gather_index(), other.weight.numel())

    def with_weight(self, weight_KCRS: Tensor) -> BlockELL:
        """Return the same lists holding other weights, (K, C, R, S)."""
        return replace(self, weight=take_or_zero(weight_KCRS, self.gather_index()))

    @property
    def weights(self) -> int:
        """Number of weights of the dense layer."""
        k, c, r, s = self.shape
        return k * c * r * s

    @property
    def density(self) -> float:
        """Multiplications the kernel makes per multiplication of the dense layer; padding counts, so it can pass 1."""
        return self.groups.numel() * GROUP * self.tile.filters / self.weights

    @property
    def nbytes(self) -> int:
        """Bytes that a kernel reads: weights and codes."""
        return self.weight.nbytes + self.groups.nbytes


def decode(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return channel group, tap row and tap column of codes, int64."""
    codes, tap = groups.long(), (1 << TAP_BITS) - 1
    channel = codes & ((1 << CHANNEL_BITS) - 1)
    return channel, (codes >> (CHANNEL_BITS + TAP_BITS)) & tap, (codes >> CHANNEL_BITS) & tap


def _take_or(source: Tensor, index: Tensor, default: int) -> Tensor:
    extended = F.pad(source.reshape(-1), (0, 1), value=default)
    return extended.index_select(0, index.reshape(-1)).reshape(index.shape)


def _union(mask_KCRS: Tensor, filters: int) -> Tensor:
    """Return bool (NT, channel groups, R·S): which groups any filter of a tile keeps."""
    k, c = mask_KCRS.shape[:2]
    mask = F.pad(mask_KCRS.flatten(2), (0, 0, 0, -c % GROUP, 0, -k % filters))
    return mask.reshape(-1, filters, mask.shape[1] // GROUP, GROUP, mask.shape[2]).any(3).any(1)


def _encode(used_TGP: Tensor, window_columns: int, groups_per_step: int) -> Tensor:
    """Return the lists of codes, int32 (NT, S, groups per step), in the order that keeps neighbours together.

    Taps inside chunks of 64 channels: groups of one tap that follow each other lie in one 128-byte line of the input.
    """
    tiles, channel_groups, positions = used_TGP.shape
    device = used_TGP.device
    channel, tap = torch.meshgrid(
        torch.arange(channel_groups, device=device), torch.arange(positions, device=device), indexing="ij"
    )
    key = (channel // _CHUNK * positions + tap) * _CHUNK + channel % _CHUNK
    order = key.flatten().argsort()
    codes = channel | (tap % window_columns) << CHANNEL_BITS | (tap // window_columns) << (CHANNEL_BITS + TAP_BITS)
    used = used_TGP.flatten(1)[:, order]
    steps = max(1, -(-int(used.sum(1).max()) // groups_per_step))
    first = (~used).to(torch.int8).argsort(dim=1, stable=True)
    lists = torch.full((tiles, steps * groups_per_step), PADDING, dtype=torch.int32, device=device)
    length = min(lists.shape[1], first.shape[1])
    chosen = first[:, :length]
    listed = codes.flatten()[order].to(torch.int32)[chosen]
    lists[:, :length] = torch.where(used.gather(1, chosen), listed, PADDING)
    return lists.reshape(tiles, steps, groups_per_step)
