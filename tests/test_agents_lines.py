"""Lines of the comparison that is kept with the project: read back, replaced, and never made twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autoprune.core.comparison import Cell, RankedPolicy
from autoprune.search.compare import CompareConfig

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import agents

CONFIG = CompareConfig(evaluations=30, images=50)


def _cell(seed: int, tuned: float | None) -> Cell:
    curve: list[float | None] = [None, 0.9, *[0.5] * 28]
    top = [
        RankedPolicy(choices={"a": f"fine(keep={keep})"}, error=0.5 + keep, accuracy=0.9, tuned=tuned)
        for keep in (0.1, 0.2)
    ]
    return Cell(agent="tpe", budget="latency=25%", seed=seed, curve=curve, seconds=3.0, scoring_seconds=2.0, top=top)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path: Path = tmp_path / "agents.csv"
    monkeypatch.setattr(agents, "FILE", path)
    return path


def test_a_line_gives_its_cell_back() -> None:
    cell = _cell(0, 0.93)
    agents.write_line(agents.line_of(cell, CONFIG))
    (line,) = agents.of_this(CONFIG, agents.read_lines())
    found = agents.cell_of(line)
    assert (found.agent, found.budget, found.seed, found.seconds) == ("tpe", "latency=25%", 0, 3.0)
    assert [(p.error, p.accuracy, p.tuned) for p in found.top] == [(p.error, p.accuracy, p.tuned) for p in cell.top]
    assert len({policy.choices["policy"] for policy in found.top}) == 2
    assert len(found.curve) == 30
    assert (found.curve[0], found.curve[9], found.curve[29]) == (None, 0.5, 0.5)


def test_a_fine_tuned_cell_takes_the_place_of_its_search_and_of_nothing_else(file: Path) -> None:
    for cell in (_cell(0, None), _cell(1, None), _cell(0, 0.93)):
        agents.write_line(agents.line_of(cell, CONFIG))
    lines = agents.read_lines()
    assert [(line["seed"], bool(line["tuned"])) for line in lines] == [("1", False), ("0", True)]
    other = CompareConfig(evaluations=30, images=60)
    assert agents.of_this(other, lines) == []
    assert file.read_text(encoding="utf-8").count("\n") == 3


def test_the_summary_says_who_wins(capsys: pytest.CaptureFixture[str]) -> None:
    agents.write_line(agents.line_of(_cell(0, 0.93), CONFIG))
    agents.summary(CONFIG, agents.read_lines())
    assert "tpe finds the least error" in capsys.readouterr().out
