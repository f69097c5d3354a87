"""Without labels a network is judged by its agreement with the dense one; a user's own judge is asked where given."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_folders import flat_folder
from networks import settled
from safetensors.torch import load_file
from small_task import quick_measurements, small_task
from torch import nn

import autoprune
from autoprune.cli.main import run as cli
from autoprune.core.errors import DataError, ModelError, UnknownName
from autoprune.core.policy import Policy
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir
from autoprune.envs.evaluator import divergence
from autoprune.envs.network import recalibrate
from autoprune.kernels.deployed import DeployedModel
from autoprune.report.html import write_report
from autoprune.report.summary import figure_text, metric_text, verdict
from autoprune.search.setup import finetune_recipe, splits_of
from autoprune.tasks.data import Split, load_data
from autoprune.tasks.metrics import labelled_by, metric_of, own_score, split_accuracy, split_logits
from autoprune.tasks.task import Task, judged_task
from autoprune.trainers.finetune import FinetuneRecipe, Teacher, finetune

SPACE = """
name: small
rules:
  - match: {position: first}
    choices: [{kind: dense}]
  - match: {op: conv}
    choices: [{kind: dense}, {kind: block, keep: [0.5, 0.25]}]
"""
COUNTS = "train=24,validation=12,test=6,classes=7"


def network() -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for channels, filters, stride in ((3, 16, 2), (16, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
    model = settled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 7)))
    with torch.no_grad():
        model.get_submodule("11").weight.mul_(10.0)  # answers that differ from image to image
    return model


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = flat_folder(tmp_path_factory.mktemp("images"), 60)
    data = load_data(f"imagefolder:{folder}#size=32,{COUNTS}")
    model = network()
    recalibrate(model, data.normalize(data.train.images))
    return Task("images", "small", model, data.normalize(data.validation.images[:1]), data, metric="agreement")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("runs")
    (path / "space.yaml").write_text(SPACE)
    with quick_measurements():
        yield path


def search(task: Task, runs: Path, run: str) -> Result:
    return autoprune.search(
        task.model, task, budget="macs=70%", agent="knapsack", evaluations=2, space=str(runs / "space.yaml"),
        runs_dir=runs, run=run,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(task: Task, runs: Path) -> Result:
    return search(task, runs, "agreement")


def test_a_folder_without_labels_is_searched_by_agreement(result: Result, task: Task, runs: Path) -> None:
    policy = Policy.load(RunDir(runs / "agreement").policy)
    assert (result.met, result.metric, policy.file.metric) == (True, "agreement", "agreement")
    # The dense network agrees with itself.
    assert (policy.file.accuracy.dense, policy.file.accuracy.dense_test) == (1.0, 1.0)
    tuned = load_file(RunDir(runs / "agreement").weights)
    pruned = network()
    pruned.load_state_dict(tuned)
    closing = labelled_by(task.model, task.data).test
    share = split_accuracy(pruned, closing, task.data)
    assert policy.file.accuracy.test == pytest.approx(share, abs=1 / len(closing) + 1e-9)


def test_its_report_says_agreement_and_not_accuracy(result: Result, runs: Path) -> None:
    assert "agrees with the dense network in" in verdict(result)
    assert "reaches" not in verdict(result)
    text = write_report(RunDir(runs / "agreement")).read_text(encoding="utf-8")
    assert metric_text("agreement").partition(":")[0] in text
    assert "Accuracy is top-1" not in text
    assert "Of 24 training images 24 calibrate; 6" in text


def test_the_policy_records_splits_that_share_no_image(result: Result, task: Task, runs: Path) -> None:
    splits = Policy.load(RunDir(runs / "agreement").policy).file.splits
    assert splits is not None
    counts = (splits.train, splits.calibration, splits.search, splits.validation, splits.test)
    assert counts == (24, 24, 6, 6, 6)
    assert splits == splits_of(task.data)
    searched, judged = task.data.judges(1_000)
    parts = [task.data.train, searched, judged, task.data.test]
    seen = [image.numpy().tobytes() for part in parts for image in part.images[:]]
    assert len(set(seen)) == len(seen) == 24 + 6 + 6 + 6
    other = replace(task.data, validation=task.data.validation.part(1))
    assert splits_of(other).sha256 != splits.sha256


def test_labels_that_there_are_may_be_left_unused() -> None:
    base = small_task()
    task = judged_task(base, "agreement")
    assert task.metric == "agreement"
    want = split_logits(base.model, base.data.validation, base.data).argmax(1)
    assert torch.equal(task.data.validation.labels, want)
    assert not torch.equal(base.data.validation.labels, want)
    assert finetune_recipe(task).distill == 1.0
    assert finetune_recipe(base) == FinetuneRecipe()


def test_distillation_alone_reads_no_label_and_keeps_the_masks(task: Task) -> None:
    recipe = FinetuneRecipe(epochs=8, batch_size=8, distill=1.0, peak_lr=0.003)
    mask = torch.rand(32, 16, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.15
    tuned = []
    for labels in (-torch.ones(24, dtype=torch.long), torch.arange(24) % 7):
        model = copy.deepcopy(task.model)
        with torch.no_grad():
            model.get_submodule("3").weight.mul_(mask)
        model.requires_grad_(True)
        before = divergence(split_logits(task.model, task.data.train, task.data),
                            split_logits(model, task.data.train, task.data))  # fmt: skip
        data = replace(task.data, train=Split(task.data.train.images, labels))
        finetune(model, Teacher(task.model), {"3": mask}, data, recipe, seed=0)
        after = divergence(split_logits(task.model, task.data.train, task.data),
                           split_logits(model, task.data.train, task.data))  # fmt: skip
        assert after < before
        assert not bool(model.get_submodule("3").weight[~mask].any())
        tuned.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in tuned), strict=True))


def test_fewer_images_than_a_batch_are_one_step_an_epoch(task: Task) -> None:
    model, steps = network().requires_grad_(True), []
    finetune(model, Teacher(task.model), {}, task.data, FinetuneRecipe(epochs=2, distill=1.0), seed=0,
             on_step=lambda: steps.append(1))  # fmt: skip
    assert len(steps) == 2


def test_the_users_own_judge_scores_the_finalists(task: Task, runs: Path) -> None:
    seen: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(model)
        with torch.no_grad():
            return 10.0 - float((model(task.example) - task.model(task.example)).square().mean())

    result = search(replace(task, metric="accuracy", evaluate=evaluate), runs, "own")
    assert result.metric == "score"
    assert all(isinstance(model, DeployedModel) for model in seen)
    assert result.row("dense").accuracy.dense == pytest.approx(10.0, abs=1e-4)
    chosen = result.row("chosen").accuracy
    assert chosen.test is None
    assert chosen.tuned is not None
    assert chosen.tuned < 10.0
    assert f"scores {figure_text(chosen.tuned, 'score')} by the user's own measure (dense: 10.00)" in verdict(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_a_judge_that_gives_no_number_is_an_error(value: object) -> None:
    with pytest.raises(ModelError, match=r"evaluate\(model\)") as caught:
        own_score(lambda model: value, network())  # type: ignore[arg-type,return-value]
    assert "\n" not in str(caught.value)


def test_accuracy_of_images_without_labels_is_refused(task: Task) -> None:
    with pytest.raises(DataError, match="has no labels, so no accuracy; give --metric agreement"):
        judged_task(replace(task, metric="accuracy"))
    with pytest.raises(UnknownName, match="Did you mean 'agreement'"):
        metric_of("agrement", task.data)


def test_evaluate_tells_agreement_and_divergence(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--metric", "agreement", "--images", "60", "--split", "validation"]
    assert cli(["evaluate", *flags, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["metric"], record["agreement"], record["images"]) == ("agreement", 1.0, 60)
    assert record["divergence"] == pytest.approx(0.0, abs=1e-9)
    assert "accuracy" not in record
    assert cli(["evaluate", *flags]) == 0
    assert "of the answers are the dense network's; KL divergence from it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["search", "--budget", "macs=50%", "--data", "imagefolder:IMAGES"], "no trained weights of 'resnet20'"),
        (["search", "--budget", "macs=50%", "--metric", "agrement"], "no metric 'agrement'. Did you mean 'agreement'?"),
        (["search", "--budget", "macs=50%", "--data", "imagefoldr:x"], "Did you mean 'imagefolder:DIR'?"),
        (["search", "--budget", "macs=50%", "--transform", "sise=3"], "Did you mean 'size'?"),
        (["search", "--budget", "macs=50%", "--data", "imagefolder:absent"], "imagefolder:absent: no such folder"),
        (["train", "--data", "imagefolder:IMAGES"], "has no labels, which a training needs"),
        (["train", "--data", "imagefolder:BROKEN"], "3.png: no image (not of a known format)"),
        (["train", "--data", "cifar10", "--data-dir", "PICKLED"], "pickled version of CIFAR-10"),
        (["evaluate", "--metric", "agreemnt"], "Did you mean 'agreement'?"),
        (["evaluate", "--data", "imagefolder:FEW"], "5 images, at least 16 are needed"),
        (["bench", "--policy", "absent.json", "--data", "mnits"], "Did you mean 'mnist'?"),
    ],
)
def test_bad_data_is_one_line_and_makes_nothing(
    argv: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("IMAGES", 20), ("BROKEN", 20), ("FEW", 5)):
        flat_folder(tmp_path / name, count)
    for path in (tmp_path / "BROKEN").iterdir():
        path.write_text("no picture") if path.stem.endswith("3") else None
    (tmp_path / "PICKLED" / "cifar-10-batches-py").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert cli(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert part in line
    assert sorted(tmp_path.rglob("*")) == before
