"""The built-in loop: prunes by a policy, resumes to the same result, and measures what came out."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import autoprune.trainers.run as training
from autoprune.core.choices import Choice, Dense, parse_choice
from autoprune.core.errors import ModelError, PolicyError, RunError, UnknownName
from autoprune.core.policy import Policy
from autoprune.core.rundir import RunDir
from autoprune.search_spaces.trace import trace
from autoprune.tasks.data import DataSet, Split
from autoprune.tasks.models import MODELS, build_model
from autoprune.trainers.loop import Epoch, Pruning, train
from autoprune.trainers.recipe import Recipe
from autoprune.trainers.run import TrainRequest, TrainResult, train_policy
from autoprune.trainers.schedule import TrainerError

RECIPE = Recipe(epochs=4, batch_size=16, peak_lr=0.05)
METHODS = ["clicktrain", "campfire"]
OTHERS: dict[str, dict[str, object]] = {
    "lottery": {"rounds": 1, "rewind_step": 2},
    "magnitude": {"prune_epoch": 2},
    "prunetrain": {"interval": 1, "threshold": 0.2, "hard_epoch": 2},
    "nm": {"mode": "asp"},
    "rigl": {"every": 2},
}


class SmallNet(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.second(self.relu(self.norm(self.first(x)))))
        out: torch.Tensor = self.fc(self.drop(self.flatten(self.pool(x))))
        return out


@pytest.fixture
def data() -> DataSet:
    """Stripes against columns on 8×8 images: learnt within a few steps."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.randint(0, 2, (count,), generator=generator)
        noise = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
        rows = torch.arange(8)[:, None] % 2 * 130
        images = noise + torch.where(labels[:, None, None, None] == 0, rows, rows.T)
        return Split(images.to(torch.uint8), labels)

    return DataSet("fashion-mnist", 2, 0.45, 0.3, split(96), split(64), split(32), full=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, data: DataSet) -> None:
    """Put the small network and its data behind the names that ``train_policy`` looks up."""
    monkeypatch.setitem(MODELS._items, "small", SmallNet)
    monkeypatch.setattr(training, "load_data", lambda name, data_dir, *, full: data)


def choices() -> dict[str, Choice]:
    return {"second": parse_choice("block(keep=0.25,filters=16)"), "first": Dense()}


def make_policy() -> Policy:
    return Policy.make(choices(), trace(SmallNet(1, 2), torch.zeros(1, 1, 8, 8)), model="small", budget="macs=50%")


def make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallNet(1, 2)


class Killed(Exception):
    """Stands for a killed process."""


def stop_after(epochs: int) -> object:
    def on_epoch(entry: Epoch) -> None:
        if entry.epoch + 1 == epochs:
            raise Killed

    return on_epoch


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_is_trained_and_logged(method: str, data: DataSet) -> None:
    model = make_model()
    trained = train(model, data, RECIPE, seed=0, pruning=Pruning(choices(), method))
    assert trained.report is not None
    assert trained.report.finished
    assert int(torch.count_nonzero(model.second.weight)) == 576  # type: ignore[arg-type]
    assert trained.log[-1].validation_accuracy > 0.9
    assert trained.log[-1].sparsity == pytest.approx(0.75)
    assert [entry.sparsity for entry in trained.log] == sorted(entry.sparsity for entry in trained.log)
    last = {"clicktrain": "pruned", "campfire": "frozen"}[method]
    assert trained.log[-1].phase == last


