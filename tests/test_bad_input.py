"""Bad input is one line that says what is wrong, exit code 2, nothing on stdout, and nothing lost or made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoprune.cli.main import run as cli
from autoprune.core.choices import Block
from autoprune.core.policy import Policy
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir, write_text
from autoprune.lut.table import LatencyTable, Row, current_context
from autoprune.search.config import SearchConfig
from autoprune.search_spaces.trace import trace
from autoprune.tasks.task import load_task

SPACE = """
name: mine
rules:
  - match: {{op: conv}}
    choices:
      - {choice}
"""
SEARCH = ["search", "--budget", "latency=50%"]
TRAIN = ["train", "--embedded"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to be given to commands: good ones, and each broken in one way."""
    folder = tmp_path_factory.mktemp("in")
    task = load_task("resnet20", "fashion-mnist")
    layers = trace(task.model, task.example)
    policy = Policy.make({"layer1.0.conv1": Block(keep=0.25)}, layers, model="resnet20", budget="latency=50%")
    policy.save(folder / "policy.json")
    text = (folder / "policy.json").read_text()
    record = json.loads(text)
    broken = {
        "newer": {**record, "schema_version": 99},
        "key": {**record, "colour": "red"},
        "choice": {**record, "choices": {"layer1.0.conv1": "blok(keep=0.25)"}},
        "layer": {**record, "choices": {"layer9.conv1": "block(filters=16,keep=0.25)"}},
        "other": {**record, "model": "resnet32"},
    }
    for name, content in broken.items():
        write_text(folder / f"policy-{name}.json", json.dumps(content))
    write_text(folder / "policy-cut.json", text[: len(text) // 2])
    row = Row(p10=1.0, p50=1.0, p90=1.0, weight_bytes=4, kernel="made-up")
    here = current_context(1, 1)
    contexts = {
        "here": here,
        "machine": here.model_copy(update={"cpu": "another processor"}),
        "batch": current_context(8, 1),
        "threads": current_context(1, 2),
    }
    for name, context in contexts.items():
        LatencyTable(context, {("linear-o10-i64", "dense"): row}).save(folder / f"table-{name}.json")
    write_text(folder / "table-cut.json", (folder / "table-here.json").read_text()[:100])
    write_text(folder / "field.yaml", SPACE.format(choice="{kind: block, keep: [0.5, 1.5]}"))
    write_text(folder / "kind.yaml", SPACE.format(choice="{kind: blok, keep: 0.5}"))
    write_text(folder / "cut.yaml", "name: mine\nrules: [")
    return folder


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Return a function that gives a command in ``tmp_path`` and returns the one line it is refused by."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def give(argv: list[str]) -> str:
        before = _tree(tmp_path)
        assert cli([part.replace("IN/", f"{inputs}/") for part in argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("autoprune: ")
        assert _tree(tmp_path) == before
        return line

    return give


@pytest.mark.parametrize(
    ("budget", "part"),
    [
        ("latency=50", "add a unit: 'latency=50%'"),
        ("params=25", "add a unit: 'params=25%'"),
        ("latency=-5ms", "must be above 0"),
        ("latency=0%", "above 0 %"),
        ("latency=101%", "at most 100 %"),
        ("latenzy=50%", "Did you mean 'latency'?"),
        ("speedup=0.5x", "at least 1x"),
        ("latency=fast", "not a number"),
        ("latency=", "a value is missing"),
        ("latency=50%,speedup=3x", "given twice"),
        ("", "empty"),
    ],
)
def test_budget(refused: Refused, budget: str, part: str) -> None:
    assert part in refused(["search", "--budget", budget])


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([*SEARCH, "--agent", "tpee"], "no agent 'tpee'. Did you mean 'tpe'?"),
        ([*SEARCH, "--model", "resnet200"], "no model 'resnet200'. Did you mean 'resnet20'?"),
        ([*SEARCH, "--data", "fashion-mnits"], "no data set 'fashion-mnits'. Did you mean 'fashion-mnist'?"),
        ([*SEARCH, "--space", "cpu-defualt"], "no search space 'cpu-defualt'. Did you mean 'cpu-default'?"),
        ([*TRAIN, "--trainer", "clicktrian"], "no trainer 'clicktrian'. Did you mean 'clicktrain'?"),
        ([*TRAIN, "--model", "resnet200"], "no model 'resnet200'. Did you mean 'resnet20'?"),
        ([*TRAIN, "--data", "fashion-mnits"], "no data set 'fashion-mnits'. Did you mean 'fashion-mnist'?"),
        (["lut", "build", "--model", "resnet200"], "no model 'resnet200'. Did you mean 'resnet20'?"),
        (["lut", "build", "--data", "fashion-mnits"], "no data set 'fashion-mnits'. Did you mean 'fashion-mnist'?"),
        (["lut", "build", "--space", "cpu-defualt"], "no search space 'cpu-defualt'. Did you mean 'cpu-default'?"),
        (["bench", "--policy", "IN/policy.json", "--data", "fashion-mnits"], "Did you mean 'fashion-mnist'?"),
    ],
)
def test_unknown_name_gets_the_nearest_known_one(refused: Refused, argv: list[str], part: str) -> None:
    assert part in refused(argv)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([*TRAIN, "--model", "resnet32", "--policy", "IN/policy.json"], "policy is for model 'resnet20'"),
        ([*TRAIN, "--policy", "IN/policy-layer.json"], "its layer 'layer9.conv1' is not in this model"),
        ([*TRAIN, "--policy", "IN/policy-newer.json"], "schema version 99 is newer than"),
        ([*TRAIN, "--policy", "IN/policy-cut.json"], "not complete JSON"),
        ([*TRAIN, "--policy", "IN/policy-key.json"], "field 'colour'"),
        ([*TRAIN, "--policy", "IN/policy-choice.json"], "Did you mean 'block'?"),
        ([*TRAIN, "--policy", "absent.json"], "absent.json: cannot be read"),
        ([*TRAIN, "--policy", "IN/policy.json", "--init", "absent.safetensors"], "weights absent.safetensors"),
        (["train", "--policy", "IN/policy.json", "--data-dir", "absent"], "--data-dir absent: no such folder"),
        (["bench", "--policy", "IN/policy-newer.json"], "schema version 99 is newer than"),
        (["bench", "--policy", "IN/policy-cut.json"], "not complete JSON"),
        (["bench", "--policy", "IN/policy-key.json"], "field 'colour'"),
        (["bench", "--policy", "IN/policy-layer.json"], "its layer 'layer9.conv1' is not in this model"),
        (["bench", "--policy", "IN/policy-other.json"], "no trained weights of 'resnet32'"),
        (["bench", "--policy", "IN/policy.json", "--weights", "IN/policy.json"], "cannot be read as safetensors"),
        (["bench", "--policy", "absent.json"], "absent.json: cannot be read"),
        (["bench"], "--policy and --run: got neither"),
        (["bench", "--policy", "IN/policy.json", "--run", "a"], "--policy and --run: got both"),
    ],
)
def test_policy(refused: Refused, argv: list[str], part: str) -> None:
    assert part in refused(argv)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([*SEARCH, "--table", "IN/table-machine.json"], "on another processor (1 threads), so it can only predict"),
        ([*SEARCH, "--table", "IN/table-batch.json"], "measured with batch 8, wanted 1"),
        ([*SEARCH, "--table", "IN/table-threads.json"], "so it can only predict, and it is not calibrated"),
        ([*SEARCH, "--table", "h900"], "--table h900: no such file, and no embedded table of that name"),
        ([*SEARCH, "--table", "IN/table-here.json"], "rows absent (first: "),
        ([*SEARCH, "--table", "IN/table-cut.json"], "latency table"),
        ([*SEARCH, "--table", "absent.json"], "absent.json: cannot be read"),
        (["lut", "show", "IN/table-batch.json", "--batch", "1"], "was made with --batch 8, not 1"),
        (["lut", "show", "IN/table-batch.json", "--threads", "2"], "was made with --threads 1, not 2"),
        (["lut", "show", "IN/table-here.json", "--seed", "0"], "does not tell its seed"),
        (["lut", "show", "IN/table-cut.json"], "latency table"),
        (["lut", "show"], "FILE and --run: got neither"),
        (["lut", "show", "IN/table-here.json", "--run", "a"], "FILE and --run: got both"),
        (["lut", "build", "--out", "IN/table-here.json"], "--resume keeps its rows"),
        (["lut", "build", "--out", "IN/table-machine.json", "--resume"], "measured with cpu 'another processor'"),
        (["lut", "build", "--out", "IN/table-batch.json", "--resume"], "measured with batch 8, wanted 1"),
        (["lut", "build", "--out", "absent/table.json"], "absent is no folder"),
        (["lut", "build", "--limit", "8"], "--limit '8': write a time above 0 with its unit"),
        (["lut", "build", "--limit", "0m"], "--limit '0m': write a time above 0 with its unit"),
        (["lut", "build", "--batches", "1,x"], "--batches: 'x' is no batch size"),
        (["lut", "build", "--models", " , "], "--models ' , ': empty"),
        (["lut", "build", "--models", "resnet20,resnet200"], "no model 'resnet200'. Did you mean 'resnet20'"),
        (["lut", "build", "--model", "torchvision:resnet5"], "no torchvision model 'resnet5'. Did you mean"),
        (["lut", "build", "--model", "resnet20@3x32"], "must be CHANNELSxHEIGHTxWIDTH"),
        (["lut", "build", "--run", "r", "--batches", "1,2"], "--run takes one table"),
    ],
)
def test_latency_table(refused: Refused, argv: list[str], part: str) -> None:
    assert part in refused(argv)


