"""The formulas of the methods against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from autoprune.core.choices import CK, Channels, Choice, Fine, Tile, Window, parse_choice
from autoprune.core.errors import UnknownName
from autoprune.sparsity.masks import make_mask
from autoprune.trainers.admm import ADMM
from autoprune.trainers.campfire import Campfire, window_entries
from autoprune.trainers.dynamic import DSR, SET, RigL, exchange, moved_fraction, shares
from autoprune.trainers.lottery import Lottery
from autoprune.trainers.magnitude import AGP, Magnitude, prune_epochs
from autoprune.trainers.method import Clock, PrunedLayer, Restart, Subject
from autoprune.trainers.nm import NMTraining
from autoprune.trainers.penalty import Decay, GroupLasso, Pull, Term
from autoprune.trainers.presets import PRESETS
from autoprune.trainers.projection import Rule, target_at
from autoprune.trainers.prunetrain import PruneTrain, lasso_strength
from autoprune.trainers.recipe import Recipe, mix, rate_factor, segment_factor
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.slimming import Slimming
from autoprune.trainers.snip import SNIP


def layer_of(values: list[float] | Tensor, choice: Choice, shape: tuple[int, ...] | None = None) -> PrunedLayer:
    weight = torch.as_tensor(values)
    return PrunedLayer("layer", nn.Parameter(weight.reshape(shape or weight.shape).clone()), choice)


def test_sr_ste_updates_the_whole_weight_by_the_refined_gradient() -> None:
    layer = layer_of([[1.0, -2.0, 0.5, 3.0]], parse_choice("nm(n=2,m=4)"))
    method = NMTraining([layer], Clock(10, 1), {"decay": 0.1})
    optimizer = torch.optim.SGD([layer.parameter], lr=0.5)
    assert method.after_step(0)
    assert layer.mask is not None
    assert layer.mask.tolist() == [[False, True, False, True]]
    layer.parameter.data *= layer.mask
    layer.parameter.grad = torch.tensor([[0.2, 0.2, -4.0, 0.2]])
    method.before_step(1, 1.0)
    optimizer.step()
    # w − lr·(g + decay·(1 − m)·w), on the dense weights: 0.5 − 0.5·(−4 + 0.05) = 2.475 outgrows −2.1.
    torch.testing.assert_close(layer.parameter.detach(), torch.tensor([[0.85, -2.1, 2.475, 2.9]]))
    method.after_step(1)
    assert layer.mask.tolist() == [[False, False, True, True]]


def test_sr_ste_scales_its_pull_with_the_loss_scale() -> None:
    layer = layer_of([[1.0, -2.0, 0.5, 3.0]], parse_choice("nm(n=2,m=4)"))
    method = NMTraining([layer], Clock(10, 1), {"decay": 0.1})
    method.after_step(0)
    layer.parameter.grad = torch.zeros(1, 4)
    method.before_step(1, 8.0)
    torch.testing.assert_close(layer.parameter.grad, torch.tensor([[0.8, 0.0, 0.4, 0.0]]))


def test_admm_follows_its_three_updates() -> None:
    layer = layer_of([4.0, 3.0, 2.0, 1.0], Fine(0.5), (1, 4))
    method = ADMM([layer], Clock(1, 4), {"warmup_epochs": 0, "hard_epoch": 3, "rho": 0.5})
    pulls = []
    for step, weight in enumerate(([4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 3.0, 1.0])):
        layer.parameter.data = torch.tensor([weight])
        layer.parameter.grad = torch.zeros(1, 4)
        method.before_step(step, 1.0)
        pulls.append(layer.parameter.grad.clone())
        method.after_step(step)
    # Z = Π(W) = (4, 3, 0, 0), U = 0: ρ(W − Z + U).
    torch.testing.assert_close(pulls[0], torch.tensor([[0.0, 0.0, 1.0, 0.5]]))
    # Z = Π(W + 0) = (4, 0, 3, 0), U = W − Z = (0, 2, 0, 1): ρ(W − Z + U).
    torch.testing.assert_close(pulls[1], torch.tensor([[0.0, 2.0, 0.0, 1.0]]))
    method.before_step(2, 1.0)
    # Now W + U = (4, 4, 3, 2): Z = (4, 4, 0, 0), U = (0, 0, 3, 2).
    torch.testing.assert_close(method.duals["layer"], torch.tensor([[0.0, 0.0, 3.0, 2.0]]))


@pytest.mark.parametrize(
    "text",
    ["pattern(count=8,entries=4,kernels=0.5,share=4x2)", "nm(n=2,m=4)", "channels(keep=0.5)", "block(keep=0.5)"],
)
def test_admm_projects_onto_any_choice_and_loses_the_least(text: str) -> None:
    choice = parse_choice(text)
    layer = layer_of(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)), choice)
    method = ADMM([layer], Clock(1, 4), {"warmup_epochs": 0, "hard_epoch": 3})
    method.before_step(0, 1.0)
    kept = method.anchors["layer"] != 0
    other = make_mask(layer.parameter, choice, torch.rand(layer.parameter.shape))
    weight = layer.parameter.detach()
    assert float((weight * ~kept).square().sum()) <= float((weight * ~other).square().sum())
    torch.testing.assert_close(method.anchors["layer"], weight * kept)


def test_lottery_rewinds_every_parameter_buffer_and_the_optimizer_to_its_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    layer = PrunedLayer("0", net[0].weight, Fine(0.5))  # type: ignore[arg-type]
    method = Lottery([layer], Clock(4, 6), {"rewind_step": 2, "rounds": 2})
    method.bind(Subject(net, optimizer))
    densities = []
    for step in range(24):
        if step == 2:
            start = {name: value.clone() for name, value in net.state_dict().items()}
        optimizer.zero_grad()
        net(torch.randn(5, 6)).square().sum().backward()
        method.before_step(step, 1.0)
        optimizer.step()
        if method.after_step(step):
            assert layer.mask is not None
            densities.append(float(layer.mask.float().mean()))
            assert not optimizer.state
            assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
    # Two rounds to one half: each leaves √0.5 of what was there.
    assert densities == pytest.approx([0.708, 0.5], abs=0.011)
    assert method.restarts == (Restart(2), Restart(4))
    assert [method.phase(epoch) for epoch in range(6)] == ["round 1"] * 2 + ["round 2"] * 2 + ["ticket"] * 2


def test_lottery_takes_a_fifth_of_the_survivors_each_round() -> None:
    layer = layer_of(torch.randn(40, 50, generator=torch.Generator().manual_seed(0)), Fine(0.5))
    method = Lottery([layer], Clock(1, 5), None)
    densities = []
    for step in range(5):
        if method.after_step(step):
            assert layer.mask is not None
            densities.append(float(layer.mask.float().mean()))
    assert densities == pytest.approx([0.8, 0.64, 0.512, 0.5], abs=1e-3)
    with pytest.raises(TrainerError, match="4 rounds and the ticket's training need 5 epochs, got 4"):
        Lottery([layer], Clock(1, 4), None)


def test_lottery_random_control_is_as_sparse_and_elsewhere() -> None:
    masks = []
    for ticket in ("magnitude", "random", "random"):
        layer = layer_of(torch.randn(40, 50, generator=torch.Generator().manual_seed(0)), Fine(0.5))
        method = Lottery([layer], Clock(1, 2), {"rounds": 1, "ticket": ticket})
        method.after_step(0)
        assert layer.mask is not None
        masks.append(layer.mask)
    assert masks[0].sum() == masks[1].sum() == 1000
    assert torch.equal(masks[1], masks[2])
    # Two independent halves agree on a quarter.
    assert float((masks[0] & masks[1]).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_moved_fraction_falls_by_half_a_cosine() -> None:
    assert moved_fraction(0, 100, 0.3) == pytest.approx(0.3)
    assert moved_fraction(50, 100, 0.3) == pytest.approx(0.15)
    assert moved_fraction(75, 100, 0.3) == pytest.approx(0.15 * (1 - math.sqrt(0.5)))
    assert moved_fraction(100, 100, 0.3) == 0.0


def test_an_exchange_drops_the_smallest_and_grows_the_best() -> None:
    alive = torch.tensor([True, True, True, True, False, False])
    worth = torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0, 0.0])
    growth = torch.tensor([0.0, 5.0, 0.0, 1.0, 2.0, 9.0])
    kept = exchange(alive, worth, growth, drop=2, count=4)
    # 1 and 3 go; of what is dead then, 5 (growth 9) and 1 again (growth 5) come.
    assert kept.tolist() == [True, True, True, False, False, True]


def test_rigl_grows_where_the_whole_gradient_is_largest() -> None:
    layer = layer_of(torch.arange(1.0, 21.0), Fine(0.5), (4, 5))
    method = RigL([layer], Clock(100, 1), {"every": 2, "fraction": 0.4})
    method.after_step(0)
    assert layer.mask is not None
    layer.set_mask(torch.arange(20).reshape(4, 5) >= 10)
    layer.parameter.data *= layer.mask
    gradient = torch.zeros(4, 5)
    gradient[0, :3] = torch.tensor([3.0, -9.0, 5.0])
    layer.parameter.grad = gradient
    for step in (1, 2):
        method.before_step(step, 1.0)
        method.after_step(step)
    # α(2) of 10 units is 3.98: three go (11, 12, 13 are smallest), three come (gradients 3, −9, 5).
    assert layer.mask.flatten().nonzero().flatten().tolist() == [0, 1, 2, 13, 14, 15, 16, 17, 18, 19]


def test_dynamic_masks_are_frozen_at_three_quarters() -> None:
    layer = layer_of(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), Fine(0.25))
    method = SET([layer], Clock(10, 4), {"every": 3})
    moved = []
    for step in range(40):
        before = layer.mask
        method.after_step(step)
        if before is not None and layer.mask is not before:
            moved.append(step)
        layer.parameter.data = layer.parameter.data * layer.mask + 0.01 * torch.randn(16, 16)
    assert moved == list(range(3, 30, 3))
    assert method.finished()
    assert [method.phase(epoch) for epoch in range(4)] == ["dynamic", "dynamic", "dynamic", "frozen"]


@pytest.mark.parametrize("split", ["policy", "learned"])
def test_dsr_moves_density_to_the_layers_that_survive_and_keeps_the_total(split: str) -> None:
    strong, weak = (layer_of(torch.ones(10, 20) * size, Fine(0.5)) for size in (5.0, 1.0))
    strong.name, weak.name = "strong", "weak"
    method = DSR([strong, weak], Clock(20, 1), {"every": 1, "split": split})
    most = 0
    for step in range(20):
        method.after_step(step)
        assert strong.mask is not None
        assert weak.mask is not None
        assert int(strong.mask.sum() + weak.mask.sum()) == 200
        most = max(most, int(strong.mask.sum()))
    assert most > 110
    assert (int(strong.mask.sum()) == 100) == (split == "policy")


def test_shares_are_proportional_and_respect_room() -> None:
    assert shares(10, [3, 1, 1], [100, 100, 100]) == [6, 2, 2]
    assert shares(10, [8, 1, 1], [2, 100, 100]) == [2, 4, 4]
    assert shares(7, [1, 1, 1], [5, 1, 1]) == [5, 1, 1]


def test_agp_follows_the_cubic_schedule_every_few_steps() -> None:
    layer = layer_of(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)), Fine(0.2))
    method = AGP([layer], Clock(10, 4), {"era_start": 1, "era_length": 2, "every": 5})
    sparsity = []
    for step in range(40):
        method.after_step(step)
        sparsity.append(0.0 if layer.mask is None else 1.0 - float(layer.mask.float().mean()))
    assert sparsity[10] == 0.0
    assert sparsity[15] == sparsity[19] == pytest.approx(0.8 * (1 - 0.75**3), abs=1e-4)
    assert sparsity[20] == pytest.approx(0.8 * (1 - 0.5**3), abs=1e-4)
    assert sparsity[30] == sparsity[39] == pytest.approx(0.8)


def test_iterative_magnitude_raises_the_target_each_round() -> None:
    layer = layer_of(torch.randn(100, 10, generator=torch.Generator().manual_seed(0)), Fine(0.1))
    method = Magnitude([layer], Clock(1, 10), {"prune_epoch": 3, "rounds": 3, "round_epochs": 2})
    sparsity = []
    for step in range(10):
        method.after_step(step)
        sparsity.append(0.0 if layer.mask is None else round(1.0 - float(layer.mask.float().mean()), 3))
    assert sparsity == [0, 0, 0, 0.3, 0.3, 0.6, 0.6, 0.9, 0.9, 0.9]
    assert method.restarts == (Restart(7, 0.1),)
    assert [method.phase(e) for e in (0, 3, 6, 7)] == ["dense", "rounds", "rounds", "retrain"]
    assert prune_epochs("m", 10, None, 1, None) == (6,)
    with pytest.raises(TrainerError, match="pruning at epochs 8 to 12"):
        Magnitude([], Clock(1, 10), {"prune_epoch": 8, "rounds": 3, "round_epochs": 2})


def test_snip_ranks_by_connection_sensitivity_of_the_first_weights() -> None:
    layer = layer_of([1.0, 2.0, 3.0, 4.0], Fine(0.5), (1, 4))
    optimizer = torch.optim.SGD([layer.parameter], lr=1.0, weight_decay=0.5)
    method = SNIP([layer], Clock(4, 1), {"batches": 2})
    method.bind(Subject(nn.Module(), optimizer))
    for step, gradient in enumerate(([5.0, 1.0, -1.0, 0.1], [0.0, -1.0, -1.0, 0.1])):
        layer.parameter.grad = torch.tensor([gradient])
        method.before_step(step, 1.0)
        optimizer.step()
        assert method.after_step(step) == (step == 1)
        # Nothing moved while scoring, weight decay included.
        assert layer.parameter.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert layer.mask is not None
    # Σ|g·w| = 5, 4, 6, 0.8.
    assert layer.mask.tolist() == [[True, False, True, False]]


def test_prunetrain_strength_makes_the_penalty_its_share_of_the_whole() -> None:
    strength = lasso_strength(0.2, 2.3, 70.0)
    assert strength * 70.0 / (2.3 + strength * 70.0) == pytest.approx(0.2)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    layer = PrunedLayer("0", net[0].weight, Channels(0.5))  # type: ignore[arg-type]
    method = PruneTrain([layer], Clock(1, 5), None)
    method.bind(Subject(net, optimizer))
    method.observe(torch.zeros(1, 2, 3, 3))
    layer.parameter.grad = torch.zeros_like(layer.parameter)
    method.before_step(0, 1.0)
    weight = layer.parameter.detach()
    norms = weight.flatten(1).norm(dim=1).sum() + weight.transpose(0, 1).flatten(1).norm(dim=1).sum()
    assert method.strength == pytest.approx(lasso_strength(0.2, math.log(4), float(norms)), rel=1e-4)
    by_filter = weight / weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    by_channel = weight / weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, 1, 1)
    torch.testing.assert_close(layer.parameter.grad, method.strength * (by_filter + by_channel), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["kernel", "filter", "channel"])
def test_group_lasso_of_every_grouping_equals_autograd(by: str) -> None:
    weight = nn.Parameter(torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    dims = {"kernel": (2, 3), "filter": (1, 2, 3), "channel": (0, 2, 3)}[by]
    (0.7 * (weight.square().sum(dims) + 1e-8).sqrt().sum()).backward()
    wanted, weight.grad = weight.grad, torch.zeros_like(weight)
    GroupLasso([Term(weight, torch.ones_like(weight, dtype=torch.bool), by=by)], 0.7).add_gradients()  # type: ignore[arg-type]
    torch.testing.assert_close(weight.grad, wanted)


def test_decay_and_pull_are_the_gradients_of_their_penalties() -> None:
    weight = nn.Parameter(torch.tensor([1.5, -2.0, 0.0]))
    weight.grad = torch.zeros(3)
    Decay([weight], 0.1, 0.01).add_gradients(2.0)
    torch.testing.assert_close(weight.grad, 2.0 * torch.tensor([0.115, -0.12, 0.0]))
    weight.grad = torch.zeros(3)
    Pull([(weight, torch.tensor([1.0, 1.0, 1.0]))], 0.5).add_gradients()
    torch.testing.assert_close(weight.grad, torch.tensor([0.25, -1.5, -0.5]))


def test_slimming_globally_moves_width_where_scales_are_large() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    with torch.no_grad():
        net[1].weight.copy_(torch.arange(8) / 10 + 2.0)
        net[3].weight.copy_(torch.arange(8) / 10)
    found = {}
    for scope in ("layer", "global"):
        layers = [PrunedLayer(name, net[int(name)].weight, Channels(0.5)) for name in ("0", "2")]  # type: ignore[arg-type]
        method = Slimming(layers, Clock(1, 2), {"prune_epoch": 0, "scope": scope})
        method.bind(Subject(net, torch.optim.SGD(net.parameters(), lr=0.1)))
        method.observe(torch.zeros(1, 1, 2, 2))
        assert method.after_step(0)
        found[scope] = [layer.mask.flatten(1).any(1).nonzero().flatten().tolist() for layer in layers]  # type: ignore[union-attr]
    assert found["layer"] == [[4, 5, 6, 7], [4, 5, 6, 7]]
    assert found["global"] == [[1, 2, 3, 4, 5, 6, 7], [7]]


def test_window_entries_follow_the_nominal_sparsity_and_the_maximum() -> None:
    assert [window_entries(s) for s in (0.2, 0.4, 0.6, 0.7, 0.8, 0.95)] == [7, 5, 3, 2, 1, 1]
    assert [window_entries(s, max_nonzero=2) for s in (0.2, 0.6, 0.8)] == [2, 2, 1]
    weight = torch.zeros(8, 8, 3, 3)
    limited = Rule(max_nonzero=2)
    assert [target_at(weight, Window(1), p, limited).entries for p in (0.0, 0.01, 0.9, 1.0)] == [9, 2, 2, 1]
    with pytest.raises(TrainerError, match="max_nonzero=2: layer 'layer' keeps more"):
        Campfire([layer_of(weight, Window(3))], Clock(1, 9), {"max_nonzero": 2})


def test_tiles_are_ranked_by_their_mean_over_real_weights() -> None:
    weight = torch.zeros(5, 6)
    weight[:4, :4] = 0.5
    weight[4:, :4] = 0.6  # a tile of four real weights
    weight[:4, 4:] = 0.4
    weight[4:, 4:] = 0.7
    assert make_mask(weight, Tile(0.5, 4)).any(1).tolist() == [False, False, False, False, True]
    assert make_mask(weight, Tile(0.75, 4)).sum() == 16 + 4 + 2


def test_partial_targets_of_groups_and_filters_never_fall_below_the_choice() -> None:
    weight = torch.zeros(32, 32)
    for choice in (parse_choice("nm(n=1,m=4)"), Channels(0.3), Tile(0.2, 3)):
        final = target_at(weight, choice, 1.0)
        targets = [target_at(weight, choice, percent / 100) for percent in range(101)]
        assert all(target.units >= final.units and target.entries >= final.entries for target in targets)
        counts = [target.units + target.entries for target in targets]
        assert counts == sorted(counts, reverse=True)


def test_learning_rates_of_every_schedule() -> None:
    steps = Recipe(epochs=10, schedule="steps", drops=(3, 6))
    wanted = [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [rate_factor(steps, step, 20) for step in (0, 5, 6, 11, 12, 19)] == pytest.approx(wanted)
    cosine = Recipe(schedule="cosine")
    assert [rate_factor(cosine, step, 11) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.2)
    cycle = torch.optim.lr_scheduler.OneCycleLR
    reference = cycle(optimizer, 0.2, total_steps=40, pct_start=0.25, cycle_momentum=False)
    recipe = Recipe(peak_lr=0.2, rise=0.25)
    for step in range(40):
        assert 0.2 * rate_factor(recipe, step, 40) == pytest.approx(reference.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        if step < 39:
            reference.step()
    restarted = Recipe(epochs=4, schedule="cosine")
    factors = [segment_factor(restarted, [(2, 0.1)], step, 5) for step in range(20)]
    assert factors[0] == 1.0
    assert factors[10] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(0.0)
    assert factors[19] == pytest.approx(0.0)


def test_presets_move_their_epochs_in_proportion() -> None:
    preset = PRESETS.get("clicktrain-cifar-resnet")
    short = preset.recipe.lasting(19)
    assert (short.epochs, short.drops, short.mixup_start) == (19, (6, 13), 14)
    assert preset.settings_for("clicktrain", 190)["hard_epoch"] == 141
    assert preset.settings_for("clicktrain", 19)["hard_epoch"] == 14
    assert preset.settings_for("campfire", 19) == {}
    long, base = (PRESETS.get(f"campfire-imagenet-v1.5-{epochs}") for epochs in (100, 90))
    assert long.recipe.drops == (*base.recipe.drops, 90)
    with pytest.raises(UnknownName, match="Did you mean 'clicktrain-imagenet'"):
        PRESETS.get("clicktrain-imagnet")


def test_mixed_images_keep_the_share_of_their_own_label() -> None:
    images = torch.arange(4.0).reshape(4, 1, 1, 1)
    mixed, partner, share = mix(images, 0.4, torch.Generator().manual_seed(0))
    assert 0.0 <= share <= 1.0
    assert sorted(partner.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner])
    again = mix(images, 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(mixed, again[0])


def test_a_kernel_choice_is_regrown_by_whole_kernels() -> None:
    layer = layer_of(torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)), CK(0.5))
    method = RigL([layer], Clock(50, 1), {"every": 1})
    for step in range(30):
        layer.parameter.grad = torch.randn(6, 5, 3, 3)
        method.before_step(step, 1.0)
        method.after_step(step)
        assert layer.mask is not None
        per_kernel = layer.mask.flatten(2).sum(-1)
        assert set(per_kernel.flatten().tolist()) == {0, 9}
        assert int((per_kernel > 0).sum()) == 15