@pytest.mark.parametrize("method", [*METHODS, None])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_killed_training_ends_as_an_unbroken_one(
    method: str | None, epochs: int, data: DataSet, tmp_path: Path
) -> None:
    pruning = None if method is None else Pruning(choices(), method)
    whole = make_model()
    wanted = train(whole, data, RECIPE, seed=3, pruning=pruning)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        train(
            make_model(), data, RECIPE, seed=3, pruning=pruning, checkpoint=checkpoint, on_epoch=stop_after(epochs)  # type: ignore[arg-type]
        )
    torch.manual_seed(99)
    model = make_model(seed=7)
    trained = train(model, data, RECIPE, seed=3, pruning=pruning, checkpoint=checkpoint)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert trained.report == wanted.report
    assert [replace(e, seconds=0.0) for e in trained.log] == [replace(e, seconds=0.0) for e in wanted.log]


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.parametrize("method", list(OTHERS))
def test_methods_that_touch_more_than_masks_survive_a_kill(
    method: str, epochs: int, data: DataSet, tmp_path: Path
) -> None:
    wanted_choice = parse_choice("channels(keep=0.5)" if method == "prunetrain" else "fine(keep=0.25)")
    pruning = Pruning({"second": wanted_choice}, method, OTHERS[method])
    recipe = replace(RECIPE, mixup=0.3, mixup_start=1)
    whole = make_model()
    wanted = train(whole, data, recipe, seed=3, pruning=pruning)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        train(make_model(), data, recipe, seed=3, pruning=pruning, checkpoint=checkpoint, on_epoch=stop_after(epochs))  # type: ignore[arg-type]
    model = make_model(seed=7)
    trained = train(model, data, recipe, seed=3, pruning=pruning, checkpoint=checkpoint)
    assert trained.report == wanted.report
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_learning_rate_begins_anew_where_a_method_says(data: DataSet) -> None:
    rates = {}
    for finetune_lr in (0.0, 0.1):
        settings = {"prune_epoch": 2, "finetune_lr": finetune_lr}
        pruning = Pruning({"second": parse_choice("fine(keep=0.25)")}, "magnitude", settings)
        trained = train(make_model(), data, RECIPE, seed=0, pruning=pruning)
        rates[finetune_lr] = [entry.learning_rate for entry in trained.log]
    # The first cycle ends before the pruning; the second is a tenth as high and ends too.
    assert rates[0.1][1] < 0.3 * rates[0.0][1]
    assert rates[0.0][3] < 1e-4
    assert rates[0.1][3] < 1e-5


def test_training_leaves_the_callers_random_numbers_alone(data: DataSet) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    model = make_model()
    train(model, data, replace(RECIPE, epochs=1), seed=0)
    assert torch.equal(torch.rand(3), wanted)


def test_a_checkpoint_of_another_training_is_refused(data: DataSet, tmp_path: Path) -> None:
    checkpoint, short = tmp_path / "checkpoint.pt", replace(RECIPE, epochs=1)
    train(make_model(), data, short, seed=0, checkpoint=checkpoint)
    for change in ({"seed": 1}, {"pruning": Pruning(choices())}, {"recipe": replace(short, peak_lr=0.1)}):
        arguments = {"recipe": short, "seed": 0, **change}
        with pytest.raises(RunError, match="another recipe, seed or policy"):
            train(make_model(), data, checkpoint=checkpoint, **arguments)  # type: ignore[arg-type]
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(RunError, match="damaged"):
        train(make_model(), data, short, seed=0, checkpoint=checkpoint)


