"""Policies without a search, and the recipes and flags that train them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from autoprune.cli.main import run as cli
from autoprune.core.choices import Dense, parse_choice
from autoprune.core.errors import ChoiceError, PolicyError, UnknownName
from autoprune.core.policy import Policy, params_ratio
from autoprune.core.rundir import RunDir
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.sparsity.masks import make_mask
from autoprune.sparsity.metrics import summarise
from autoprune.tasks.models import build_model
from autoprune.trainers.run import TrainRequest

PATTERN = "pattern(count=8,entries=4,kernels=0.5,share=1x1)"


def test_every_layer_takes_the_first_choice_that_fits_and_the_ends_stay_dense() -> None:
    layers = trace(build_model("resnet20"), torch.zeros(1, 1, 28, 28))
    policy = uniform_policy(layers, [PATTERN, "fine(keep=0.5)"], model="resnet20")
    found = {name: choice.kind for name, choice in policy.choices.items()}
    assert found.pop("conv1") == found.pop("fc") == "dense"
    assert {name for name, kind in found.items() if kind == "fine"} == {"layer2.0.shortcut.0", "layer3.0.shortcut.0"}
    assert set(found.values()) == {"pattern", "fine"}
    policy.check_model(layers)
    alone = uniform_policy(layers, [PATTERN], model="resnet20")
    assert alone.choice("layer2.0.shortcut.0") == Dense()


def test_compression_is_reported_on_convolutions_and_on_everything() -> None:
    model = build_model("resnet20")
    layers = trace(model, torch.zeros(1, 1, 28, 28))
    policy = uniform_policy(layers, [PATTERN, "fine(keep=0.5)"], model="resnet20")
    weights = {layer.name: model.get_submodule(layer.name).weight.detach() for layer in layers}  # type: ignore[operator, union-attr]
    pruned = {name: weight * make_mask(weight, policy.choice(name)) for name, weight in weights.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = summarise(pruned, policy.choices, parameters, layers)
    nonzero = sum(int(torch.count_nonzero(weight)) for name, weight in pruned.items() if name != "fc")
    assert report.conv_compression == pytest.approx(sum(w.numel() for n, w in weights.items() if n != "fc") / nonzero)
    assert 4.2 < report.conv_compression < 4.5
    assert report.all_compression < report.conv_compression
    assert params_ratio(layers, policy.choices) == pytest.approx(1 / report.conv_compression, abs=0.01)
    nominal = {layer.name: layer.nominal for layer in report.layers}
    assert nominal["layer1.0.conv1"] == pytest.approx(1 - 2 / 9)
    assert nominal["conv1"] == 0.0


def test_storage_counts_the_indices_of_groups_of_m_and_no_rows_of_dead_filters() -> None:
    weight = torch.ones(8, 16)
    parameters = weight.numel()
    wanted = {"nm(n=2,m=4)": 64 * (32 + 2), "channels(keep=0.5)": 64 * 32, "tile(keep=0.5,size=4)": None}
    for text, bits in wanted.items():
        choice = parse_choice(text)
        pruned = weight * make_mask(weight, choice, torch.rand(8, 16, generator=torch.Generator().manual_seed(0)))
        row = summarise({"fc": pruned}, {"fc": choice}, parameters).layers[0]
        # Of eight tiles four stay: values, which of four columns, and three row pointers that count to four.
        assert row.storage_bits == (64 * 32 + 4 * 2 + 3 * 3 if bits is None else bits), text


def test_a_choice_for_no_layer_or_of_no_kind_is_refused() -> None:
    layers = trace(build_model("resnet20"), torch.zeros(1, 1, 28, 28))
    with pytest.raises(PolicyError, match="no layer of 'resnet20' can take it"):
        uniform_policy(layers, ["nm(n=2,m=31)"], model="resnet20")
    with pytest.raises(UnknownName, match="Did you mean 'pattern'"):
        uniform_policy(layers, ["patern(count=8)"], model="resnet20")
    with pytest.raises(ChoiceError, match="allowed are 4, 8 and 12"):
        uniform_policy(layers, ["pattern(count=5)"], model="resnet20")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainRequest, str]]:
    """Stop the command where training would begin; returns what it was asked for."""
    seen: list[tuple[TrainRequest, str]] = []

    def train_policy(request: TrainRequest, folder: RunDir, progress: object) -> None:
        seen.append((request, folder.path.name))
        raise PolicyError("seen enough.")

    monkeypatch.setattr("autoprune.trainers.run.train_policy", train_policy)
    return seen


def test_uniform_recipe_and_mixup_reach_the_training(asked: list[tuple[TrainRequest, str]], tmp_path: Path) -> None:
    flags = ["--uniform", PATTERN, "--uniform", "fine(keep=0.5)", "--runs-dir", str(tmp_path)]
    assert cli(["train", *flags, "--recipe", "clicktrain-cifar-resnet", "--epochs", "38", "--set", "lasso=1e-3"]) == 2
    (request, name), = asked
    assert isinstance(request.policy, Policy)
    assert request.policy.choice("layer1.0.conv1") == parse_choice(PATTERN)
    assert (request.trainer, request.recipe.epochs, request.recipe.drops) == ("clicktrain", 38, (11, 26))
    assert request.settings == {
        "warmup_epochs": 12, "hard_epoch": 28, "lasso": 1e-3, "pool": "generic", "batches": 1,
    }  # fmt: skip
    assert (request.recipe.mixup, request.recipe.mixup_start) == (0.3, 28)
    assert re.fullmatch(r"[\w.=@%+-]+", name)
    assert "pattern-count=8" in name


def test_defaults_of_a_training_are_those_of_the_default_recipe(
    asked: list[tuple[TrainRequest, str]], tmp_path: Path
) -> None:
    assert cli(["train", "--runs-dir", str(tmp_path), "--mixup", "0.2"]) == 2
    (request, name), = asked
    assert (request.policy, request.trainer, request.recipe.epochs) == (None, "clicktrain", 12)
    assert (request.recipe.schedule, request.recipe.mixup, request.recipe.mixup_start) == ("cycle", 0.2, 0)
    assert name == "resnet20-dense-e12-s0"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe", "clicktrain-imagnet"], "Did you mean 'clicktrain-imagenet'"),
        (["--uniform", "fin(keep=0.5)"], "Did you mean 'fine'"),
        (["--uniform", "fine(keep=0.5)", "--trainer", "rigel"], "Did you mean 'rigl'"),
        (["--uniform", "fine(keep=0.5)", "--policy", "p.json"], "--policy and --uniform: got both"),
        (["--uniform", "fine(keep=0.5)", "--trainer", "lottery", "--epochs", "1"], "need 2 epochs, got 1"),
        (["--device", "gpu"], "training runs on cpu or cuda"),
    ],
)
def test_bad_requests_are_refused_by_one_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["train", "--embedded", *flags, "--runs-dir", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert not (tmp_path / "runs").exists()
