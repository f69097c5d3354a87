"""The command line: flags reach the engine, every error is one line and an exit code, stdout stays clean."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune.cli.main import run as cli
from autoprune.cli.progress import Bars, Lines, make_progress, steps
from autoprune.cli.record import print_record
from autoprune.core.errors import AutopruneError, InfeasibleBudget, MeasurementError
from autoprune.core.front import Front, FrontPoint
from autoprune.core.policy import Policy
from autoprune.core.progress import Progress
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir
from autoprune.report.summary import verdict
from autoprune.search.config import SearchConfig

_ROOT = Path(__file__).parent.parent


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch, result: Result, policy: Policy) -> list[SearchConfig]:
    """Replace the search by one that only writes the fixture's result; returns the configurations it was given."""
    asked: list[SearchConfig] = []

    def run_search(config: SearchConfig, progress: Progress) -> Result:
        asked.append(config)
        progress.stage("search", 2)
        progress.advance(2)
        folder = RunDir.open(config.runs_dir, config.name, config.resolved())
        result.save(folder.result)
        policy.save(folder.policy)
        return result

    monkeypatch.setattr("autoprune.search.pipeline.run_search", run_search)
    return asked


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run_search(config: SearchConfig, progress: Progress) -> Result:
        progress.stage("search", 2)
        raise error

    monkeypatch.setattr("autoprune.search.pipeline.run_search", run_search)


def test_every_flag_reaches_the_search(searched: list[SearchConfig], tmp_path: Path) -> None:
    flags = {
        "budget": "latency=50%",
        "model": "vgg11",
        "data": "mnist",
        "data-dir": "d",
        "agent": "tpe",
        "space": "s.yaml",
        "table": "t.json",
        "evaluations": "7",
        "batch": "4",
        "threads": "2",
        "seed": "3",
        "device": "cpu",
        "run": "mine",
        "runs-dir": str(tmp_path),
        "constraint": "accuracy=-1%",
        "set": "warm_starts=8",
    }
    argv = ["search", "--fresh", *(part for name, value in flags.items() for part in (f"--{name}", value))]
    assert cli(argv) == 0
    assert searched == [
        SearchConfig(
            budget="latency=50%",
            model="vgg11",
            data="mnist",
            data_dir=Path("d"),
            agent="tpe",
            space="s.yaml",
            table="t.json",
            evaluations=7,
            batch=4,
            threads=2,
            seed=3,
            device="cpu",
            run="mine",
            runs_dir=tmp_path,
            fresh=True,
            constraint="accuracy=-1%",
            settings={"warm_starts": 8},
        )
    ]


