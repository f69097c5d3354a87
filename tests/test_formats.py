"""Packed weights unpack to what was packed, whatever the mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.core.choices import Pattern
from autoprune.core.errors import ChoiceError
from autoprune.kernels.formats import CSR, FKW, Blocked, Packed, traversal
from autoprune.sparsity.masks import make_mask

Floats = npt.NDArray[np.float32]

FORMATS: dict[str, Callable[[Floats], Packed]] = {
    "block16": lambda weight: Blocked.pack(weight, 16),
    "block32": lambda weight: Blocked.pack(weight, 32),
    "csr": CSR.pack,
    "fkw": FKW.pack,
}


@st.composite
def masked_weights(draw: st.DrawFn) -> Floats:
    """Weights of any small shape: single zeros, zero blocks, zero filters, all zero."""
    shape = (
        draw(st.integers(1, 40)),
        draw(st.integers(1, 20)),
        draw(st.sampled_from([1, 3])),
        draw(st.sampled_from([1, 2])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.standard_normal(shape).astype(np.float32)
    weight *= rng.random(shape) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    weight[rng.random(shape[0]) < draw(st.sampled_from([0.0, 0.5]))] = 0
    weight[:, rng.random(shape[1]) < draw(st.sampled_from([0.0, 0.5]))] = 0
    return weight


@settings(max_examples=60, deadline=None)
@given(masked_weights(), st.sampled_from([16, 32]), st.booleans())
def test_blocked_round_trip(weight: Floats, block: int, keep_all: bool) -> None:
    packed = Blocked.pack(weight, block, keep_all)
    np.testing.assert_array_equal(packed.unpack(), weight)
    assert packed.values.size == 0 or packed.values.ctypes.data % 64 == 0
    assert packed.nbytes == 8 * len(packed.row_ptr) + 4 * len(packed.positions) + 4 * packed.values.size


@settings(max_examples=60, deadline=None)
@given(masked_weights(), st.sampled_from([16, 32]))
def test_blocked_keeps_exactly_the_blocks_with_a_nonzero(weight: Floats, block: int) -> None:
    packed = Blocked.pack(weight, block)
    groups = [weight[first : first + block] for first in range(0, len(weight), block)]
    assert np.diff(packed.row_ptr).tolist() == [int((g != 0).any(axis=0).sum()) for g in groups]


@settings(max_examples=60, deadline=None)
@given(masked_weights())
def test_csr_round_trip(weight: Floats) -> None:
    packed = CSR.pack(weight)
    np.testing.assert_array_equal(packed.unpack(), weight)
    assert len(packed.values) == np.count_nonzero(weight)
    assert packed.nbytes == 4 * len(packed.row_ptr) + 8 * len(packed.values)


def test_dense_pack_holds_every_position_of_every_group() -> None:
    packed = Blocked.pack(np.zeros((33, 5, 3, 3), np.float32), 16, keep_all=True)
    assert np.diff(packed.row_ptr).tolist() == [45, 45, 45]


@pytest.mark.parametrize(("channels", "window"), [(1, (1, 1)), (17, (3, 3)), (40, (1, 5))])
def test_traversal_visits_every_position_once(channels: int, window: tuple[int, int]) -> None:
    assert sorted(traversal(channels, window)) == list(range(channels * window[0] * window[1]))


def test_traversal_stays_in_a_cache_line_of_channels_for_all_taps() -> None:
    chunk = traversal(40, (3, 3)) // 9 // 16
    assert (np.diff(chunk) >= 0).all()


def _turned(weight: Floats) -> Floats:
    return weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]


@pytest.mark.parametrize("name", FORMATS)
@given(weight=masked_weights())
def test_packed_weight_unpacks_to_itself(name: str, weight: Floats) -> None:
    np.testing.assert_array_equal(FORMATS[name](weight).unpack(), weight)


@pytest.mark.parametrize("name", FORMATS)
@given(weight=masked_weights())
def test_transpose_is_the_weight_of_the_input_gradient_and_its_own_inverse(name: str, weight: Floats) -> None:
    packed = FORMATS[name](weight)
    np.testing.assert_array_equal(packed.transpose().unpack(), _turned(weight))
    twice = packed.transpose().transpose()
    np.testing.assert_array_equal(twice.unpack(), weight)
    np.testing.assert_array_equal(twice.gather_index(), packed.gather_index())
    assert twice.nbytes == packed.nbytes


@pytest.mark.parametrize("name", FORMATS)
@given(weight=masked_weights(), seed=st.integers(0, 99))
def test_one_gather_packs_the_weights_of_the_next_step(name: str, weight: Floats, seed: int) -> None:
    stepped = np.where(weight != 0, weight + 10 + np.float32(seed), 0).astype(np.float32)
    packed, want = FORMATS[name](weight), FORMATS[name](stepped)
    got = packed.with_weight(stepped)
    np.testing.assert_array_equal(got.values, want.values)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(got.unpack(), stepped)
    index = packed.gather_index()
    np.testing.assert_array_equal(np.append(stepped, 0)[index], want.values)  # type: ignore[attr-defined]


@pytest.mark.parametrize("pack", [CSR.pack, FKW.pack], ids=["csr", "fkw"])
@given(weight=masked_weights())
def test_kept_weights_that_are_zero_stay_in_their_places(pack: Callable[..., CSR | FKW], weight: Floats) -> None:
    zeroed = weight * (np.arange(weight.size).reshape(weight.shape) % 2)
    packed = pack(zeroed, weight != 0)
    assert packed.values.size == np.count_nonzero(weight)
    np.testing.assert_array_equal(packed.gather_index(), pack(weight).gather_index())
    np.testing.assert_array_equal(packed.transpose().transpose().gather_index(), packed.gather_index())
    np.testing.assert_array_equal(packed.unpack(), zeroed)


@given(weight=masked_weights())
def test_fkw_bytes_are_those_of_its_arrays(weight: Floats) -> None:
    packed = FKW.pack(weight)
    k, c, r, s = weight.shape
    kernels, patterns = int((weight != 0).any(axis=(2, 3)).sum()), len(packed.patterns)
    assert c < 256
    want = patterns * -(-r * s // 8) + 4 * k + 4 * (k + 1) + k * (patterns + 1) + kernels
    assert packed.nbytes == want + 4 * np.count_nonzero(weight)


@given(weight=masked_weights())
def test_fkw_groups_hold_filters_of_like_kernels(weight: Floats) -> None:
    packed = FKW.pack(weight)
    assert sorted(packed.order) == list(range(len(weight)))
    lengths = packed.row_lengths.tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert lengths == [np.count_nonzero(weight[k]) for k in packed.order]
    assert [first for first, _ in packed.groups] == [0, *(end for _, end in packed.groups[:-1])]
    assert packed.groups[-1][1] == len(weight)
    for first, end in packed.groups:
        assert (packed.stride[first:end] == packed.stride[first]).all()


@pytest.mark.parametrize("kernels", [1.0, 0.5])
def test_equal_nonzeros_per_filter_give_constant_row_pointers(kernels: float) -> None:
    weight = torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = make_mask(weight, Pattern(count=8, entries=4, kernels=kernels), balance="filter")
    packed = FKW.pack((weight * mask).numpy())
    assert set(np.diff(packed.row_ptr)) == {int(16 * kernels)}
    assert set(packed.row_lengths) == {int(16 * kernels) * 4}
    assert len(packed.patterns) <= 8
    assert packed.nbytes < CSR.pack((weight * mask).numpy()).nbytes


def test_fkw_refuses_more_patterns_than_it_holds() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16, 5, 5)).astype(np.float32)
    weight *= np.random.default_rng(1).random(weight.shape) < 0.5
    with pytest.raises(ChoiceError, match="at most 64 patterns"):
        FKW.pack(weight)


@pytest.mark.parametrize("pack", [CSR.pack, FKW.pack], ids=["csr", "fkw"])
@given(weight=masked_weights())
def test_rows_of_a_kernel_hold_every_kept_weight_once_and_transpose_by_a_fixed_index(
    pack: Callable[[Floats], CSR | FKW], weight: Floats
) -> None:
    rows = pack(weight).rows()
    assert (np.diff(np.diff(rows.row_ptr)) <= 0).all()
    channel, row, column = rows.code // 64, rows.code // 8 % 8, rows.code % 8
    filters = np.repeat(rows.order, np.diff(rows.row_ptr))
    values = weight.ravel()[rows.gather_index]
    for dense, got in (
        (weight, (filters, channel, row, column)),
        (_turned(weight), None),
    ):
        source = rows
        if got is None:
            source, permutation = rows.transpose()
            values = values[permutation]
            filters = np.repeat(source.order, np.diff(source.row_ptr))
            got = (filters, source.code // 64, source.code // 8 % 8, source.code % 8)
        rebuilt = np.zeros_like(dense)
        rebuilt[got] = values
        np.testing.assert_array_equal(rebuilt, dense)
        np.testing.assert_array_equal(dense.ravel()[source.gather_index], values)
