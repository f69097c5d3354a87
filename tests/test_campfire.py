"""Campfire: masks follow Eq. 1, shrink only, and end at the choice exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.core.choices import Choice, Fine, parse_choice
from autoprune.sparsity.masks import make_mask, target_of
from autoprune.trainers.campfire import Campfire, CampfireSettings
from autoprune.trainers.method import Clock, PrunedLayer
from autoprune.trainers.projection import Rule, target_at
from autoprune.trainers.schedule import Era, TrainerError, cubic_sparsity

KINDS = [
    "pattern(count=4,entries=4,kernels=0.5,share=1x1)",
    "pattern(count=8,entries=4,kernels=0.3,share=16x1)",
    "block(keep=0.25,filters=16)",
    "fine(keep=0.2)",
    "ck(keep=0.4)",
    "window(entries=2)",
    "combined(keep=0.25,fraction=0.8)",
]
STEPS = 2


def layer_of(choice: Choice, shape: tuple[int, ...] = (48, 12, 3, 3)) -> PrunedLayer:
    return PrunedLayer("layer", nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))), choice)


def drive(layer: PrunedLayer, epochs: int, noise: float = 0.3, **settings: object) -> list[float]:
    """Run a training whose steps are noise; return the sparsity after every step."""
    method = Campfire([layer], Clock(STEPS, epochs), settings)
    generator = torch.Generator().manual_seed(1)
    sparsity, before = [], None
    for step in range(STEPS * epochs):
        layer.parameter.data += noise * torch.randn(layer.parameter.shape, generator=generator)
        method.after_step(step)
        if layer.mask is not None:
            layer.parameter.data *= layer.mask
            assert before is None or not (layer.mask & ~before).any(), "a removed weight returned"
            before = layer.mask
        sparsity.append(0.0 if layer.mask is None else 1.0 - float(layer.mask.double().mean()))
    return sparsity


@pytest.mark.parametrize("balance", ["layer", "filter"])
@pytest.mark.parametrize("inter_epoch", [False, True])
@pytest.mark.parametrize("text", KINDS)
def test_the_last_mask_has_exactly_the_choices_count(text: str, inter_epoch: bool, balance: str) -> None:
    layer = layer_of(parse_choice(text))
    sparsity = drive(layer, 16, era_start=2, era_length=12, inter_epoch=inter_epoch, balance=balance)
    wanted = make_mask(layer.parameter, layer.choice, balance=balance)  # type: ignore[arg-type]
    assert layer.mask is not None
    assert int(layer.mask.sum()) == int(wanted.sum())
    assert sparsity == sorted(sparsity)
    assert sparsity[2 * STEPS + 1] == 0.0


@pytest.mark.parametrize("text", KINDS)
def test_sparsity_follows_the_schedule_on_the_way(text: str) -> None:
    layer = layer_of(parse_choice(text), (64, 32, 3, 3))
    final = drive(layer, 16, era_start=2, era_length=12)
    layer = layer_of(parse_choice(text), (64, 32, 3, 3))
    sparsity = drive(layer, 16, era_start=2, era_length=12)
    # A window can only lose whole entries: one of nine is the coarsest step of any kind.
    for step, value in enumerate(sparsity):
        wanted = cubic_sparsity(step // STEPS, Era(2, 12), final[-1])
        assert wanted - 1 / 9 < value <= wanted + 0.01


def test_masks_change_once_an_epoch_and_not_at_all_outside_the_era() -> None:
    sparsity = drive(layer_of(Fine(0.1)), 10, era_start=3, era_length=4)
    changes = [step for step in range(1, len(sparsity)) if sparsity[step] != sparsity[step - 1]]
    assert changes == [STEPS * epoch for epoch in (4, 5, 6, 7)]


@pytest.mark.parametrize("text", KINDS)
def test_recomputing_at_one_sparsity_would_change_nothing(text: str) -> None:
    layer = layer_of(parse_choice(text))
    method = Campfire([layer], Clock(1, 10), CampfireSettings(era_start=0, era_length=9))
    generator = torch.Generator().manual_seed(2)
    for step in range(10):
        layer.parameter.data += 0.2 * torch.randn(layer.parameter.shape, generator=generator)
        method.after_step(step)
        if layer.mask is None:
            continue
        layer.parameter.data *= layer.mask
        mask = layer.mask.clone()
        for _ in range(3):
            layer.parameter.data += 0.2 * torch.randn(layer.parameter.shape, generator=generator) * mask
            assert torch.equal(method.mask(layer), mask)


def test_living_zeros_outlast_removed_weights() -> None:
    layer = layer_of(Fine(0.25), (4, 4, 3, 3))
    layer.set_mask(torch.arange(144).reshape(4, 4, 3, 3) >= 100)
    layer.parameter.data.zero_()
    method = Campfire([layer], Clock(1, 2), CampfireSettings(era_start=0, era_length=0))
    assert method.after_step(0)
    assert layer.mask is not None
    assert layer.mask.flatten().nonzero().flatten().tolist() == list(range(100, 136))


@pytest.mark.parametrize("kernel_score", ["max", "sum"])
@pytest.mark.parametrize("text", ["ck(keep=0.25)", "combined(keep=0.25,fraction=0.8)"])
def test_living_zero_kernels_outlast_removed_ones(text: str, kernel_score: str) -> None:
    layer = layer_of(parse_choice(text), (8, 8, 3, 3))
    layer.set_mask((torch.arange(64).reshape(8, 8, 1, 1) >= 20).expand(8, 8, 3, 3).contiguous())
    layer.parameter.data.zero_()
    method = Campfire([layer], Clock(1, 2), {"era_start": 0, "era_length": 0, "kernel_score": kernel_score})
    assert method.after_step(0)
    assert layer.mask is not None
    assert int(layer.mask.sum()) == int(make_mask(layer.parameter, layer.choice).sum())


def test_step_schedule_grows_inside_an_epoch_and_every_thins_it_out() -> None:
    layer = layer_of(Fine(0.1))
    fine = drive(layer, 10, era_start=2, era_length=6, schedule="step")
    assert fine[2 * STEPS + 1] > fine[2 * STEPS]
    thin = drive(layer_of(Fine(0.1)), 10, era_start=2, era_length=6, schedule="step", every=4)
    assert len(set(thin)) < len(set(fine))
    assert thin[-1] == fine[-1]


def test_inter_epoch_removes_kernels_first_and_entries_second() -> None:
    choice = parse_choice("combined(keep=0.25,fraction=0.8)")
    weight = torch.zeros(16, 16, 3, 3)
    half = target_at(weight, choice, 0.5, Rule(inter_epoch=True))
    assert half.units == target_of(weight, choice).units
    assert half.entries == 9
    assert target_at(weight, choice, 0.25, Rule(inter_epoch=True)).units > half.units


@pytest.mark.parametrize("text", KINDS)
def test_no_target_ever_falls_below_the_choices_own(text: str) -> None:
    weight, choice = torch.zeros(33, 10, 3, 3), parse_choice(text)
    final = target_of(weight, choice)
    for percent in range(101):
        partial = target_at(weight, choice, percent / 100)
        assert partial.units >= final.units
        assert partial.entries >= final.entries
    assert target_at(weight, choice, 1.0) == final


def test_every_output_of_a_linear_layer_keeps_a_weight_all_the_way() -> None:
    layer = layer_of(Fine(0.05), (40, 30))
    layer.parameter.data[7] *= 1e-6
    method = Campfire([layer], Clock(1, 12), {"era_start": 1, "era_length": 9})
    generator = torch.Generator().manual_seed(3)
    for step in range(12):
        layer.parameter.data += 0.1 * torch.randn(layer.parameter.shape, generator=generator)
        method.after_step(step)
        if layer.mask is not None:
            layer.parameter.data *= layer.mask
            assert layer.mask.any(1).all()
    assert layer.mask is not None
    assert int(layer.mask.sum()) == 60


def test_settings_are_checked() -> None:
    with pytest.raises(TrainerError, match="schedule='batch'"):
        CampfireSettings(schedule="batch")  # type: ignore[arg-type]
    with pytest.raises(TrainerError, match="every=0"):
        CampfireSettings(every=0)
    with pytest.raises(TrainerError, match="pruning era"):
        Campfire([], Clock(1, 10), {"era_start": 9, "era_length": 5})
