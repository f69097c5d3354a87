"""Masks keep exactly what a choice says, the best of it, and the same every time."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoprune.core.choices import CK, NM, Block, Channels, Choice, Combined, Dense, Fine, Pattern, Window, parse_choice
from autoprune.core.errors import ChoiceError
from autoprune.sparsity.masks import make_mask
from autoprune.sparsity.ranking import kept_count, top_mask

CHOICES = [
    "dense",
    "block(keep=0.25,filters=16)",
    "block(keep=0.7,filters=32)",
    "pattern(count=8,entries=4,kernels=0.5,share=16x1)",
    "pattern(count=4,entries=4,kernels=0.35,share=1x1)",
    "pattern(count=12,entries=3,kernels=1,share=8x4)",
    "fine(keep=0.1)",
    "ck(keep=0.3)",
    "window(entries=2)",
    "combined(keep=0.25,fraction=0.8)",
    "combined(keep=0.4,fraction=0.5)",
]
SHAPES = [(33, 5, 3, 3), (64, 16, 3, 3), (32, 7, 3, 3)]


def weight_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ceil_count(units: int, keep: float) -> int:
    return min(units, max(1, math.ceil(units * Fraction(str(keep)))))


def group_units(mask: Tensor, choice: Choice) -> tuple[int, int]:
    """Count kept units and wanted units of a choice, from the mask alone."""
    k, c, p = mask.shape[0], mask.shape[1], mask[0, 0].numel()
    mask_KCP = mask.reshape(k, c, p)
    if isinstance(choice, Block):
        blocks = [part.any(0) for part in mask_KCP.split(choice.filters)]
        return int(sum(b.sum() for b in blocks)), ceil_count(len(blocks) * c * p, choice.keep)
    if isinstance(choice, Pattern):
        f, d = choice.share
        groups = [part.any() for row in mask_KCP.split(f) for part in row.split(d, dim=1)]
        return sum(map(int, groups)), ceil_count(len(groups), choice.kernels)
    if isinstance(choice, Fine):
        return int(mask.sum()), ceil_count(mask.numel(), choice.keep)
    if isinstance(choice, CK):
        return int(mask_KCP.any(-1).sum()), ceil_count(k * c, choice.keep)
    if isinstance(choice, Window):
        return int(mask.sum()), k * c * min(p, choice.entries)
    assert isinstance(choice, Combined)
    entries = p - math.floor(p * Fraction(str(choice.fraction)) * (1 - Fraction(str(choice.keep))))
    wanted = math.ceil(Fraction(str(choice.keep)) * k * c * p / entries)
    assert set(mask_KCP.sum(-1).flatten().tolist()) <= {0, entries}
    return int(mask_KCP.any(-1).sum()), wanted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", CHOICES[1:])
def test_mask_keeps_exactly_the_nominal_number_of_units(text: str, shape: tuple[int, ...]) -> None:
    choice = parse_choice(text)
    kept, wanted = group_units(make_mask(weight_of(shape), choice), choice)
    assert kept == wanted


@pytest.mark.parametrize("text", CHOICES)
def test_mask_is_the_same_every_time_and_in_every_memory_format(text: str) -> None:
    weight, choice = weight_of((33, 16, 3, 3)), parse_choice(text)
    mask = make_mask(weight, choice)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert torch.equal(mask, make_mask(weight.clone(), choice))
    assert torch.equal(mask, make_mask(weight.contiguous(memory_format=torch.channels_last), choice))


@pytest.mark.parametrize("text", CHOICES)
def test_equal_scores_keep_the_exact_count_lowest_index_first(text: str) -> None:
    choice = parse_choice(text)
    weight = torch.ones(32, 8, 3, 3)
    mask = make_mask(weight, choice)
    if isinstance(choice, Dense):
        assert mask.all()
        return
    kept, wanted = group_units(mask, choice)
    assert kept == wanted
    assert mask[0, 0].any()
    if isinstance(choice, Fine):
        assert mask.flatten()[:kept].all()


@pytest.mark.parametrize("text", CHOICES)
def test_nan_weights_do_not_change_the_count(text: str) -> None:
    choice = parse_choice(text)
    good, bad = weight_of((32, 8, 3, 3)), weight_of((32, 8, 3, 3))
    bad[3, 2] = math.nan
    assert int(make_mask(bad, choice).sum()) == int(make_mask(good, choice).sum())


def naive_fine(weight: Tensor, keep: float) -> Tensor:
    order = sorted(range(weight.numel()), key=lambda i: (-abs(weight.flatten()[i].item()), i))
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[: ceil_count(weight.numel(), keep)]] = True
    return mask.reshape(weight.shape)


def test_fine_keeps_the_largest_weights_of_a_convolution() -> None:
    weight = weight_of((5, 3, 3, 3))
    assert torch.equal(make_mask(weight, Fine(0.3)), naive_fine(weight, 0.3))


def test_fine_leaves_no_output_neuron_without_a_weight() -> None:
    weight = weight_of((10, 20))
    weight[4] *= 1e-3
    mask = make_mask(weight, Fine(0.1))
    assert int(mask.sum()) == 20
    assert mask.any(1).all()
    assert mask[4].nonzero().item() == weight[4].abs().argmax()


def test_fine_below_one_weight_a_neuron_keeps_the_plain_ranking() -> None:
    weight = weight_of((10, 20))
    assert torch.equal(make_mask(weight, Fine(0.03)), naive_fine(weight, 0.03))


def test_block_keeps_blocks_whole_and_the_best_of_them_with_a_short_last_block() -> None:
    weight, keep = weight_of((33, 4, 3, 3)), 0.5
    blocks = [b.abs().mean(0).flatten() for b in weight.split(16)]
    ranked = sorted(((-float(v), b * 36 + i) for b, block in enumerate(blocks) for i, v in enumerate(block)))
    wanted = torch.zeros(3 * 36, dtype=torch.bool)
    wanted[[index for _, index in ranked[: ceil_count(108, keep)]]] = True
    mask = make_mask(weight, Block(keep, 16))
    for filters, row in zip(mask.split(16), wanted.reshape(3, 4, 3, 3), strict=True):
        assert (filters == row).all()


def test_pattern_groups_share_one_pattern_from_the_pool() -> None:
    choice = Pattern(8, 4, 0.5, (16, 1))
    mask_KCP = make_mask(weight_of((64, 16, 3, 3)), choice).flatten(2)
    seen = set()
    for group in mask_KCP.split(16):
        assert (group == group[:1]).all()
        seen |= {tuple(row.tolist()) for row in group[0] if row.any()}
    assert len(seen) <= 8
    assert all(sum(pattern) == 4 and pattern[4] for pattern in seen)


def test_pattern_uses_the_pool_it_is_given() -> None:
    pool = torch.zeros(4, 3, 3, dtype=torch.bool)
    pool[:, 0] = True
    pool[torch.arange(4), 1, torch.tensor([0, 1, 2, 0])] = True
    mask_KCP = make_mask(weight_of((16, 8, 3, 3)), Pattern(4), pool=pool).flatten(2)
    assert mask_KCP[..., :3].all()


def test_window_keeps_the_largest_entries_of_every_kernel() -> None:
    weight = weight_of((6, 5, 3, 3))
    top = weight.abs().flatten(2).topk(2).indices
    wanted = torch.zeros(6, 5, 9, dtype=torch.bool).scatter(2, top, True).reshape(weight.shape)
    assert torch.equal(make_mask(weight, Window(2)), wanted)


@pytest.mark.parametrize("kernel_score", ["max", "sum"])
def test_ck_keeps_the_best_kernels_whole(kernel_score: str) -> None:
    weight = weight_of((10, 10, 3, 3))
    value = weight.abs().flatten(2)
    score = value.amax(-1) if kernel_score == "max" else value.sum(-1)
    wanted = torch.zeros(100, dtype=torch.bool)
    wanted[score.flatten().topk(30).indices] = True
    mask = make_mask(weight, CK(0.3), kernel_score=kernel_score)  # type: ignore[arg-type]
    assert torch.equal(mask, wanted.reshape(10, 10, 1, 1).expand_as(weight))


def test_combined_ranks_kernels_by_what_their_window_keeps() -> None:
    weight = weight_of((12, 12, 3, 3))
    mask = make_mask(weight, Combined(0.25, 0.8))
    top = weight.abs().flatten(2).topk(4)  # 9 - floor(0.8 * 0.75 * 9)
    kernels = top.values.sum(-1).flatten().topk(81).indices  # 0.25 * 144 * 9 / 4
    wanted = torch.zeros(144, 9, dtype=torch.bool)
    wanted[kernels] = torch.zeros(144, 9, dtype=torch.bool).scatter(1, top.indices.reshape(144, 4), True)[kernels]
    assert torch.equal(mask, wanted.reshape(weight.shape))


@pytest.mark.parametrize("text", ["block(keep=0.3,filters=16)", "pattern(count=8,entries=4,kernels=0.3,share=16x1)",
                                  "fine(keep=0.3)", "ck(keep=0.3)", "combined(keep=0.3,fraction=0.8)"])
def test_balanced_masks_keep_equally_many_in_every_filter(text: str) -> None:
    weight = weight_of((32, 20, 3, 3))
    weight[:16] *= 10.0
    counts = make_mask(weight, parse_choice(text), balance="filter").flatten(1).sum(1)
    assert (counts == counts[0]).all()
    uneven = make_mask(weight, parse_choice(text)).flatten(1).sum(1)
    assert (uneven != uneven[0]).any()


@pytest.mark.parametrize("shape", [(6, 8, 3, 3), (5, 16)])
def test_nm_keeps_the_n_largest_of_every_m_consecutive_input_channels(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    mask = make_mask(weight, NM(n=2, m=4)).reshape(shape[0], shape[1], -1)
    groups = mask.unfold(1, 4, 4)
    assert (groups.sum(-1) == 2).all()
    size = weight.abs().reshape(shape[0], shape[1], -1).unfold(1, 4, 4)
    assert (size.masked_fill(~groups, math.inf).amin(-1) >= size.masked_fill(groups, 0.0).amax(-1)).all()


def test_channels_keep_whole_filters_with_the_largest_sums() -> None:
    weight = weight_of((33, 5, 3, 3))
    mask = make_mask(weight, Channels(keep=0.5))
    kept = mask.flatten(1)
    assert (kept.all(1) == kept.any(1)).all()
    assert int(kept.all(1).sum()) == Channels(keep=0.5).width(33) == 17
    size = weight.abs().sum((1, 2, 3))
    assert size[kept.all(1)].min() >= size[~kept.all(1)].max()


def test_score_decides_instead_of_magnitude() -> None:
    weight = weight_of((4, 4, 3, 3))
    score = torch.zeros_like(weight)
    score[2, 1, 0, 2] = 1.0
    mask = make_mask(weight, Fine(1 / 144), score)
    assert mask.nonzero().tolist() == [[2, 1, 0, 2]]


@pytest.mark.parametrize(
    ("shape", "text"),
    [((8, 8), "window(entries=2)"), ((8, 8, 1, 1), "ck(keep=0.5)"), ((8, 8, 5, 5), CHOICES[3]), ((8,), "fine(keep=1)")],
)
def test_a_weight_that_cannot_take_the_choice_is_refused(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ChoiceError, match=str(parse_choice(text)).split("(")[0]):
        make_mask(torch.ones(shape), parse_choice(text))


@given(units=st.integers(1, 5000), percent=st.integers(1, 100))
def test_kept_count_rounds_what_is_removed_down(units: int, percent: int) -> None:
    removed = units * (100 - percent) // 100
    assert kept_count(units, percent / 100) == max(1, units - removed)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=30), data=st.data())
def test_top_mask_equals_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    mask = top_mask(torch.tensor(values, dtype=torch.float32), count)
    assert mask.nonzero().flatten().tolist() == sorted(order)
