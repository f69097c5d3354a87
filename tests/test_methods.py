"""What every training method promises: the policy's masks exactly, its shares all the way, a resume without a trace."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.core.choices import Block, Channels, Choice, Fine, Pattern, Tile, parse_choice
from autoprune.sparsity.masks import group_mean, make_mask
from autoprune.sparsity.units import UNIT_KINDS, unit_values
from autoprune.trainers.dead_channels import eliminate_dead_channels
from autoprune.trainers.method import METHODS, Clock, PrunedLayer
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.session import Session, attach

CONV = [
    "fine(keep=0.3)",
    "block(keep=0.5,filters=16)",
    "pattern(count=4,entries=4,kernels=0.5,share=1x1)",
    "pattern(count=8,entries=4,kernels=0.5,share=16x1)",
    "pattern(count=4,entries=4,kernels=0.5,share=16x8)",
    "ck(keep=0.4)",
    "window(entries=2)",
    "combined(keep=0.25,fraction=0.8)",
    "nm(n=2,m=4)",
    "channels(keep=0.5)",
]
SETTINGS: dict[str, dict[str, object]] = {
    "clicktrain": {"batches": 2, "pool": "dynamic"},
    "campfire": {"inter_epoch": True},
    "agp": {"every": 2},
    "magnitude": {"rounds": 2, "prune_epoch": 2, "l1": 1e-3, "l2": 1e-3},
    "admm": {"rho": 0.05},
    "lottery": {"rounds": 2, "rewind_step": 2},
    "nm": {"freeze": 4},
    "snip": {"batches": 2},
    "ese": {"elements": 3},
    "set": {"every": 2},
    "rigl": {"every": 2},
    "dsr": {"every": 2},
    "slimming": {"l1": 1e-2},
    "prunetrain": {"interval": 2, "threshold": 0.09},
    "deepr": {"l1": 0.05, "noise": 0.02},
    "nest": {"every": 2},
    "ssl": {"prune_epoch": 2, "lasso": 1e-2},
}
STEPS, EPOCHS = 3, 6
PAIRS = [
    (name, text) for name, text in itertools.product(METHODS, CONV)
    if isinstance(parse_choice(text), METHODS.get(name).kinds)
]  # fmt: skip


class Net(nn.Module):
    """Two convolutions with a residual add around the second, and a perceptron of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 33, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(33)
        self.hidden = nn.Linear(33, 10)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = (self.norm2(self.second(x)) + x).relu()
        x = self.norm3(self.third(x)).relu()
        out: Tensor = self.fc(self.hidden(x.mean((2, 3))).relu())
        return out


def choices(method: str, text: str) -> dict[str, Choice]:
    choice = parse_choice(text)
    found: dict[str, Choice] = {"third": choice}
    if not isinstance(choice, Pattern) or choice.share[0] <= 16:
        found["second"] = choice
    if Tile in METHODS.get(method).kinds or METHODS.get(method).kinds == (Choice,):
        found["hidden"] = Tile(0.5, 4)
    return found


def start(method: str, text: str) -> tuple[Net, torch.optim.Optimizer, Session]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    session = attach(
        net, optimizer, choices(method, text), steps_per_epoch=STEPS, epochs=EPOCHS, method=method,
        settings=SETTINGS[method], example=torch.zeros(1, 1, 6, 6),
    )  # fmt: skip
    return net, optimizer, session


