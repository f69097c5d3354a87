"""Pattern pools hold the patterns their definitions name."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from autoprune.core.errors import ChoiceError, UnknownName
from autoprune.sparsity.patterns import dynamic_pool, generic_pool, make_pool, patdnn_pool, select_patterns


def scores(count: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 9, generator=torch.Generator().manual_seed(seed))


def as_sets(pool: torch.Tensor) -> list[frozenset[int]]:
    return [frozenset(row.nonzero().flatten().tolist()) for row in pool.flatten(1)]


def test_generic_pool_of_four_is_the_squares_around_the_centre() -> None:
    squares = {frozenset({r * 3 + c for r in (a, a + 1) for c in (b, b + 1)}) for a in (0, 1) for b in (0, 1)}
    assert set(as_sets(generic_pool(4))) == squares


@pytest.mark.parametrize("count", [4, 8, 12])
def test_generic_pools_grow_by_whole_symmetry_classes(count: int) -> None:
    pool = generic_pool(count)
    sets = as_sets(pool)
    assert len(set(sets)) == count
    assert all(len(s) == 4 and 4 in s for s in sets)
    assert as_sets(generic_pool(12))[:count] == sets
    rotated = as_sets(torch.rot90(pool, 1, (1, 2)))
    assert set(rotated) == set(sets)


def test_generic_pool_refuses_other_sizes() -> None:
    with pytest.raises(ChoiceError, match="generic pattern pool"):
        generic_pool(4, entries=5)


def test_patdnn_pool_is_the_most_frequent_natural_patterns() -> None:
    score = scores()
    natural = []
    for row in score.tolist():
        others = sorted((i for i in range(9) if i != 4), key=lambda i: -row[i])[:3]
        natural.append(frozenset({4, *others}))
    frequency = Counter(natural)
    pool = as_sets(patdnn_pool(score, 8, 4, (3, 3)))
    assert len(set(pool)) == 8
    got = [frequency[p] for p in pool]
    assert got == [count for _, count in frequency.most_common(8)]


def test_patdnn_pool_fills_up_with_the_best_scored_when_few_patterns_occur() -> None:
    score = torch.zeros(5, 9)
    score[:, [0, 1, 2]] = 1.0
    score[:, 3] = 0.5
    pool = as_sets(patdnn_pool(score, 4, 4, (3, 3)))
    assert pool[0] == {0, 1, 2, 4}
    pairs = itertools.combinations((0, 1, 2), 2)
    assert {frozenset(p) for p in pool[1:]} == {frozenset({4, 3, *pair}) for pair in pairs}


def test_dynamic_pool_contains_the_two_best_positions_and_the_best_totals() -> None:
    importance = torch.tensor([0.1, 5.0, 0.2, 0.3, 4.0, 0.7, 0.4, 0.6, 0.5])
    pool = as_sets(dynamic_pool(importance, 8, 4, (3, 3)))
    pairs = itertools.combinations((0, 2, 3, 5, 6, 7, 8), 2)
    totals = sorted((sum(importance[list(pair)].tolist()) for pair in pairs), reverse=True)
    assert all({1, 4} <= p for p in pool)
    got = [float(importance[list(p)].sum()) - 9.0 for p in pool]
    assert got == pytest.approx(totals[:8], abs=1e-5)


def test_selection_takes_the_pattern_that_keeps_most() -> None:
    score, pool = scores(50), generic_pool(8).flatten(1)
    chosen = select_patterns(score, pool)
    for row, index in zip(score, chosen, strict=True):
        assert float(row[pool[index]].sum()) == pytest.approx(max(float(row[p].sum()) for p in pool))


@pytest.mark.parametrize("entries", [1, 2, 9])
def test_pools_of_other_entry_counts_have_no_duplicates(entries: int) -> None:
    for kind in ("patdnn", "dynamic"):
        sets = as_sets(make_pool(kind, scores().reshape(-1, 3, 3), 12, entries))
        assert len(set(sets)) == len(sets)
        assert all(len(s) == entries for s in sets)


def test_unknown_pool_proposes_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'dynamic'"):
        make_pool("dynamik", scores().reshape(-1, 3, 3), 4, 4)
