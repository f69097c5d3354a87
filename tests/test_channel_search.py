"""Searching over channels: one place per group, measured widths alone, the deployed network is the smaller one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import settled
from small_task import quick_measurements, small_data
from torch import Tensor, nn

import autoprune
from autoprune.core.budget import parse_budget
from autoprune.core.choices import Channels, Dense
from autoprune.core.errors import BudgetError, MissingLatency, SpaceError
from autoprune.core.policy import Policy
from autoprune.core.progress import Silent
from autoprune.core.rundir import Cache, RunDir
from autoprune.envs.coupled import CoupledProblem
from autoprune.lut.context import current_context
from autoprune.lut.row import Row
from autoprune.lut.table import LatencyTable
from autoprune.search.channels import open_space
from autoprune.search.knapsack import solve_problem
from autoprune.search.setup import make_problem, pruned_model, score_choices
from autoprune.search_spaces.grouped import table_rows
from autoprune.search_spaces.trace import trace
from autoprune.sparsity.channels import difference, outputs
from autoprune.tasks.task import Task
from autoprune.tasks.weights import load_weights


class Residual(nn.Module):
    """A stem, a block with a wider inside, a strided layer behind it, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 32, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.outer = nn.Conv2d(32, 16, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, 2, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm2(self.outer(F.relu(self.norm1(self.inner(x))))) + x)
        out: Tensor = self.fc(F.relu(self.norm3(self.down(x))).mean((2, 3)))
        return out


OPEN = """
name: open
rules:
  - match: {position: last}
    choices: [{kind: dense}]
  - choices:
      - {kind: dense}
      - {kind: channels, keep: [0.8, 0.5, 0.3]}
"""


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    data = small_data()
    return Task("fashion-mnist", "residual", settled(Residual()), data.normalize(data.validation.images[:1]), data)


def opened(task: Task, folder: Path, text: str = OPEN) -> tuple:  # type: ignore[type-arg]
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    layers = trace(task.model, task.example)
    return (*open_space(path, task.model, task.example, layers), layers)


def test_a_group_has_one_place_in_the_space_and_aligned_widths(task: Task, tmp_path: Path) -> None:
    space, groups, _ = opened(task, tmp_path)
    assert {layer.name: space.choices[layer.name] for layer in space.searched} == {
        "stem": (Dense(), Channels(0.5)),
        "inner": (Dense(), Channels(0.75), Channels(0.5), Channels(0.25)),
        "down": (Dense(), Channels(0.75), Channels(0.5), Channels(0.25)),
    }
    assert groups.coupling.groups["stem"].writers == ("stem", "outer")
    rows = table_rows(space)
    inner = {(layer.channels, layer.filters) for layer in rows if layer.name == "inner"}
    assert inner == {(c, k) for c in (16, 8) for k in (32, 24, 16, 8)}
    assert {(layer.channels, layer.filters) for layer in rows if layer.name == "fc"} == {
        (c, 10) for c in (32, 24, 16, 8)
    }
    assert not any(isinstance(choice, Channels) for choices in rows.values() for choice in choices)


def test_a_layer_that_a_rule_keeps_dense_keeps_its_group(task: Task) -> None:
    space, _ = open_space("amc-channels", task.model, task.example, trace(task.model, task.example))
    assert [layer.name for layer in space.searched] == ["inner", "down"]


def test_what_a_space_of_channels_cannot_be_is_said_by_name(task: Task, tmp_path: Path) -> None:
    sparse = "  - match: {name: down}\n    choices: [{kind: fine, keep: 0.5}]\n  - choices:"
    mixed = OPEN.replace("  - choices:", sparse)
    with pytest.raises(SpaceError, match=r"layer 'down' may take fine\(keep=0.5\) while channels of group 'stem'"):
        opened(task, tmp_path, mixed)
    narrow = OPEN.replace("[0.8, 0.5, 0.3]", "0.95").replace("- match: {position: last}", "- match: {name: '[ifd]*'}")
    with pytest.raises(SpaceError, match="no group of channels has a measured width below its own"):
        opened(task, tmp_path, narrow)
    with pytest.raises(SpaceError, match="searched on the CPU"):
        open_space("amc-channels", task.model, task.example, trace(task.model, task.example), "cuda")

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.fc = nn.Conv2d(1, 16, 3), nn.LayerNorm(16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.norm(self.a(x).mean((2, 3))))
            return out

    own = replace(task, model=Normalised().eval())
    with pytest.raises(SpaceError, match=r"no channels of this network can leave \(layer '(a|fc)': "):
        opened(own, tmp_path, OPEN)