@pytest.mark.parametrize("command", [SEARCH, ["lut", "build"]])
@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("IN/field.yaml", "field 'rules.0.choices.0.block.keep.1'"),
        ("IN/kind.yaml", "field 'rules.0.choices.0'"),
        ("IN/cut.yaml", "not YAML at line"),
        ("absent.yaml", "absent.yaml: cannot be read"),
    ],
)
def test_search_space(refused: Refused, command: list[str], file: str, part: str) -> None:
    assert part in refused([*command, "--space", file])


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([*SEARCH, "--device", "cuda"], "finds no NVIDIA GPU on this machine; use --device cpu"),
        ([*SEARCH, "--device", "tpu"], "--device 'tpu'"),
        (["lut", "build", "--device", "cuda"], "finds no NVIDIA GPU on this machine; use --device cpu"),
        (["lut", "build", "--device", "tpu"], "--device 'tpu'"),
        ([*SEARCH, "--bogus"], "--bogus"),
        ([*SEARCH, "--threads", "63"], "--threads"),
        ([*SEARCH, "--seed", "-1"], "--seed"),
        ([*SEARCH, "--seed", str(2**32)], "--seed"),
        ([*SEARCH, "--evaluations", "0"], "--evaluations"),
        ([*SEARCH, "--batch", "1.5"], "--batch"),
        ([*SEARCH, "--data-dir", "absent"], "--data-dir absent: no such folder"),
        ([*TRAIN, "--epochs", "0"], "--epochs"),
        ([*TRAIN, "--set", "lasso=1e-3"], "--set lasso=1e-3: dense training has no such settings"),
        ([*TRAIN, "--policy", "IN/policy.json", "--set", "laso=1e-3"], "Did you mean 'lasso'?"),
        ([*TRAIN, "--policy", "IN/policy.json", "--set", "lasso"], "write it as lasso=value"),
        ([*TRAIN, "--policy", "IN/policy.json", "--set", "lasso=much"], "must be a number"),
        ([*TRAIN, "--policy", "IN/policy.json", "--set", "hard_epoch=99"], "hard_epoch=99"),
        ([*TRAIN, "--policy", "IN/policy.json", "--set", "balance=equal"], "balance='equal'"),
        (["bench", "--policy", "IN/policy.json", "--seconds", "0"], "--seconds"),
        (["report"], "RUN and --run: got neither"),
        (["report", "a", "--run", "a"], "RUN and --run: got both"),
        (["report", "a"], "there are no runs; make one: autoprune search"),
        (["bogus"], "bogus"),
    ],
)
def test_flag(refused: Refused, argv: list[str], part: str) -> None:
    assert part in refused(argv)