def test_divergence_is_told_instead_of_trained_on(data: DataSet) -> None:
    with pytest.raises(TrainerError, match="diverged"):
        train(make_model(), data, replace(RECIPE, peak_lr=1e30), seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_train_policy_measures_the_deployed_network_beside_its_dense_control(
    method: str, small: None, tmp_path: Path
) -> None:
    request = TrainRequest(
        "small", policy=make_policy(), trainer=method, recipe=RECIPE, bench_seconds=0.2, compile=False
    )
    run = RunDir.open(tmp_path, "t", request.config())
    result = train_policy(request, run)
    assert result.dense is not None
    assert result.delta == pytest.approx(result.accuracy.validation - result.dense.validation)
    assert result.savings is not None
    assert result.savings.sparsity["second"] == pytest.approx(0.75)
    assert result.savings.nominal_sparsity["second"] == pytest.approx(0.75)
    assert result.savings.training_time_saved == pytest.approx(
        1 - result.seconds["train"] / result.seconds["dense control"]
    )
    assert [run.layer for run in result.savings.trained_on] == ["second"]
    assert set(result.savings.trained_on[0].kernels) == {"forward", "input gradient", "weight gradient"}
    assert "of a dense step" in result.savings.trained_on[0].why or "dense because" in result.savings.trained_on[0].why
    assert len(list((tmp_path / ".cache").glob("steps-*.json"))) == 1
    assert result.accuracy.best_validation is not None
    assert result.accuracy.best_validation >= result.accuracy.validation
    assert result.deployment is not None
    assert result.deployment.latency_us > 0
    assert result.deployment.ratio == pytest.approx(
        result.deployment.latency_us / result.deployment.references[result.deployment.fastest_reference]
    )
    assert result.deployment.validation_accuracy == pytest.approx(result.accuracy.validation, abs=0.02)
    weights = load_file(run.weights)
    assert int(torch.count_nonzero(weights["second.weight"])) == 576
    assert TrainResult.model_validate_json(run.training.read_text()) == result
    with run.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert float(rows[-1]["sparsity"]) == pytest.approx(0.75)
    assert Policy.load(run.policy).choices == request.policy.choices  # type: ignore[union-attr]


def test_a_learnt_split_over_the_layers_is_deployed_at_the_densities_it_reached(small: None, tmp_path: Path) -> None:
    layers = trace(SmallNet(1, 2), torch.zeros(1, 1, 8, 8))
    wanted = {"first": parse_choice("fine(keep=0.5)"), "second": parse_choice("fine(keep=0.3)")}
    policy = Policy.make(wanted, layers, model="small", budget="by hand")
    request = TrainRequest(
        "small", policy=policy, trainer="dsr", settings={"every": 1, "split": "learned"}, recipe=RECIPE, control=False,
        bench_seconds=0.05, compile=False,
    )  # fmt: skip
    result = train_policy(request, RunDir.open(tmp_path, "t", request.config()))
    assert result.savings is not None
    reached = {name: 1.0 - result.savings.sparsity[name] for name in wanted}
    assert reached["first"] > 0.55
    assert 144 * reached["first"] + 2304 * reached["second"] == pytest.approx(144 * 0.5 + 2304 * 0.3, abs=3)
    assert result.deployment is not None
    assert result.deployment.validation_accuracy == pytest.approx(result.accuracy.validation, abs=0.02)


def test_a_killed_run_is_finished_by_the_same_call(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = TrainRequest("small", policy=make_policy(), recipe=RECIPE, bench_seconds=0)
    whole = train_policy(request, RunDir.open(tmp_path, "whole", request.config()))
    run = RunDir.open(tmp_path, "killed", request.config())

    def die_after_two(path: Path, log: list[Epoch]) -> None:
        if len(log) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_metrics", die_after_two)
        with pytest.raises(Killed):
            train_policy(request, run)
    result = train_policy(request, run)
    assert result.accuracy == whole.accuracy
    assert result.dense == whole.dense
    wanted, got = (load_file(RunDir(tmp_path / name).weights) for name in ("whole", "killed"))
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_training_on_dense_kernels_measures_no_steps(small: None, tmp_path: Path) -> None:
    request = TrainRequest("small", policy=make_policy(), recipe=RECIPE, bench_seconds=0, control=False, sparse=False)
    result = train_policy(request, RunDir.open(tmp_path, "t", request.config()))
    assert result.savings is not None
    assert result.savings.trained_on == []
    assert not (tmp_path / ".cache").exists()


def test_a_finished_run_is_not_trained_again(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = TrainRequest("small", policy=make_policy(), recipe=RECIPE, bench_seconds=0)
    run = RunDir.open(tmp_path, "t", request.config())
    first = train_policy(request, run)
    monkeypatch.setattr("autoprune.trainers.loop._train_epoch", lambda *args: pytest.fail("trained again"))
    assert train_policy(request, run) == first


def test_training_without_a_policy_is_dense_training(small: None, tmp_path: Path) -> None:
    request = TrainRequest("small", recipe=replace(RECIPE, epochs=2))
    run = RunDir.open(tmp_path, "t", request.config())
    result = train_policy(request, run)
    assert (result.trainer, result.savings, result.dense, result.deployment) == ("dense", None, None, None)
    follow = TrainRequest("small", recipe=replace(RECIPE, epochs=1, peak_lr=1e-12), init=run.weights)
    second = RunDir.open(tmp_path, "u", follow.config())
    train_policy(follow, second)
    for name, tensor in load_file(run.weights).items():
        if tensor.is_floating_point() and "running" not in name:
            torch.testing.assert_close(load_file(second.weights)[name], tensor)


def test_config_is_json_and_tells_requests_apart() -> None:
    base = TrainRequest("small", policy=make_policy())
    assert json.loads(json.dumps(base.config())) == base.config()
    others = [
        replace(base, seed=1), replace(base, trainer="campfire"), replace(base, settings={"lasso": 1e-3}),
        replace(base, policy=None), replace(base, recipe=Recipe(epochs=3)), replace(base, init=Path("w")),
    ]  # fmt: skip
    assert all(other.config() != base.config() for other in others)
    assert replace(base, threads=2, bench_seconds=1.0).config() == base.config()


def test_wrong_names_and_models_are_refused_before_training(small: None, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(UnknownName, match="Did you mean 'campfire'"):
        train_policy(TrainRequest("small", policy=make_policy(), trainer="campfires", recipe=RECIPE), run)
    with pytest.raises(PolicyError, match="is not in this model"):
        train_policy(TrainRequest("resnet20", policy=make_policy(), recipe=RECIPE), run)
    with pytest.raises(ModelError, match="cannot be read"):
        train_policy(TrainRequest("small", init=tmp_path / "absent.safetensors", recipe=RECIPE), run)
    assert build_model("small", 1, 2).fc.out_features == 2  # type: ignore[union-attr]
    assert not run.checkpoint.exists()
