"""Run folders: nothing leaves them, nothing is half written, nothing is silently reused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.errors import RunError
from autoprune.core.rundir import Cache, RunDir, atomic_path, run_name, write_text

_CONFIG = {"budget": "latency=50%", "seed": 0}


@pytest.mark.parametrize("name", ["..", "../other", "a/b", "/etc", "", ".hidden", "a\n", "a b", "x" * 129, "~"])
def test_name_never_leaves_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="--run"):
        RunDir.open(tmp_path / "runs", name, _CONFIG)
    assert not (tmp_path / "runs").exists()


def test_same_configuration_continues_the_run(tmp_path: Path) -> None:
    first = RunDir.open(tmp_path, "one", {**_CONFIG, "shape": (1, 28)})
    write_text(first.policy, "kept")
    again = RunDir.open(tmp_path, "one", {**_CONFIG, "shape": [1, 28]})
    assert again.policy.read_text() == "kept"


def test_other_configuration_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    RunDir.open(tmp_path, "one", _CONFIG)
    with pytest.raises(RunError, match=r"seed: 0, now 1\).*--fresh"):
        RunDir.open(tmp_path, "one", {**_CONFIG, "seed": 1})


def test_setting_that_a_newer_version_added_as_none_continues_the_run(tmp_path: Path) -> None:
    RunDir.open(tmp_path, "one", _CONFIG)
    RunDir.open(tmp_path, "one", {**_CONFIG, "added": None})
    with pytest.raises(RunError, match=r"added: None, now 'x'"):
        RunDir.open(tmp_path, "one", {**_CONFIG, "added": "x"})


def test_fresh_sets_the_old_run_aside(tmp_path: Path) -> None:
    for seed in range(3):
        run = RunDir.open(tmp_path, "one", {**_CONFIG, "seed": seed}, fresh=True)
        assert not run.policy.exists()
        write_text(run.policy, str(seed))
    texts = {path.name: (path / "policy.json").read_text() for path in tmp_path.iterdir()}
    assert texts == {"one": "2", "one.old-1": "0", "one.old-2": "1"}


def test_fresh_on_a_new_name_is_just_a_new_run(tmp_path: Path) -> None:
    RunDir.open(tmp_path, "one", _CONFIG, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="choose another --runs-dir"):
        RunDir.open(tmp_path / "runs", "one", _CONFIG)


def test_unwritable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write anywhere, so a folder's mode alone would prove nothing
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RunError, match="not writable; choose another --runs-dir"):
        RunDir.open(tmp_path, "one", _CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    run = RunDir.open(tmp_path, "one", _CONFIG)
    run.config.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        RunDir.open(tmp_path, "one", _CONFIG)


def test_absent_file_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(RunError, match=r"references\.json: cannot be read"):
        run.read_json(run.references)


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_into_an_absent_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="choose another folder"):
        write_text(tmp_path / "absent" / "policy.json", "x")


def test_find_takes_a_name_or_a_path(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "runs", "one", _CONFIG)
    assert RunDir.find(tmp_path / "runs", "one").path == run.path
    assert RunDir.find(tmp_path / "elsewhere", str(run.path)).path == run.path


def test_find_names_the_runs_there_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there are no runs"):
        RunDir.find(tmp_path / "runs", "one")
    RunDir.open(tmp_path / "runs", "one", _CONFIG)
    with pytest.raises(RunError, match="newest runs: one"):
        RunDir.find(tmp_path / "runs", "two")


@given(st.lists(st.one_of(st.text(max_size=60), st.integers()), min_size=1, max_size=4))
def test_default_name_is_always_allowed(tmp_path_factory: pytest.TempPathFactory, parts: list[object]) -> None:
    root = tmp_path_factory.mktemp("runs")
    run = RunDir.open(root, run_name(*parts), _CONFIG)
    assert run.path.parent == root
    assert json.loads(run.config.read_text()) == _CONFIG


def test_default_name_stays_readable() -> None:
    assert run_name("resnet20", "latency=50%,params=25%", "auto", "s0") == "resnet20-latency=50%_params=25%-auto-s0"


def test_every_file_of_a_run_lies_in_its_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    properties = [name for name, value in vars(RunDir).items() if isinstance(value, property)]
    paths = [getattr(run, name) for name in properties] + [run.tuned("best")]
    assert len(properties) > 5
    assert all(path.parent == tmp_path for path in paths)
    assert len(set(paths)) == len(paths)


def test_cache_gives_back_what_was_stored_by_its_key(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write_errors("a", {"x": [0.0, 0.5], "y": [0.25]})
    assert Cache(tmp_path).read_errors("a") == {"x": [0.0, 0.5], "y": [0.25]}
    assert cache.read_errors("b") == {}
    paths = {make(key) for make in (cache.database, cache.table, cache.references) for key in ("a", "b")}
    assert len(paths) == 6


@pytest.mark.parametrize("text", ["", "{\"x\": [0.0", "3", "[]", "{\"x\": 1}"])
def test_damaged_cache_entry_counts_as_absent(tmp_path: Path, text: str) -> None:
    cache = Cache(tmp_path)
    cache.write_errors("a", {"x": [0.0]})
    (path,) = (tmp_path / ".cache").iterdir()
    path.write_text(text)
    assert cache.read_errors("a") == {}


def test_cache_is_no_run(tmp_path: Path) -> None:
    Cache(tmp_path)
    with pytest.raises(RunError, match="there are no runs"):
        RunDir.find(tmp_path, "one")


def test_cache_in_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="choose another --runs-dir"):
        Cache(tmp_path / "runs")
