"""Block-ELL packs unpack to what was packed, whatever the mask, and say what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoprune.core.choices import CK, Block, Pattern
from autoprune.core.errors import ModelError
from autoprune.kernels.formats.ell import GROUP, PADDING, BlockELL, Tile, decode, take_or_zero
from autoprune.sparsity.masks import make_mask

_TILES = st.builds(Tile, st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64]))


@st.composite
def masked_weights(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Weights of any small shape and any mask: shared by tiles and groups, single weights, all, none."""
    k, c = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    r, s = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (2, 1)]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([(64, 8), (16, 8), (1, 1), (3, 5)]))
    coarse = torch.rand(-(-k // share[0]), -(-c // share[1]), r, s) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask = coarse.repeat_interleave(share[0], 0)[:k].repeat_interleave(share[1], 1)[:, :c]
    return torch.randn(k, c, r, s), mask


@given(masked_weights(), _TILES)
def test_round_trip(weights: tuple[Tensor, Tensor], tile: Tile) -> None:
    weight, mask = weights
    pack = BlockELL.pack(weight, mask, tile)
    assert torch.equal(pack.unpack(), weight * mask)
    assert torch.equal(pack.with_weight(2 * weight).unpack(), 2 * weight * mask)
    assert pack.weight.shape == (*pack.groups.shape[:2], tile.depth, tile.filters)
    assert pack.groups.shape == (-(-len(weight) // tile.filters), pack.weight.shape[1], tile.depth // GROUP)
    assert pack.nbytes == 4 * pack.weight.numel() + 4 * pack.groups.numel()


@given(masked_weights(), _TILES)
def test_gather_and_scatter_are_inverse_of_each_other(weights: tuple[Tensor, Tensor], tile: Tile) -> None:
    weight, mask = weights
    pack = BlockELL.pack(weight, mask, tile)
    gather, scatter = pack.gather_index(), pack.scatter_index()
    assert torch.equal(scatter < pack.weight.numel(), mask)
    assert int((gather < weight.numel()).sum()) == int(mask.sum())
    assert torch.equal(take_or_zero(take_or_zero(weight, gather), scatter), weight * mask)
    # The gradient of the gather is the scatter: <pack(w), g> = <w, unpack(g)>.
    gradient = torch.randn(gather.shape, dtype=torch.float64)
    packed = take_or_zero(weight.double(), gather)
    back = take_or_zero(gradient, scatter)
    torch.testing.assert_close((packed * gradient).sum(), (weight.double() * back).sum())


@given(masked_weights(), _TILES)
def test_lists_hold_each_used_group_once_and_only_those(weights: tuple[Tensor, Tensor], tile: Tile) -> None:
    weight, mask = weights
    pack = BlockELL.pack(weight, mask, tile)
    for number, lists in enumerate(pack.groups):
        kept = lists[lists < PADDING]
        channel, row, column = decode(kept)
        listed = set(zip(channel.tolist(), row.tolist(), column.tolist(), strict=True))
        rows = mask[number * tile.filters :][: tile.filters].any(0)
        used = {(c // GROUP, r, s) for c, r, s in rows.nonzero().tolist()}
        assert listed == used
        assert kept.numel() == len(used)
    padding = pack.padding_rows()
    assert not pack.weight[padding].any()
    assert all(not part[pack.groups >= PADDING].any() for part in decode(pack.groups))  # a valid address


@given(masked_weights(), _TILES)
def test_transpose_is_the_pack_of_the_input_gradient(weights: tuple[Tensor, Tensor], tile: Tile) -> None:
    weight, mask = weights
    pack = BlockELL.pack(weight, mask, tile)
    back = pack.transpose(Tile(32, 16))
    assert back.tile == Tile(32, 16)
    assert torch.equal(back.unpack(), (weight * mask).flip(2, 3).transpose(0, 1))
    assert torch.equal(take_or_zero(pack.weight, back.index_into(pack)), back.weight)
    assert torch.equal(back.transpose(tile).unpack(), weight * mask)


@pytest.mark.parametrize(
    ("choice", "tile", "density"),
    [
        (Pattern(count=8, kernels=0.5, share=(64, 8)), Tile(64, 64), 2 / 9),
        (Pattern(count=4, kernels=1.0, share=(128, 16)), Tile(64, 64), 4 / 9),
        (CK(keep=0.25), Tile(64, 64), 1.0),  # single kernels: the union of 64 filters × 8 channels keeps all
        (Block(keep=0.125, filters=32), Tile(32, 64), None),  # 8 channels rarely agree: up to 8 times the block's
    ],
)
def test_density_is_what_the_kernel_executes(choice: Pattern | CK | Block, tile: Tile, density: float | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 256, 3, 3)
    mask = make_mask(weight, choice, balance="filter" if density != 1.0 else "layer")
    pack = BlockELL.pack(weight, mask, tile)
    assert torch.equal(pack.unpack(), weight * mask)
    executed = pack.groups.numel() * GROUP * tile.filters / weight.numel()
    assert pack.density == executed
    if density is None:
        assert float(mask.float().mean()) < pack.density < 1.0
    else:
        # One step may be left over at the end of each list.
        assert density <= pack.density <= density + tile.depth / (256 * 9)


def test_a_finer_mask_than_the_tile_is_kept_apart() -> None:
    weight = torch.randn(64, 8, 1, 1)
    mask = torch.rand(weight.shape) < 0.5
    pack = BlockELL.pack(weight, mask, Tile(64, 16))
    assert pack.keep is not None
    assert torch.equal(pack.keep, pack.weight != 0)
    assert BlockELL.pack(weight, torch.ones_like(mask), Tile(64, 16)).keep is None
    assert torch.equal(replace(pack, weight=torch.ones_like(pack.weight)).unpack(), mask.float())


def test_neighbouring_groups_of_a_list_share_a_line_of_the_input() -> None:
    channel, row, column = decode(BlockELL.pack(torch.randn(64, 128, 3, 3), tile=Tile(64, 64)).groups)
    assert (channel // GROUP == (channel // GROUP)[..., :1]).all()  # one 128-byte line in a step …
    assert (row == row[..., :1]).all()  # … at one tap
    assert (column == column[..., :1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tile(48, 64), "Block-ELL tile 48x64"),
        (lambda: BlockELL.pack(torch.randn(8, 8, 17, 1)), "windows reach 16x16"),
        (lambda: BlockELL.pack(torch.randn(8, 8, 3, 3), torch.ones(8, 8, 1, 1)), "they must be equal"),
    ],
)
def test_what_cannot_be_packed_is_refused(call: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call()  # type: ignore[operator]
