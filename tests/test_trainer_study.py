"""The study of the trainers: its cells are the published ones, it writes rows, and it goes on where it stopped."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from autoprune.lut.table import LatencyTable
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.tasks.data import DataSet, Split
from autoprune.tasks.models import MODELS, CifarResNet, build_model
from autoprune.trainers.recipe import Recipe

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import trainers as study
import trainers_cells as cells


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(0, 2, (count,), generator=generator))

    data = DataSet("fashion-mnist", 2, 0.5, 0.3, split(256), split(32), split(32), full=False)
    monkeypatch.setattr(study, "load_data", lambda name, data_dir, full: data)
    monkeypatch.setattr("autoprune.trainers.run.load_data", lambda name, data_dir, full: data)
    monkeypatch.setitem(MODELS._items, "tiny", lambda channels, classes: CifarResNet(1, channels, classes))


def test_every_case_writes_rows_and_a_second_call_adds_none(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "rows.csv"
    common = ["--model", "tiny", "--embedded", "--epochs", "3", "--seeds", "1", "--runs-dir", str(tmp_path / "runs")]
    monkeypatch.setattr(cells, "searched_cells", lambda *given: iter(()))
    for case, only in (
        ("core", "60%"),
        ("clicktrain", "8.6x share 1x1"),
        ("campfire", "combined 60"),
        ("trade", "fine-tune 0.25E"),
    ):
        study.main(["--case", case, "--only", only, *common, "--results", str(results)])
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"].split(":")[0] for row in rows} == {"core", "clicktrain", "campfire", "trade"}
    metrics = {row["metric"]: row for row in rows if row["choice"] == "8.6x share 1x1"}
    delta = float(metrics["delta test accuracy"]["p50"])
    test = metrics["test accuracy"]
    assert delta == pytest.approx(100 * (float(test["p50"]) - float(test["baseline_p50"])), abs=1e-3)
    assert float(test["compression"]) == pytest.approx(8.6, rel=0.05)
    assert sum("FGSM" in row["metric"] for row in rows) == 12
    epochs = {row["choice"]: float(row["ratio"]) for row in rows if row["metric"] == "epochs"}
    assert epochs["train, prune, fine-tune 0.25E"] == pytest.approx(4 / 3, abs=1e-3)
    assert sum(row["metric"] == "training time, measured" for row in rows) == 4
    quiet = tmp_path / "background.csv"
    study.main(["--case", "core", "--only", "60%", "--background", *common, "--results", str(quiet)])
    assert "training time" not in quiet.read_text()
    before = results.read_text()
    study.main(["--case", "clicktrain", "--only", "8.6x share 1x1", *common, "--results", str(results)])
    assert results.read_text() == before


@pytest.mark.parametrize("ratio", [4.5, 8.6, 10.7])
def test_kernels_are_kept_for_the_wanted_compression(ratio: float) -> None:
    layers = trace(build_model("resnet20"), torch.zeros(1, 1, 28, 28))
    kernels = cells.kernels_for(layers, ratio)
    texts = [f"pattern(count=8,entries=4,kernels={kernels},share=1x1)", f"fine(keep={kernels})"]
    policy = uniform_policy(layers, texts, model="resnet20")
    convs = [layer for layer in layers if layer.op == "conv"]
    kept = sum(layer.weights * policy.choice(layer.name).density(layer) for layer in convs)
    assert sum(layer.weights for layer in convs) / kept == pytest.approx(ratio, rel=1e-3)


def test_the_pair_differs_in_its_policies_and_in_nothing_else() -> None:
    layers = trace(build_model("resnet20"), torch.zeros(1, 1, 28, 28))
    searched, uniform = cells.searched_cells(layers, Recipe(epochs=4))
    assert searched.recipe == uniform.recipe
    assert searched.settings == uniform.settings
    assert searched.policy is not None
    assert uniform.policy is not None
    assert {choice.kind for choice in uniform.policy.choices.values()} == {"dense", "fine"}
    (keep,) = {choice.density(layers[1]) for choice in uniform.policy.choices.values()} - {1.0}
    table = LatencyTable.load(cells.REFERENCE / "table.json")
    target_us = table.network_us(layers, searched.policy.choices)
    rows = sorted(float(text[10:-1]) for _, text in table.rows if text.startswith("fine(keep="))
    below, above = max(row for row in rows if row <= keep), min(row for row in rows if row >= keep)
    low_us, high_us = (
        table.network_us(layers, uniform_policy(layers, [f"fine(keep={row})"], model="resnet20").choices)
        for row in (below, above)
    )
    assert low_us <= target_us <= high_us
    assert (keep - below) / (above - below) == pytest.approx((target_us - low_us) / (high_us - low_us), abs=1e-2)