def step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(1000 + number)
    images = torch.randn(4, 1, 6, 6, generator=generator)
    labels = torch.randint(0, 4, (4,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()


def share_of(choice: Choice, weight: Tensor) -> tuple[int, int]:
    if isinstance(choice, Pattern):
        return choice.share
    if isinstance(choice, Block):
        return (choice.filters, 1)
    if isinstance(choice, Tile):
        return (choice.size, choice.size)
    return (1, weight.shape[1]) if isinstance(choice, Channels) else (1, 1)


def check_share(mask: Tensor, choice: Choice) -> None:
    """Every share group is masked alike; a filter of a channels choice is whole or gone."""
    mask_KCP = mask.float().reshape(mask.shape[0], mask.shape[1], -1)
    mean = group_mean(mask_KCP, share_of(choice, mask))
    assert ((mean == 0) | (mean == 1)).all(), choice.text
    if isinstance(choice, Channels):
        alive = mask.flatten(1).float().mean(1)
        assert ((alive == 0) | (alive == 1)).all()


def units(mask: Tensor, choice: Choice) -> int:
    """What a choice counts: units where they are equal, weights elsewhere."""
    return int((unit_values(mask, choice) > 0).sum()) if isinstance(choice, UNIT_KINDS) else int(mask.sum())


@pytest.mark.parametrize(("method", "text"), PAIRS)
def test_every_method_ends_at_the_exact_masks_and_keeps_shares_on_the_way(method: str, text: str) -> None:
    net, optimizer, session = start(method, text)
    wanted = choices(method, text)
    before: dict[str, Tensor] = {}
    for number in range(STEPS * EPOCHS):
        step(net, optimizer, number)
        for name, mask in session.masks.items():
            weight: Tensor = net.get_submodule(name).weight  # type: ignore[assignment]
            assert not weight[~mask].any()
            check_share(mask, wanted[name])
            old = before.get(name)
            if METHODS.get(method).monotone and old is not None and old.shape == mask.shape:
                assert not (mask & ~old).any(), "a removed weight returned"
            before[name] = mask.clone()
    report = session.finalize()
    assert report.finished
    for name, choice in wanted.items():
        weight = net.get_submodule(name).weight.detach()  # type: ignore[operator, union-attr, assignment]
        assert not weight[~session.masks[name]].any()
        if method != "ese":  # rounds up to whole weights in every element's part
            assert units(session.masks[name], choice) == units(make_mask(weight, choice), choice)
    assert torch.count_nonzero(net.first.weight) == net.first.weight.numel()
    assert torch.count_nonzero(net.fc.weight) == net.fc.weight.numel()


@pytest.mark.parametrize("stop", [2, 5, 8, 10, 14])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_training_resumed_in_the_middle_is_bit_identical(method: str, stop: int) -> None:
    text = "channels(keep=0.5)" if Channels in METHODS.get(method).kinds else CONV[0]
    unbroken, optimizer, session = start(method, text)
    for number in range(STEPS * EPOCHS):
        step(unbroken, optimizer, number)
    wanted = session.finalize()

    first, optimizer, session = start(method, text)
    for number in range(stop):
        step(first, optimizer, number)
    file = io.BytesIO()
    torch.save([session.state_dict(), first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    second, optimizer, session = start(method, text)
    for target, state in zip((session, second, optimizer), states, strict=True):
        target.load_state_dict(state)
    for number in range(stop, STEPS * EPOCHS):
        step(second, optimizer, number)
    assert session.finalize() == wanted
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@given(
    method=st.sampled_from([name for name in METHODS if METHODS.get(name).kinds == (Choice,)]),
    share=st.sampled_from([(16, 1), (64, 8), (1, 1), (8, 3)]),
    shape=st.tuples(st.integers(64, 70), st.integers(8, 11)),
    kernels=st.sampled_from([0.25, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25)
def test_pattern_shares_hold_for_every_method_and_any_shape(
    method: str, share: tuple[int, int], shape: tuple[int, int], kernels: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(*shape, 3, 3, generator=generator))
    layer = PrunedLayer("layer", weight, Pattern(4, 4, kernels, share))
    given_settings = {**SETTINGS[method], **({"freeze": 3} if method == "nm" else {})}
    if method == "lottery":
        given_settings["rewind_step"] = 1
    trainer = METHODS.get(method)([layer], Clock(2, 4), given_settings)
    for number in range(8):
        weight.grad = torch.randn(weight.shape, generator=generator)
        trainer.before_step(number, 1.0)
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
        trainer.after_step(number)
        if layer.mask is not None:
            weight.data *= layer.mask
            check_share(layer.mask, layer.choice)
    assert trainer.finished()
    assert layer.mask is not None
    assert layer.mask.any()


@pytest.mark.parametrize(
    ("method", "text"),
    [("ese", "window(entries=2)"), ("slimming", "fine(keep=0.5)"), ("rigl", CONV[2]), ("prunetrain", "ck(keep=0.5)")],
)
def test_a_choice_that_a_method_cannot_execute_is_refused_by_one_line(method: str, text: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TrainerError, match=f"trainer '{method}' cannot execute .* of layer 'second'"):
        attach(net, optimizer, {"second": parse_choice(text)}, steps_per_epoch=1, epochs=9, method=method)


@pytest.mark.parametrize("method", ["slimming", "prunetrain"])
def test_a_method_that_must_see_the_model_learns_it_from_the_first_batch(method: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    session = attach(
        net, optimizer, {"third": Channels(0.5)}, steps_per_epoch=STEPS, epochs=2, method=method
    )
    for number in range(2 * STEPS):
        step(net, optimizer, number)
    assert session.finalize().finished
    alive = net.third.weight.flatten(1).any(1)
    assert int(alive.sum()) == Channels(0.5).width(33)
    # Nothing of a dead channel is left: neither scale nor shift nor bias.
    assert not any(vector[~alive].any() for vector in (net.norm3.weight, net.norm3.bias, net.third.bias))


@pytest.mark.parametrize("method", ["slimming", "prunetrain"])
def test_dead_channels_of_channel_methods_leave_the_trained_network_losslessly(method: str) -> None:
    net, optimizer, session = start(method, "channels(keep=0.5)")
    for number in range(STEPS * EPOCHS):
        step(net, optimizer, number)
    session.finalize()
    smaller, eliminated = eliminate_dead_channels(net)
    assert [(found.layer, len(found.channels)) for found in eliminated] == [("third", 33 - Channels(0.5).width(33))]
    images = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(smaller(images), net.eval()(images), rtol=1e-4, atol=1e-5)


def test_prunetrain_takes_channels_out_while_it_trains_and_gives_the_shapes_back() -> None:
    net, optimizer, session = start("prunetrain", "channels(keep=0.5)")
    outputs = {}
    for number in range(STEPS * EPOCHS):
        step(net, optimizer, number)
        outputs[number] = net.third.out_channels
    assert outputs[0] == 33
    assert outputs[STEPS * EPOCHS - 1] == net.hidden.in_features == net.norm3.num_features == Channels(0.5).width(33)
    # The residual add around `second` needs every channel that `first` writes.
    assert net.second.weight.shape == (16, 16, 3, 3)
    assert all(p.shape == optimizer.state[p]["momentum_buffer"].shape for p in net.parameters())
    images = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net.eval()(images)
        assert session.finalize().finished
        torch.testing.assert_close(net(images), before, rtol=1e-4, atol=1e-5)
    assert net.third.weight.shape == (33, 16, 3, 3)
    wrapped = nn.DataParallel(net)
    with pytest.raises(TrainerError, match="data-parallel wrapper does not follow"):
        attach(wrapped, optimizer, {"third": Channels(0.5)}, steps_per_epoch=1, epochs=2, method="prunetrain")


def test_rigl_pays_for_its_dense_gradients_in_the_macs_it_saved() -> None:
    saved = {}
    for method in ("rigl", "set"):
        net, optimizer, session = start(method, "ck(keep=0.4)")
        for number in range(STEPS * EPOCHS):
            step(net, optimizer, number)
        report = session.finalize()
        assert report.training_macs_saved is not None
        saved[method] = (report.scoring_passes, report.training_macs_saved)
    # 18 steps, exchanges at 2, 4, …, 12: a third of a dense pass each.
    assert saved["rigl"][0] == pytest.approx(6 / 3)
    assert saved["set"][1] - saved["rigl"][1] == pytest.approx(2 / 18, abs=1e-3)


def test_names_and_settings_of_the_registry_agree() -> None:
    assert set(METHODS) == set(SETTINGS)
    for name in METHODS:
        assert METHODS.get(name).name == name
        METHODS.get(name)([], Clock(1000, 12), None)


def test_fine_densities_are_the_policys_for_ese_in_every_part() -> None:
    weight = nn.Parameter(torch.randn(10, 12, generator=torch.Generator().manual_seed(0)))
    layer = PrunedLayer("layer", weight, Fine(0.25))
    trainer = METHODS.get("ese")([layer], Clock(1, 2), {"elements": 4, "era_start": 0, "era_length": 0})
    trainer.after_step(0)
    assert layer.mask is not None
    assert [int(layer.mask[first::4].sum()) for first in range(4)] == [9, 9, 6, 6]
