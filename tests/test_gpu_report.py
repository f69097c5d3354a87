"""What a search by a GPU's table tells, on a table that the tile model made up: nothing in it was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_task import small_task

import autoprune
from autoprune.cli.main import run as cli
from autoprune.core.choices import Choice, Dense, Fine
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy, model_fingerprint
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir
from autoprune.lut.calibrate import fit, random_policies
from autoprune.lut.context import Context
from autoprune.lut.row import Column, Point, Row, Unmeasured, Whole
from autoprune.lut.table import Key, LatencyTable
from autoprune.lut.tile_model import DeviceModel, floor_us, is_tiled, least_us, predicted_us
from autoprune.report.html import render
from autoprune.search_spaces.space import load_space
from autoprune.search_spaces.trace import trace

# A slow device, so that layers of a small network are bound by arithmetic.
MADE_UP = DeviceModel("Made-up GPU", {"bfloat16": 0.05}, 0.0003, 1e12, 2e12, 1 << 20, 1, 0.1)
CONTEXT = Context(device="cuda", gpu="Made-up GPU", driver="none", batch=1, dtype="bfloat16", cache="network")
SPACE = """name: made-up
rules:
  - match: {position: first}
    choices: [{kind: dense}]
  - match: {op: conv, window: 3x3}
    choices:
      - {kind: dense}
      - {kind: pattern, count: [8], entries: [4], kernels: [1.0, 0.5], share: [32x8]}
      - {kind: fine, keep: [0.25]}
  - match: {}
    choices: [{kind: dense}]
"""


def _rows(layer: LayerSpec, choices: tuple[Choice, ...]) -> dict[Key, Row | Unmeasured]:
    """Return rows a fifth slower than predicted; what not even its floor makes faster than dense has none."""
    dense_us = 1.2 * predicted_us(MADE_UP, layer, Dense(), 1, "bfloat16")
    found: dict[Key, Row | Unmeasured] = {}
    for choice in (Dense(), *choices):
        bound = least_us(MADE_UP, layer, choice, 1, "bfloat16", tiled=is_tiled(choice))
        model_us = predicted_us(MADE_UP, layer, choice, 1, "bfloat16")
        if not isinstance(choice, Dense) and bound >= dense_us:
            found[layer.signature, choice.text] = Unmeasured(reason="floor", bound_us=bound)
            continue
        us = 1.2 * model_us
        column = Column(p10=us, p50=us, p90=us)
        found[layer.signature, choice.text] = Row(
            p10=us, p50=us, p90=us, weight_bytes=8, kernel="dense" if isinstance(choice, Dense) else "ell",
            workspace_bytes=0, warm=column, cold=column, model_us=model_us,
            floor_us=floor_us(MADE_UP, layer, choice, 1, "bfloat16"),
        )
    return found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Policy, LatencyTable, Path]:
    """A search by the made-up table, its policy, the table, and the folder of all files."""
    folder = tmp_path_factory.mktemp("made-up")
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    task = small_task()
    layers = trace(task.model, task.example)
    space = load_space(str(folder / "space.yaml"), layers).choices
    rows = {key: row for layer in layers for key, row in _rows(layer, space[layer.name]).items()}
    table = LatencyTable(CONTEXT, {key: row for key, row in rows.items() if isinstance(row, Row)})
    table = table.without({key: why for key, why in rows.items() if isinstance(why, Unmeasured)})
    drawn = random_policies(table, layers, {name: c for name, c in space.items() if len(c) > 1}, 0, 8)
    sums = [table.rows_us(layers, choices) for choices in drawn]
    table = table.with_calibration(fit([Point(rows_us=us, measured_us=1.1 * us + 3.0) for us in sums]))
    whole = Whole(model="small", fingerprint=model_fingerprint(layers), dense_us={"plan": 1.1 * sums[0] + 3.0})
    table = LatencyTable(table.context, table.rows, table.calibration, table.unmeasured, whole)
    table.save(folder / "made-up.json")
    result = autoprune.search(
        task.model, task, budget="latency=80%", agent="knapsack", evaluations=3, space=str(folder / "space.yaml"),
        table=str(folder / "made-up.json"), runs_dir=folder / "runs", run="far",
    )
    return result, Policy.load(RunDir(folder / "runs" / "far").policy), table, folder


def test_what_cannot_beat_dense_even_at_its_floor_is_not_searched_and_the_report_says_so(
    searched: tuple[Result, Policy, LatencyTable, Path],
) -> None:
    result, policy, table, _ = searched
    assert {choice for _, choice in table.unmeasured} == {Fine(keep=0.25).text}
    assert any(choice != Dense() for choice in policy.choices.values())
    assert not any(isinstance(choice, Fine) for choice in policy.choices.values())
    assert result.met
    (sentence,) = result.left_out
    assert sentence.startswith("2 choices cannot beat the dense layer even at their floor on this device")
    assert sentence in render(result, policy.file)


def test_model_row_and_floor_stand_side_by_side(searched: tuple[Result, Policy, LatencyTable, Path]) -> None:
    result, policy, table, _ = searched
    assert table.calibration is not None
    for layer in result.layers:
        assert layer.model_us is not None
        assert 0.0 < layer.floor_us < layer.model_us < layer.predicted_us
        assert layer.predicted_us == pytest.approx(table.calibration.slope * 1.2 * layer.model_us)
        assert layer.measured_us is None  # nothing ran
    page = render(result, policy.file)
    assert "<th>tile model</th><th>predicted</th><th>measured</th><th>floor</th>" in page
    assert result.predicted_for == "Made-up GPU"
    assert "as predicted for Made-up GPU" in page


def test_show_prints_what_is_left_out(
    searched: tuple[Result, Policy, LatencyTable, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["lut", "show", str(searched[3] / "made-up.json")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot beat the dense layer even at their floor" in said
    assert "floor µs" in said
