"""Schedules are the papers' formulas, and defaults fit every length of training."""

from __future__ import annotations

import pytest

from autoprune.trainers.schedule import (
    Era,
    Stages,
    TrainerError,
    campfire_phase,
    clicktrain_phase,
    cubic_sparsity,
    make_era,
    make_stages,
)


@pytest.mark.parametrize("exponent", [1.0, 3.0])
def test_sparsity_follows_equation_one(exponent: float) -> None:
    era = Era(20, 30)
    for epoch in range(20, 51):
        wanted = 0.8 + (0.1 - 0.8) * (1 - (epoch - 20) / 30) ** exponent
        assert cubic_sparsity(epoch, era, 0.8, initial=0.1, exponent=exponent) == pytest.approx(wanted)
    assert cubic_sparsity(19.99, era, 0.8) == 0.0
    assert cubic_sparsity(50, era, 0.8) == 0.8
    assert cubic_sparsity(99, era, 0.8) == 0.8


def test_sparsity_never_falls() -> None:
    era = Era(3, 7)
    values = [cubic_sparsity(step / 10, era, 0.9) for step in range(150)]
    assert values == sorted(values)
    assert values[0] == 0.0
    assert values[-1] == 0.9


def test_an_era_of_length_zero_is_a_step() -> None:
    assert [cubic_sparsity(epoch, Era(2, 0), 0.7) for epoch in (1, 2, 3)] == [0.0, 0.7, 0.7]


def test_phases_change_at_their_boundaries() -> None:
    assert [campfire_phase(e, Era(1, 2)) for e in range(5)] == ["dense", "era", "era", "frozen", "frozen"]
    stages = Stages(1, 3)
    assert [clicktrain_phase(e, stages) for e in range(4)] == ["warmup", "lasso", "lasso", "pruned"]


@pytest.mark.parametrize("epochs", range(1, 40))
def test_defaults_reach_the_final_sparsity_in_any_length_of_training(epochs: int) -> None:
    era, stages = make_era(epochs), make_stages(epochs)
    assert 0 <= era.start <= era.end <= epochs - 1
    assert 0 <= stages.warmup <= stages.hard <= epochs - 1


@pytest.mark.parametrize("epochs", range(1, 12))
def test_one_boundary_given_leaves_room_for_the_other(epochs: int) -> None:
    for value in range(epochs):
        assert make_era(epochs, start=value).end <= epochs - 1
        assert make_era(epochs, length=value).length == value
        assert make_stages(epochs, warmup=value).hard <= epochs - 1
        assert make_stages(epochs, hard=value).warmup <= value


def test_boundaries_beyond_the_training_are_refused() -> None:
    with pytest.raises(TrainerError, match="pruning era of epochs 4 to 10"):
        make_era(10, 4, 6)
    with pytest.raises(TrainerError, match="hard_epoch=10"):
        make_stages(10, 2, 10)
    with pytest.raises(TrainerError, match="warmup_epochs=5"):
        make_stages(10, 5, 3)
