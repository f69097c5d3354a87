"""The equations of deep rewiring, NeST and structured sparsity learning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.core.choices import parse_choice
from autoprune.trainers.method import METHODS, Clock, PrunedLayer
from autoprune.trainers.methods import MODULES

assert MODULES, "importing them is what registers the methods"


def test_deep_rewiring_lets_what_crosses_zero_die_and_as_many_be_born_at_zero() -> None:
    weight = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    layer = PrunedLayer("layer", weight, parse_choice("fine(keep=0.25)"))
    trainer = METHODS.get("deepr")([layer], Clock(10, 4), None)
    trainer.after_step(0)
    first = layer.mask
    assert first is not None
    weight.data *= first
    old = weight.detach().clone()
    crossing = first & (torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    weight.data[crossing] *= -0.1
    trainer.after_step(1)
    assert layer.mask is not None
    assert layer.mask.sum() == first.sum()
    born = layer.mask & ~(first & ~crossing)
    assert not weight[born].any()
    assert torch.equal(weight[first & ~crossing], old[first & ~crossing])
    assert (layer.mask & ~first).any(), "nothing was born elsewhere"
    trainer.after_step(2)
    assert (layer.mask & born).sum() == born.sum(), "a newborn at zero crossed nothing"


def test_deep_rewiring_pulls_by_its_l1_and_shakes_by_its_noise() -> None:
    weight = nn.Parameter(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    layer = PrunedLayer("layer", weight, parse_choice("fine(keep=0.25)"))
    trainer = METHODS.get("deepr")([layer], Clock(10, 4), {"l1": 0.5, "noise": 0.1})
    weight.grad = torch.zeros_like(weight)
    trainer.before_step(0, 4.0)
    noise = weight.grad / 4 - 0.5 * weight.detach().sign()
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)


def test_nest_grows_where_the_gradient_is_largest_and_prunes_to_the_policy() -> None:
    weight = nn.Parameter(torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    layer = PrunedLayer("layer", weight, parse_choice("fine(keep=0.25)"))
    trainer = METHODS.get("nest")([layer], Clock(10, 4), {"every": 2, "seed_share": 0.5, "peak": 2.0})
    counts = []
    generator = torch.Generator().manual_seed(1)
    for number in range(40):
        weight.grad = torch.randn(weight.shape, generator=generator)
        before = layer.mask
        trainer.before_step(number, 1.0)
        trainer.after_step(number)
        assert layer.mask is not None
        counts.append(int(layer.mask.sum()))
        if before is not None and counts[-1] > counts[-2]:
            grown, left = layer.mask & ~before, ~layer.mask
            assert weight.grad.abs()[grown].min() >= weight.grad.abs()[left].max()
        if before is not None and counts[-1] < counts[-2]:
            gone = before & ~layer.mask
            assert weight.detach().abs()[gone].max() <= weight.detach().abs()[layer.mask].min()
        weight.data *= layer.mask
        weight.data += 0.01 * torch.randn(weight.shape, generator=generator) * layer.mask
    assert counts[0] == 72
    assert max(counts) > 240
    assert counts[-1] == 144
    assert counts[:12] == sorted(counts[:12])
    assert trainer.finished()
    assert trainer.scoring_passes == pytest.approx(5 / 3)


@pytest.mark.parametrize("text", ["channels(keep=0.5)", "block(keep=0.5,filters=16)", "ck(keep=0.5)"])
def test_structured_sparsity_learning_pulls_whole_structures_until_it_prunes(text: str) -> None:
    weight = nn.Parameter(torch.randn(16, 6, 3, 3, generator=torch.Generator().manual_seed(0)))
    layer = PrunedLayer("layer", weight, parse_choice(text))
    trainer = METHODS.get("ssl")([layer], Clock(2, 4), {"prune_epoch": 1, "lasso": 0.1, "finetune_lr": 0.1})
    weight.grad = torch.zeros_like(weight)
    trainer.before_step(0, 1.0)
    axes = {"channels": [(1, 2, 3), (0, 2, 3)], "block": [(0,)], "ck": [(2, 3)]}[text.split("(")[0]]
    norms = sum(weight.detach().square().sum(axis, keepdim=True).sqrt() for axis in axes)
    want = sum(0.1 * weight.detach() / weight.detach().square().sum(axis, keepdim=True).sqrt() for axis in axes)
    assert isinstance(norms, Tensor)
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-5)
    trainer.after_step(1)
    assert layer.mask is None
    trainer.after_step(2)
    assert trainer.finished()
    weight.grad = torch.zeros_like(weight)
    trainer.before_step(3, 1.0)
    assert not weight.grad.any()
    assert [(restart.epoch, restart.scale) for restart in trainer.restarts] == [(1, 0.1)]