def test_sparse_choices_beside_channels_are_searched_where_they_do_not_meet(task: Task, tmp_path: Path) -> None:
    # The middle of the block loses channels; the layer behind it, which no searched group touches, may be sparse.
    sparse = "  - match: {name: down}\n    choices: [{kind: fine, keep: 0.5}]\n"
    dense = "  - match: {name: '[so]*'}\n    choices: [{kind: dense}]\n  - choices:"
    space, groups, layers = opened(task, tmp_path, OPEN.replace("  - choices:", sparse + dense))
    assert [layer.name for layer in space.searched] == ["inner", "down"]
    scored = score_choices(task, space, Cache(tmp_path), Silent(), groups)
    problem = make_problem(layers, scored, made_up(space), parse_budget("latency=80%"), sum_us(space))
    choices = problem.named(tuple(size - 1 for size in problem.sizes))
    deployed = autoprune.convert(pruned_model(task, scored.database, choices), choices, task.example)
    kinds = {layer: (choice, kernel) for layer, choice, kernel, _ in deployed.explain()}
    assert kinds["down"] == ("fine(keep=0.5)", "csr")
    assert kinds["inner"] == ("channels(keep=0.25)", "dense")


def made_up(space, leave_out: int = 0) -> LatencyTable:  # type: ignore[no-untyped-def]
    rows = {}
    for layer, choices in table_rows(space).items():
        for choice in {Dense(), *choices}:
            us = (1.0 + layer.macs / 1e4) * (0.3 + 0.7 * choice.density(layer))
            size = 4 * layer.weights
            rows[layer.signature, choice.text] = Row(p10=us, p50=us, p90=us, weight_bytes=size, kernel="dense")
    for key in sorted(rows)[:leave_out]:
        del rows[key]
    return LatencyTable(current_context(1, 1), rows)


def sum_us(space) -> float:  # type: ignore[no-untyped-def]
    return made_up(space).rows_us(space.layers, {})


def test_the_problem_counts_the_shapes_that_the_network_really_gets(task: Task, tmp_path: Path) -> None:
    space, groups, layers = opened(task, tmp_path)
    scored = score_choices(task, space, Cache(tmp_path), Silent(), groups)
    table, budget = made_up(space), parse_budget("latency=60%,size=70%,macs=60%")
    problem = make_problem(layers, scored, table, budget, sum_us(space))
    assert isinstance(problem, CoupledProblem)
    solved = solve_problem(problem)
    assert problem.feasible(solved)
    for assignment in (solved, (0, 0, 0), (1, 2, 3), (1, 3, 0)):
        choices = problem.named(assignment)
        smaller = autoprune.compact(pruned_model(task, scored.database, choices), choices, task.example)
        shapes = trace(smaller, task.example)
        costs = dict(zip(("latency", "size", "macs"), problem.costs(assignment), strict=True))
        # Layers that no choice touches are not part of a problem's costs; here every layer is touched.
        assert costs["latency"] == pytest.approx(table.rows_us(shapes, {}))
        assert costs["size"] == sum(4 * shape.weights for shape in shapes)
        assert costs["macs"] == sum(shape.macs for shape in shapes)
    errors = [scored.errors[index][1:] for index in range(3)]
    assert all((row > 0).all() for row in errors)
    quality = problem.evaluate(solved)
    assert 0.0 < quality.error < 20.0
    with pytest.raises(MissingLatency, match=r"no latency of dense for layer .* Run: autoprune lut build --resume"):
        make_problem(layers, scored, made_up(space, leave_out=3), budget, sum_us(space))
    with pytest.raises(BudgetError, match="memory is not a budget for channels"):
        make_problem(layers, scored, table, parse_budget("memory=50%"), 1.0, memory=object())  # type: ignore[arg-type]


def test_error_of_a_group_is_less_with_compensation_than_without(task: Task, tmp_path: Path) -> None:
    space, groups, _ = opened(task, tmp_path)
    scored = score_choices(task, space, Cache(tmp_path), Silent(), groups)
    choices = space.coupling.expanded({"inner": Channels(0.25)})
    whole = scored.evaluator.quality(choices)
    assert scored.database.channels is not None
    scored.database.channels._moments = {}
    scored.database.channels._made.clear()
    assert whole.error < scored.evaluator.quality(choices).error


def test_a_whole_search_ends_with_the_smaller_network(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(OPEN, encoding="utf-8")
    with quick_measurements():
        result = autoprune.search(
            task.model, task, budget="params=50%", space=str(path), agent="auto", evaluations=8, runs_dir=tmp_path,
            run="one",
        )  # fmt: skip
    run = RunDir(tmp_path / "one")
    policy = Policy.load(run.policy)
    assert result.met
    chosen = result.row("chosen")
    assert chosen is not None
    assert chosen.measured is not None
    assert chosen.measured.params_ratio <= 0.5005
    assert policy.choice("stem") == policy.choice("outer")
    model = copy.deepcopy(task.model)
    load_weights(model, run.weights)
    smaller = autoprune.compact(model, policy, task.example)
    weights = sum(p.numel() for n, p in smaller.named_parameters() if p.dim() > 1)
    assert weights <= 0.5005 * sum(p.numel() for p in task.model.parameters() if p.dim() > 1)
    assert chosen.predicted.params_ratio == pytest.approx(chosen.measured.params_ratio, abs=0.02)
    assert difference(outputs(model, task.example), outputs(smaller, task.example)) <= 1e-5
    assert {row.name: row.density for row in result.layers}["down"] < 1.0