def test_an_objective_takes_its_own_agent_unless_one_is_named(searched: list[SearchConfig], tmp_path: Path) -> None:
    argv = ["search", "--objective", "accuracy,latency", "--runs-dir", str(tmp_path)]
    assert cli(argv) == 0
    assert cli([*argv, "--agent", "spdy", "--run", "other"]) == 0
    assert [config.agent for config in searched] == ["nsga2", "spdy"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["search"], "nothing is asked for; give --budget"),
        (["search", "--constraint", "accuracy=-0.5"], "add the unit"),
        (["search", "--objective", "accuracy,latancy"], "Did you mean 'latency'"),
        (["search", "--budget", "latency=50%", "--agent", "tpe", "--set", "spaze=choices"], "Did you mean 'space'"),
        (["search", "--budget", "latency=50%", "--agent", "random", "--set", "a=1"], "has no settings"),
        (["pareto", "none", "--export", "1"], "--export and --out: got one of them"),
        (["pareto"], "got neither"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_made(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli([*argv, "--runs-dir", str(tmp_path / "runs")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_pareto_lists_a_runs_front(run: RunDir, policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    predicted = policy.file.predicted
    point = FrontPoint(trial=7, proposer="nsga2", error=0.031, accuracy=0.91, costs={"latency": 1.0, "size": 2500.0},
                       predicted=predicted, choices=dict(policy.file.choices))
    where = ["--runs-dir", str(run.path.parent)]
    assert cli(["pareto", "made-up", *where]) == 2
    assert "no " in capsys.readouterr().err
    Front(objectives=["accuracy", "latency", "size"], points=[point]).save(run.front)
    assert cli(["pareto", "made-up", *where]) == 0
    out = capsys.readouterr().out
    assert "91.00 %" in out
    assert "2.5 KB" in out
    assert "nsga2 (trial 7)" in out
    assert cli(["pareto", "--run", "made-up", "--seed", "5", *where]) == 2


def test_defaults_are_the_configurations_own(searched: list[SearchConfig], tmp_path: Path) -> None:
    assert cli(["search", "--budget", "latency=50%", "--runs-dir", str(tmp_path)]) == 0
    assert searched == [SearchConfig(budget="latency=50%", runs_dir=tmp_path)]


def test_closing_table_shows_rows_verdict_and_files(
    searched: list[SearchConfig], tmp_path: Path, result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["search", "--budget", "latency=50%", "--run", "one", "--runs-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    for row in result.rows:
        assert any(line.lstrip().startswith(row.name) for line in out.splitlines())
    assert verdict(result) in " ".join(out.split())
    for name in result.references:
        assert name in out
    for path in (tmp_path / "one" / "policy.json", tmp_path / "one" / "report.html"):
        assert str(path) in out
        assert path.is_file()
    assert "weights.safetensors" not in out
    assert err.startswith("search: started, 2 steps\nsearch: done in ")


def test_json_is_one_object_alone_on_stdout(
    searched: list[SearchConfig], tmp_path: Path, result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["search", "--budget", "latency=50%", "--json", "--runs-dir", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["met"] is True
    assert record["references"] == result.references
    assert [row["name"] for row in record["rows"]] == [row.name for row in result.rows]
    assert Path(record["paths"]["policy"]).is_file()


@pytest.mark.parametrize(
    "argv", [["search"], ["train"], ["lut", "build"], ["lut", "show"], ["bench"], ["report"], ["pareto"]]
)
def test_every_command_takes_the_common_flags(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([*argv, "--help"]) == 0
    words = capsys.readouterr().out.split()
    for flag in ("--json", "--seed", "--run", "--threads", "--batch", "--debug"):
        assert flag in words


def test_what_a_library_prints_is_not_among_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_search(config: SearchConfig, progress: Progress) -> Result:
        print("chatter")
        return result

    monkeypatch.setattr("autoprune.search.pipeline.run_search", run_search)
    (tmp_path / "one").mkdir()
    result.save(tmp_path / "one" / "result.json")
    argv = ["search", "--budget", "latency=50%", "--run", "one", "--json", "--runs-dir", str(tmp_path)]
    assert cli(argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == "made-up"
    assert "chatter" in err


def test_json_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_record({"ratio": float("nan"), "path": Path("a/b")})
    assert capsys.readouterr().out == '{"ratio":null,"path":"a/b"}\n'


def test_a_finished_run_is_shown_again(tmp_path: Path, result: Result, capsys: pytest.CaptureFixture[str]) -> None:
    config = SearchConfig(budget="latency=50%", run="one", runs_dir=tmp_path)
    folder = RunDir.open(tmp_path, "one", config.resolved())
    result.save(folder.result)
    assert cli(["search", "--budget", "latency=50%", "--run", "one", "--runs-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert verdict(result) in " ".join(out.split())
    assert "is finished; showing its result" in err
    assert {path.name for path in tmp_path.iterdir()} == {"one"}


def test_missed_budget_exits_1_with_its_report(
    monkeypatch: pytest.MonkeyPatch,
    searched: list[SearchConfig],
    tmp_path: Path,
    result: Result,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(result, "met", False)
    assert cli(["search", "--budget", "latency=50%", "--run", "one", "--runs-dir", str(tmp_path)]) == 1
    assert "The budget is missed" in capsys.readouterr().out
    assert (tmp_path / "one" / "report.html").is_file()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (AutopruneError("no such thing."), 2, "autoprune: no such thing."),
        (InfeasibleBudget("latency 120us; the least\nis 143us."), 3, "autoprune: latency 120us; the least is 143us."),
        (MeasurementError("too noisy."), 1, "autoprune: too noisy."),
        (ValueError("odd"), 1, "autoprune: unexpected ValueError: odd. Run it again with --debug for the traceback."),
        (KeyboardInterrupt(), 130, "autoprune: interrupted; the same command resumes where it stopped."),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    _fail_with(monkeypatch, error)
    assert cli(["search", "--budget", "latency=50%"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[2:] == [line]
    assert err.startswith("search: started")


@pytest.mark.parametrize("error", [AutopruneError("no such thing."), ValueError("odd")])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    _fail_with(monkeypatch, error)
    assert cli(["search", "--budget", "latency=50%", "--debug"]) == getattr(error, "exit_code", 1)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["search"], "nothing is asked for; give --budget latency=50%"),
        (["search", "--budget", "latency=50"], "add a unit: 'latency=50%'"),
        (["search", "--budget", "latency=50%", "--batch", "0"], "--batch"),
        (["search", "--budget", "latency=50%", "--bogus"], "--bogus"),
        (["serch"], "serch"),
        (["lut", "sow"], "sow"),
        (["lut", "show", "absent.json"], "absent.json: cannot be read"),
        (["bench", "--policy", "absent.json"], "absent.json: cannot be read"),
        (["train", "--policy", "absent.json"], "absent.json: cannot be read"),
        (["lut", "build", "--device", "tpu"], "--device"),
        (["search", "--budget", "latency=50%", "--device", "tpu"], "--device"),
        (["search", "--budget", "latency=50%", "--agent", "tpee"], "Did you mean 'tpe'?"),
        (["report", "absent"], "no run 'absent'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("autoprune: ")
    assert part in line
    assert list(tmp_path.iterdir()) == []


def test_no_arguments_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([]) == 2
    assert "search" in "".join(capsys.readouterr())


def test_report_is_written_again(run: RunDir, result: Result, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["report", "made-up", "--runs-dir", str(run.path.parent)]) == 0
    assert run.report.is_file()
    assert verdict(result) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flags", [["made-up"], ["--run", "made-up", "--batch", "1", "--threads", "1", "--seed", "0"]])
def test_report_as_json(
    run: RunDir, result: Result, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert cli(["report", *flags, "--json", "--runs-dir", str(run.path.parent)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["met"] is True
    assert record["paths"] == {"report": str(run.report)}
    assert record["context"] == result.context


def test_reader_that_leaves_early_is_no_error(run: RunDir) -> None:
    command = [sys.executable, "-m", "autoprune.cli.main", "report", str(run.path)]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, cwd=_ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def test_ctrl_c_in_a_search_exits_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    # A test command in the background may hand on SIGINT as ignored; a user's terminal does not.
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from autoprune.cli.main import run\n"
        "sys.exit(run(['search', '--budget', 'latency=50%', '--run', 'a', '--runs-dir', sys.argv[1]]))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(argv, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as search:
        assert search.stderr is not None
        assert search.stderr.readline() == "dense references: started\n"
        search.send_signal(signal.SIGINT)
        out, err = search.communicate(timeout=60)
    assert search.returncode == 128 + signal.SIGINT
    assert out == ""
    stage, line = err.splitlines()
    assert stage.startswith("dense references: stopped in ")
    assert line == "autoprune: interrupted; the same command resumes where it stopped."
    assert (tmp_path / "a" / "config.json").is_file()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["train"], "the same command resumes where it stopped"),
        (["lut", "build"], "the same command with --resume keeps the rows measured so far"),
        (["lut", "build", "--resume"], "the same command resumes where it stopped"),
        (["bench", "--policy", "policy.json"], "give the command again"),
    ],
)
def test_ctrl_c_elsewhere_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    def interrupted(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    for name in ("trainers.run.train_policy", "search.tables.untrained"):
        monkeypatch.setattr(f"autoprune.{name}", interrupted)
    monkeypatch.setattr("autoprune.core.policy.Policy.load", interrupted)
    monkeypatch.chdir(tmp_path)
    assert cli(argv) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"autoprune: interrupted; {line}.\n")


def test_plain_progress_is_a_line_per_stage() -> None:
    stream = io.StringIO()
    progress = make_progress(stream)
    assert isinstance(progress, Lines)
    tell = steps(progress, "table")
    tell(3, 10)
    tell(10, 10)
    progress.note("a note")
    progress.stage("search")
    progress.stage("fine-tune", 4)
    progress.advance()
    progress.finish()
    progress.finish()
    assert [line.split(" in ")[0] for line in stream.getvalue().splitlines()] == [
        "table: started, 10 steps",
        "a note",
        "table: done",
        "search: started",
        "search: done",
        "fine-tune: started, 4 steps",
        "fine-tune: 1 of 4 steps",
    ]


def test_bars_show_stages_notes_and_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = make_progress()
    assert isinstance(progress, Bars)
    progress.stage("table", 4)
    progress.advance(3)
    progress.note("[a note]")
    progress.stage("search")
    progress.advance()
    progress.finish()
    progress.finish()
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("table", "search", "[a note]", "3/4", "1/1"):
        assert part in err
