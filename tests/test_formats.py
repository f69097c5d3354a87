"""Packed weights unpack to what was packed, whatever the mask."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.kernels.formats import CSR, Blocked, traversal

Floats = npt.NDArray[np.float32]


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
    assert packed.size_bytes == 8 * len(packed.row_ptr) + 4 * len(packed.positions) + 4 * packed.values.size


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
    assert packed.size_bytes == 4 * len(packed.row_ptr) + 8 * len(packed.values)


def test_dense_pack_holds_every_position_of_every_group() -> None:
    packed = Blocked.pack(np.zeros((33, 5, 3, 3), np.float32), 16, keep_all=True)
    assert np.diff(packed.row_ptr).tolist() == [45, 45, 45]


@pytest.mark.parametrize(("channels", "window"), [(1, (1, 1)), (17, (3, 3)), (40, (1, 5))])
def test_traversal_visits_every_position_once(channels: int, window: tuple[int, int]) -> None:
    assert sorted(traversal(channels, window)) == list(range(channels * window[0] * window[1]))


def test_traversal_stays_in_a_cache_line_of_channels_for_all_taps() -> None:
    chunk = traversal(40, (3, 3)) // 9 // 16
    assert (np.diff(chunk) >= 0).all()
