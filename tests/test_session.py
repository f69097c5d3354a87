"""Any loop, any optimizer: removed weights stay exactly zero, and an interrupted training ends as an unbroken one."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice, Fine, parse_choice
from autoprune.core.errors import PolicyError, UnknownName
from autoprune.core.policy import Policy
from autoprune.search_spaces.trace import trace
from autoprune.trainers.method import METHODS, parse_settings
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.session import Session, attach

CHOICES = {
    "pattern": "pattern(count=4,entries=4,kernels=0.5,share=1x1)",
    "shared": "pattern(count=8,entries=4,kernels=0.5,share=16x1)",
    "block": "block(keep=0.5,filters=16)",
    "fine": "fine(keep=0.2)",
    "ck": "ck(keep=0.5)",
    "window": "window(entries=2)",
    "combined": "combined(keep=0.25,fraction=0.8)",
    "nm": "nm(n=2,m=4)",
    "channels": "channels(keep=0.5)",
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}
STEPS, EPOCHS = 3, 6
GENERAL = [name for name in METHODS if METHODS.get(name).kinds == (Choice,)]
SETTINGS: dict[str, dict[str, object]] = {
    "lottery": {"rounds": 2, "rewind_step": 1}, "agp": {"every": 1}, "magnitude": {"rounds": 2, "l1": 1e-3},
    "nm": {"freeze": 5}, "snip": {"batches": 2}, "admm": {"rho": 0.1},
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu()
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def make_net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 1, 6, 6, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def choices(kind: str = "pattern") -> dict[str, Choice]:
    return {"second": parse_choice(CHOICES[kind]), "fc": Fine(0.5)}


def groups(net: nn.Module) -> list[dict[str, Any]]:
    many = [p for p in net.parameters() if p.ndim > 1]
    return [{"params": many, "lr": 0.03}, {"params": [p for p in net.parameters() if p.ndim <= 1]}]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()


def start(method: str, kind: str = "pattern", optimizer: str = "sgd") -> tuple[Net, torch.optim.Optimizer, Session]:
    net = make_net()
    opt = OPTIMIZERS[optimizer](groups(net))
    clock = {"steps_per_epoch": STEPS, "epochs": EPOCHS}
    return net, opt, attach(net, opt, choices(kind), **clock, method=method, settings=SETTINGS.get(method))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", GENERAL)
@pytest.mark.parametrize("kind", list(CHOICES))
def test_training_ends_at_the_policys_density(method: str, kind: str) -> None:
    net, opt, session = start(method, kind)
    train(net, opt, 0, STEPS * EPOCHS)
    report = session.finalize()
    assert report.finished
    spec = {layer.name: layer for layer in trace(net, batch(0)[0][:1])}
    for name, choice in choices(kind).items():
        weight = net.get_submodule(name).weight
        density = int(torch.count_nonzero(weight)) / weight.numel()  # type: ignore[arg-type, operator]
        # Weights that read removed channels go with them, beyond the reader's own choice.
        least = 0.1 if kind == "channels" and name == "fc" else choice.density(spec[name])
        assert least <= density < choice.density(spec[name]) + 0.01
    assert torch.count_nonzero(net.first.weight) == net.first.weight.numel()


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("method", [name for name in GENERAL if METHODS.get(name).monotone])
def test_removed_weights_and_their_optimizer_state_stay_exactly_zero(method: str, optimizer: str) -> None:
    net, opt, session = start(method, optimizer=optimizer)
    seen: dict[str, Tensor] = {}
    for step in range(STEPS * EPOCHS):
        train(net, opt, step, step + 1)
        for name, mask in session.masks.items():
            weight: Tensor = net.get_submodule(name).weight  # type: ignore[assignment]
            assert not weight[~mask].any()
            state = [v for v in opt.state[weight].values() if isinstance(v, Tensor) and v.shape == weight.shape]
            assert state or method in ("lottery", "snip")
            assert not any(v[~mask].any() for v in state)
            assert not (mask & ~seen.get(name, torch.ones_like(mask))).any(), "a removed weight returned"
            seen[name] = mask
    assert set(seen) == {"second", "fc"}


def test_momentum_would_revive_weights_without_the_session() -> None:
    net, opt, session = start("clicktrain")
    train(net, opt, 0, STEPS * EPOCHS)
    mask = session.masks["second"]
    session.detach()
    train(net, opt, 0, 1)
    assert net.second.weight[~mask].any()


@pytest.mark.parametrize("method", GENERAL)
@pytest.mark.parametrize(("stop", "optimizer"), [(2, "sgd"), (4, "adamw"), (7, "sgd"), (8, "adamw"), (10, "sgd")])
def test_resumed_training_is_bit_identical(method: str, stop: int, optimizer: str) -> None:
    unbroken, opt, session = start(method, "shared", optimizer)
    train(unbroken, opt, 0, STEPS * EPOCHS)
    wanted = session.finalize()

    first, opt, session = start(method, "shared", optimizer)
    train(first, opt, 0, stop)
    file = io.BytesIO()
    torch.save([first.state_dict(), opt.state_dict(), session.state_dict()], file)
    file.seek(0)
    weights, opt_state, session_state = torch.load(file, weights_only=True)
    second, opt, session = start(method, "shared", optimizer)
    session.load_state_dict(session_state)
    second.load_state_dict(weights)
    opt.load_state_dict(opt_state)
    train(second, opt, stop, STEPS * EPOCHS)
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert session.finalize() == wanted


def test_report_counts_phases_and_savings() -> None:
    net, opt, session = start("clicktrain", "block")
    train(net, opt, 0, STEPS * EPOCHS)
    report = session.finalize()
    assert [(p.name, p.first_epoch, p.steps) for p in report.phases] == [
        ("warmup", 0, 3), ("lasso", 1, 6), ("pruned", 3, 9)
    ]  # fmt: skip
    inference = report.sparsity.inference_macs_saved
    assert inference is not None
    assert report.training_macs_saved is not None
    # The step that sets the masks is itself dense; the first layer has no input gradient, so its share is smaller.
    layers = trace(net, batch(0)[0][:1])
    full = sum(layer.macs * (2 if layer.name == "first" else 3) for layer in layers)
    saved = 3 * inference * sum(layer.macs for layer in layers) / full
    assert report.training_macs_saved == pytest.approx(saved * 8 / 18)


def test_accumulated_backward_passes_count_as_one_step() -> None:
    net, opt, session = start("campfire")
    for step in range(4):
        opt.zero_grad()
        for part in range(3):
            images, labels = batch(step * 3 + part)
            nn.functional.cross_entropy(net(images), labels).backward()
        opt.step()
    assert (session.steps, session.epoch) == (4, 1)


def test_a_step_that_the_gradient_scaler_skips_does_not_count() -> None:
    net, opt, session = start("clicktrain")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        images, labels = batch(step)
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        if step == 2:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    assert session.steps == 5
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_scaled_training_equals_plain_training() -> None:
    plain, opt, _ = start("clicktrain")
    train(plain, opt, 0, 12)
    scaled, opt, _ = start("clicktrain")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        images, labels = batch(step)
        opt.zero_grad()
        scaler.scale(nn.functional.cross_entropy(scaled(images), labels)).backward()
        scaler.step(opt)
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_fused_optimizer_that_skips_a_step_does_not_count_and_unscales_the_penalty() -> None:
    fused, _, _ = start("clicktrain")
    opt = torch.optim.SGD(fused.parameters(), lr=0.05, fused=True)
    session = attach(fused, opt, choices(), steps_per_epoch=STEPS, epochs=EPOCHS, settings={"lasso": 0.1})
    plain = make_net()
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.05)
    attach(plain, plain_opt, choices(), steps_per_epoch=STEPS, epochs=EPOCHS, settings={"lasso": 0.1})
    train(plain, plain_opt, 0, STEPS * EPOCHS)
    for step in range(STEPS * EPOCHS):
        images, labels = batch(step)
        for overflow in (1.0, 0.0):
            opt.zero_grad()
            (nn.functional.cross_entropy(fused(images), labels) * 256.0).backward()
            opt.grad_scale, opt.found_inf = torch.tensor(256.0), torch.tensor(overflow)  # type: ignore[attr-defined]
            opt.step()
    assert session.steps == STEPS * EPOCHS
    torch.testing.assert_close(plain.second.weight, fused.second.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["clicktrain", "campfire", "nm"])
def test_a_compiled_model_trains_as_the_plain_one(method: str) -> None:
    plain, opt, session = start(method)
    train(plain, opt, 0, STEPS * EPOCHS)
    wanted = session.finalize()
    net = make_net()
    opt = OPTIMIZERS["sgd"](groups(net))
    compiled: nn.Module = torch.compile(net, backend="eager")  # type: ignore[assignment]
    clock = {"steps_per_epoch": STEPS, "epochs": EPOCHS}
    session = attach(compiled, opt, choices(), **clock, method=method, settings=SETTINGS.get(method))  # type: ignore[arg-type]
    train(compiled, opt, 0, STEPS * EPOCHS)
    assert torch.equal(plain.second.weight, net.second.weight)
    assert session.finalize() == wanted


def test_channels_last_weights_keep_their_format_and_density() -> None:
    net = make_net().to(memory_format=torch.channels_last)
    opt = OPTIMIZERS["sgd"](groups(net))
    session = attach(net, opt, choices("shared"), steps_per_epoch=STEPS, epochs=EPOCHS)
    train(net, opt, 0, STEPS * EPOCHS)
    assert net.second.weight.is_contiguous(memory_format=torch.channels_last)
    assert session.finalize().sparsity.layers[1].sparsity == pytest.approx(1 - 0.5 * 4 / 9)


def test_detach_leaves_the_optimizer_as_it_was() -> None:
    net, opt, session = start("campfire")
    session.detach()
    session.detach()
    train(net, opt, 0, STEPS * EPOCHS)
    assert session.steps == 0
    other = make_net()
    opt = OPTIMIZERS["sgd"](groups(other))
    train(other, opt, 0, STEPS * EPOCHS)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_stopping_too_early_is_reported() -> None:
    net, opt, session = start("clicktrain")
    train(net, opt, 0, STEPS)
    report = session.finalize()
    assert not report.finished
    assert report.sparsity.prunable_sparsity == 0.0


def test_unknown_method_and_setting_propose_the_nearest() -> None:
    net = make_net()
    opt = OPTIMIZERS["sgd"](groups(net))
    with pytest.raises(UnknownName, match="Did you mean 'clicktrain'"):
        attach(net, opt, choices(), steps_per_epoch=1, epochs=5, method="clicktrian")
    with pytest.raises(UnknownName, match="Did you mean 'hard_epoch'"):
        attach(net, opt, choices(), steps_per_epoch=1, epochs=5, settings={"hard_epochs": 3})
    with pytest.raises(TrainerError, match="balance='row'"):
        attach(net, opt, choices(), steps_per_epoch=1, epochs=5, settings={"balance": "row"})
    with pytest.raises(TrainerError, match="steps_per_epoch=0"):
        attach(net, opt, choices(), steps_per_epoch=0, epochs=5)


@pytest.mark.parametrize("method", ["clicktrain", "campfire"])
def test_settings_are_read_from_texts(method: str) -> None:
    cls = METHODS.get(method).settings_class
    texts = {"clicktrain": ["lasso=1e-3", "hard_epoch = 4", "pool=generic"],
             "campfire": ["exponent=2", "every=5", "inter_epoch=True", "schedule=step"]}[method]  # fmt: skip
    settings = parse_settings(method, texts)
    assert settings == {
        "clicktrain": {"lasso": 1e-3, "hard_epoch": 4, "pool": "generic"},
        "campfire": {"exponent": 2.0, "every": 5, "inter_epoch": True, "schedule": "step"},
    }[method]
    assert cls(**settings) != cls()
    with pytest.raises(UnknownName, match="setting of trainer"):
        parse_settings(method, ["none=1"])
    number = {"clicktrain": "lasso", "campfire": "every"}[method]
    with pytest.raises(TrainerError, match="number"):
        parse_settings(method, [f"{number}=many"])
    with pytest.raises(TrainerError, match="write it as"):
        parse_settings(method, [number])


def test_a_model_with_two_inputs_trains_and_its_macs_stay_unknown() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.fc(x + y)
            return out

    net = Two()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    session = attach(net, opt, {"fc": Fine(0.5)}, steps_per_epoch=1, epochs=2, method="campfire")
    for _ in range(2):
        net(torch.ones(1, 4), torch.ones(1, 4)).sum().backward()
        opt.step()
    report = session.finalize()
    assert (report.training_macs_saved, report.sparsity.inference_macs_saved) == (None, None)
    assert report.sparsity.prunable_sparsity == 0.5


def test_a_policy_for_another_model_is_refused() -> None:
    net = make_net()
    opt = OPTIMIZERS["sgd"](groups(net))
    with pytest.raises(PolicyError, match="'layer1'"):
        attach(net, opt, {"layer1": Fine(0.5)}, steps_per_epoch=1, epochs=5)
    with pytest.raises(PolicyError, match="'fc'"):
        attach(net, opt, {"fc": parse_choice(CHOICES["ck"])}, steps_per_epoch=1, epochs=5)
    layers = trace(net, torch.zeros(1, 1, 16, 16))
    policy = Policy.make(choices(), layers, model="net", budget="macs=50%")
    with pytest.raises(PolicyError, match="other layer shapes"):
        attach(net, opt, policy, steps_per_epoch=1, epochs=5, example=torch.zeros(1, 1, 6, 6))
    late = attach(net, opt, policy, steps_per_epoch=1, epochs=5)
    with pytest.raises(PolicyError, match="other layer shapes"):
        train(net, opt, 0, 1)
    late.detach()
    attach(net, opt, policy, steps_per_epoch=1, epochs=5, example=torch.zeros(1, 1, 16, 16)).detach()


def test_a_state_of_another_session_is_refused() -> None:
    _, _, session = start("clicktrain")
    _, _, other = start("campfire")
    with pytest.raises(TrainerError, match="method='clicktrain'"):
        other.load_state_dict(session.state_dict())


def test_shared_weights_are_pruned_once() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(PolicyError, match="share one weight"):
        attach(net, opt, {"0": Fine(0.5), "1": Fine(0.25)}, steps_per_epoch=1, epochs=2)
    session = attach(net, opt, {"0": Fine(0.5), "1": Fine(0.5)}, steps_per_epoch=1, epochs=2, method="campfire")
    for _ in range(2):
        net(torch.ones(1, 8)).sum().backward()
        opt.step()
    assert int(torch.count_nonzero(net[0].weight)) == 32
    assert session.finalize().finished