@pytest.mark.parametrize("name", ["../x", "/tmp/autoprune-outside", "a/b", ".."])
@pytest.mark.parametrize(
    "command", [SEARCH, TRAIN, ["lut", "build"], ["lut", "show"], ["bench"], ["report"]], ids=" ".join
)
def test_run_name_never_leaves_the_folder_of_runs(refused: Refused, command: list[str], name: str) -> None:
    assert f"--run '{name}': one name" in refused([*command, "--run", name])
    assert not Path("/tmp/autoprune-outside").exists()


@pytest.mark.parametrize("command", [SEARCH, TRAIN, ["lut", "build"], ["lut", "build", "--run", "a"]], ids=" ".join)
def test_file_in_the_place_of_the_folder_of_runs(refused: Refused, tmp_path: Path, command: list[str]) -> None:
    write_text(tmp_path / "runs", "a file")
    assert "cannot make run folder runs/" in refused(command)


@pytest.fixture
def finished(tmp_path: Path, result: Result, policy: Policy) -> RunDir:
    """A finished search ``runs/a`` of seed 0, as the search command itself would leave it."""
    config = SearchConfig(budget="latency=50%", run="a", runs_dir=tmp_path / "runs")
    run = RunDir.open(config.runs_dir, "a", config.resolved())
    result.save(run.result)
    policy.save(run.policy)
    return run


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([*SEARCH, "--run", "a", "--seed", "1"], "another configuration (seed: 0, now 1)"),
        (["search", "--budget", "latency=40%", "--run", "a"], "(budget: 'latency=50%', now 'latency=40%')"),
        ([*TRAIN, "--run", "a"], "another configuration"),
        (["lut", "build", "--run", "a", "--batch", "8"], "run runs/a was made with --batch 1, not 8"),
        (["lut", "build", "--run", "a", "--model", "vgg11"], "run runs/a was made with --model resnet20, not vgg11"),
        (["lut", "show", "--run", "a"], "table.json: cannot be read"),
        (["lut", "show", "--run", "b"], "no run 'b' in runs/: newest runs: a."),
        (["bench", "--run", "a"], "run runs/a has no weights.safetensors"),
        (["bench", "--run", "b"], "no run 'b' in runs/: newest runs: a."),
        (["report", "b"], "no run 'b' in runs/: newest runs: a."),
        (["report", "a", "--seed", "1"], "run runs/a was made with --seed 0, not 1"),
        (["report", "--run", "a", "--batch", "8"], "run runs/a was made with --batch 1, not 8"),
        (["report", "--run", "a", "--threads", "2"], "run runs/a was made with --threads 1, not 2"),
    ],
)
def test_run_of_another_configuration(refused: Refused, finished: RunDir, argv: list[str], part: str) -> None:
    assert part in refused(argv)


def test_fresh_keeps_the_run_when_the_command_is_refused(refused: Refused, finished: RunDir, inputs: Path) -> None:
    argv = [*SEARCH, "--run", "a", "--fresh", "--table", "IN/table-machine.json"]
    assert "another processor" in refused(argv)
    assert "policy is for model" in refused(
        ["train", "--embedded", "--model", "resnet32", "--policy", "IN/policy.json", "--run", "a", "--fresh"]
    )


@pytest.mark.parametrize("name", ["config.json", "result.json", "policy.json"])
def test_damaged_file_of_a_run(refused: Refused, finished: RunDir, name: str) -> None:
    path = finished.path / name
    write_text(path, path.read_text()[:40])
    command = [*SEARCH, "--run", "a"] if name == "config.json" else ["report", "a"]
    assert name in refused(command)


def test_training_has_no_report(refused: Refused, finished: RunDir) -> None:
    shutil.move(finished.result, finished.training)
    assert "runs/a is a training, which has no report" in refused(["report", "a"])


def test_unfinished_search_has_no_report(refused: Refused, finished: RunDir) -> None:
    finished.result.unlink()
    assert "the search is not finished" in refused(["report", "a"])
