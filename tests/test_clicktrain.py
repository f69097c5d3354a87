"""ClickTrain: importance, plan and penalty are the paper's formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.core.choices import Block, Choice, Combined, Fine, Pattern, Window, parse_choice
from autoprune.sparsity.masks import make_mask
from autoprune.trainers.clicktrain import ClickTrain, ClickTrainSettings, penalty_terms, plan_layer
from autoprune.trainers.method import Clock, PrunedLayer
from autoprune.trainers.penalty import GroupLasso, Term
from autoprune.trainers.schedule import TrainerError

KINDS = [
    "pattern(count=4,entries=4,kernels=0.5,share=1x1)",
    "pattern(count=8,entries=4,kernels=0.5,share=16x1)",
    "block(keep=0.5,filters=16)",
    "fine(keep=0.2)",
    "ck(keep=0.5)",
    "window(entries=2)",
    "combined(keep=0.25,fraction=0.8)",
]


def layer_of(choice: Choice, shape: tuple[int, ...] = (33, 6, 3, 3), seed: int = 0) -> PrunedLayer:
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    parameter.grad = torch.randn(shape, generator=generator)
    return PrunedLayer("layer", parameter, choice)


def method_of(layers: list[PrunedLayer], steps: int = 4, epochs: int = 4, **settings: object) -> ClickTrain:
    return ClickTrain(layers, Clock(steps, epochs), settings)


@pytest.mark.parametrize("text", KINDS)
def test_plan_is_the_choices_mask_of_the_importance(text: str) -> None:
    layer = layer_of(parse_choice(text))
    importance = (layer.parameter.detach() * layer.parameter.grad).square()  # type: ignore[operator]
    plan = plan_layer(importance, layer, "patdnn", "layer")
    assert torch.equal(plan.mask, make_mask(layer.parameter, layer.choice, importance))


@pytest.mark.parametrize("text", KINDS)
def test_penalty_gradient_equals_autograd(text: str) -> None:
    layer = layer_of(parse_choice(text))
    other = layer_of(Fine(0.3), (12, 7), seed=1)
    terms = []
    for item in (layer, other):
        plan = plan_layer((item.parameter.detach() * item.parameter.grad).square(), item, "dynamic", "layer")  # type: ignore[operator]
        terms += penalty_terms(item, plan)
    penalty = GroupLasso(terms, strength=0.37)
    penalty.value().backward()
    wanted = [item.parameter.grad for item in (layer, other)]
    before = [layer_of(layer.choice).parameter.grad, layer_of(Fine(0.3), (12, 7), seed=1).parameter.grad]
    for item, grad in zip((layer, other), before, strict=True):
        item.parameter.grad = grad.clone()  # type: ignore[union-attr]
    penalty.add_gradients()
    for item, grad in zip((layer, other), wanted, strict=True):
        torch.testing.assert_close(item.parameter.grad, grad, rtol=1e-5, atol=1e-6)


def test_penalty_of_a_pattern_is_the_sum_over_kernels_of_both_norms() -> None:
    layer = layer_of(Pattern(4, 4, 0.5, (1, 1)), (5, 4, 3, 3))
    plan = plan_layer(layer.parameter.detach().square(), layer, "generic", "layer")
    assert plan.outside is not None
    total = 0.0
    for k in range(5):
        for c in range(4):
            kernel = layer.parameter.detach()[k, c]
            outside = kernel[plan.outside[k, c]]
            assert outside.numel() == 5
            total += float((outside.square().sum() + 1e-8).sqrt())
            removed = not plan.mask[k, c].any()
            total += float((kernel.square().sum() * removed + 1e-8).sqrt())
    assert GroupLasso(penalty_terms(layer, plan), 2.5e-4).value().item() == pytest.approx(2.5e-4 * total, rel=1e-5)


def test_penalty_of_a_block_is_one_norm_per_removed_block_with_a_short_end() -> None:
    layer = layer_of(Block(0.5, 16))
    plan = plan_layer(layer.parameter.detach().square(), layer, "patdnn", "layer")
    total = 0.0
    for filters, kept in zip(layer.parameter.detach().split(16), plan.mask.split(16), strict=True):
        for column, alive in zip(filters.flatten(1).T, kept.flatten(1)[0], strict=True):
            total += 1e-4 if alive else float((column.square().sum() + 1e-8).sqrt())
    assert GroupLasso(penalty_terms(layer, plan), 1.0).value().item() == pytest.approx(total, rel=1e-5)


def test_penalty_leaves_what_stays_alone_and_scales_with_the_loss() -> None:
    layer = layer_of(Combined(0.25, 0.8))
    plan = plan_layer(layer.parameter.detach().square(), layer, "patdnn", "layer")
    penalty = GroupLasso(penalty_terms(layer, plan), 0.1)
    layer.parameter.grad = torch.zeros_like(layer.parameter)
    penalty.add_gradients(scale=8.0)
    scaled = layer.parameter.grad.clone()
    assert not scaled[plan.mask].any()
    assert bool((scaled[~plan.mask] != 0).all())
    layer.parameter.grad.zero_()
    penalty.add_gradients()
    torch.testing.assert_close(scaled, layer.parameter.grad * 8.0)


def test_penalty_skips_a_parameter_without_gradient() -> None:
    frozen = layer_of(Window(2))
    frozen.parameter.grad = None
    GroupLasso([Term(frozen.parameter, torch.ones_like(frozen.parameter, dtype=torch.bool))], 1.0).add_gradients()
    assert frozen.parameter.grad is None


def drive(method: ClickTrain, layer: PrunedLayer, steps: int) -> list[bool]:
    changed = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        layer.parameter.grad = torch.randn(layer.parameter.shape, generator=generator)
        method.before_step(step, 1.0)
        changed.append(method.after_step(step))
    return changed


@pytest.mark.parametrize("batches", [1, 3])
def test_importance_is_summed_over_the_first_batches_after_the_warm_up(batches: int) -> None:
    layer = layer_of(Fine(0.2))
    changed = drive(method_of([layer], warmup_epochs=1, hard_epoch=3, batches=batches, lasso=0.0), layer, 16)
    importance = torch.zeros_like(layer.parameter)
    for step in range(4, 4 + batches):
        gradient = torch.randn(layer.parameter.shape, generator=torch.Generator().manual_seed(step))
        importance += (gradient * layer.parameter.detach()).square()
    assert changed.index(True) == 12
    assert sum(changed) == 1
    assert layer.mask is not None
    assert torch.equal(layer.mask, make_mask(layer.parameter, layer.choice, importance))


def test_importance_does_not_depend_on_the_loss_scale_of_a_batch() -> None:
    layer, scaled = layer_of(Fine(0.2)), layer_of(Fine(0.2))
    for item, scales in ((layer, (1.0, 1.0)), (scaled, (2.0, 1024.0))):
        method = method_of([item], warmup_epochs=0, hard_epoch=0, batches=2)
        for step, scale in enumerate(scales):
            gradient = torch.randn(item.parameter.shape, generator=torch.Generator().manual_seed(step))
            item.parameter.grad = gradient * scale
            method.before_step(step, scale)
            method.after_step(step)
    assert layer.mask is not None
    assert scaled.mask is not None
    assert torch.equal(layer.mask, scaled.mask)


def test_nothing_touches_the_gradients_before_the_warm_up_ends_or_after_pruning() -> None:
    layer = layer_of(parse_choice(KINDS[0]))
    method = method_of([layer], warmup_epochs=1, hard_epoch=3, batches=1, lasso=0.5)
    touched = []
    for step in range(16):
        layer.parameter.grad = torch.zeros_like(layer.parameter)
        method.before_step(step, 1.0)
        touched.append(bool(layer.parameter.grad.any()))
        method.after_step(step)
    assert touched == [False] * 4 + [True] * 9 + [False] * 3


def test_lasso_shrinks_what_will_be_removed_only() -> None:
    layer = layer_of(Window(3))
    start: Tensor = layer.parameter.detach().clone()
    method = method_of([layer], warmup_epochs=0, hard_epoch=3, batches=1, lasso=0.1)
    optimizer = torch.optim.SGD([layer.parameter], lr=0.5)
    for step in range(12):
        layer.parameter.grad = torch.full_like(start, 1e-12)
        method.before_step(step, 1.0)
        optimizer.step()
    mask = method.plans["layer"].mask
    torch.testing.assert_close(layer.parameter.detach()[mask], start[mask])
    assert float(layer.parameter.detach()[~mask].abs().mean()) < 0.8 * float(start[~mask].abs().mean())


def test_a_frozen_layer_is_planned_by_its_magnitude() -> None:
    layer = layer_of(Fine(0.2))
    method = method_of([layer], warmup_epochs=0, hard_epoch=0, batches=1)
    layer.parameter.grad = None
    method.before_step(0, 1.0)
    assert method.after_step(0)
    assert layer.mask is not None
    assert torch.equal(layer.mask, make_mask(layer.parameter, layer.choice))


def test_filter_balance_gives_every_filter_the_same_count() -> None:
    layer = layer_of(parse_choice(KINDS[0]))
    layer.parameter.data[:8] *= 10
    drive(method_of([layer], warmup_epochs=0, hard_epoch=1, batches=1, balance="filter"), layer, 8)
    assert layer.mask is not None
    counts = layer.mask.flatten(1).sum(1)
    assert (counts == 3 * 4).all()


def test_more_batches_than_steps_are_refused() -> None:
    with pytest.raises(TrainerError, match="batches=5: only 4 steps"):
        method_of([layer_of(Fine(0.5))], warmup_epochs=3, batches=5)
    with pytest.raises(TrainerError, match="lasso=-1"):
        ClickTrainSettings(lasso=-1)
