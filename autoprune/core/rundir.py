"""The only module that names files under ``runs/``. Every write is temp file + fsync + rename."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from autoprune.core.errors import RunError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=%@+-]{0,127}")
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._=%@+-]+")


def run_name(*parts: object) -> str:
    """Return a run's default name: the parts joined by ``-``, what no folder name may hold replaced by ``_``."""
    name = _NOT_IN_NAME.sub("_", "-".join(str(part) for part in parts)).lstrip("._=%@+-")
    return name[:128] or "run"


def make_folder(path: Path) -> None:
    """Make a folder below the folder of runs, if it is absent.

    Raises:
        RunError: It cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make run folder {path}: {error.strerror}; choose another --runs-dir.") from None
    if not os.access(path, os.W_OK):
        raise RunError(f"run folder {path} is not writable; choose another --runs-dir.")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and takes its place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it 0600; results are for sharing
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically.

    Raises:
        RunError: The folder cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose another folder or free the disk.") from None


def table_path(root: Path, name: str) -> Path:
    """Return where a latency table that belongs to no run is kept."""
    return root / "tables" / f"{name}.json"


def check_made_with(what: str, made: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Refuse settings that are not those a thing was made with.

    Args:
        what: The thing, in the words of the error message.
        made: Its settings, by flag.
        wanted: By flag; None is not compared.
    Raises:
        RunError: Naming the first setting that differs, or that the thing does not tell.
    """
    for flag, want in wanted.items():
        if want is None or made.get(flag) == want:
            continue
        told = f"was made with --{flag} {made[flag]}, not {want}" if flag in made else f"does not tell its {flag}"
        raise RunError(f"{what} {told}; leave --{flag} out, or give another one.")


class RunDir:
    """One run's folder.

    Args:
        path: The folder; made by ``open``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def open(root: Path, name: str, config: Mapping[str, object], *, fresh: bool = False) -> RunDir:
        """Return the run's folder, made if absent; an existing one must hold the same configuration.

        Args:
            root: The folder of all runs.
            name: One path segment.
            config: What determines the run's result; JSON values.
            fresh: Set an existing run aside (renamed ``NAME.old-K``) and start over.
        Raises:
            RunError: The name leaves ``root``, the folder is unwritable, or it holds another configuration.
        """
        run = RunDir.named(root, name)
        if fresh and run.path.exists():
            run._set_aside()
        make_folder(run.path)
        run._check_config(config)
        return run

    @staticmethod
    def named(root: Path, name: str) -> RunDir:
        """Return the run of that name, whether there is a folder or not; none is made.

        Raises:
            RunError: The name leaves ``root``.
        """
        if not _NAME.fullmatch(name):
            raise RunError(f"--run {name!r}: one name of letters, digits and . _ - = % @ +, inside {root}/.")
        return RunDir(root / name)

    @staticmethod
    def existing(root: Path, name: str) -> RunDir:
        """Return the run of that name, which may lack a configuration as yet.

        Raises:
            RunError: The name leaves ``root``, or there is no such folder; the newest runs are named.
        """
        run = RunDir.named(root, name)
        return run if run.path.is_dir() else RunDir.find(root, name)

    @staticmethod
    def find(root: Path, run: str) -> RunDir:
        """Return an existing run, given its name under ``root`` or the path of its folder.

        Raises:
            RunError: There is no such run; the newest of those that exist are named.
        """
        for path in (root / run, Path(run)):
            if (path / "config.json").is_file():
                return RunDir(path)
        found = root.glob("*/config.json") if root.is_dir() else iter(())
        names = [path.parent.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]
        known = f"newest runs: {', '.join(names[:5])}" if names else "there are no runs; make one: autoprune search"
        raise RunError(f"no run '{run}' in {root}/: {known}.")

    def _set_aside(self) -> None:
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        try:
            self.path.rename(target)
        except OSError as error:
            raise RunError(f"cannot set {self.path} aside: {error.strerror}; choose another --runs-dir.") from None

    def _check_config(self, config: Mapping[str, object]) -> None:
        new = json.loads(json.dumps(config))
        if not self.config.exists():
            write_text(self.config, json.dumps(new, indent=2, sort_keys=True) + "\n")
            return
        old = self.read_json(self.config)
        first = next((key for key in sorted({*old, *new}) if old.get(key) != new.get(key)), None)
        if first is None:
            return
        raise RunError(
            f"run folder {self.path} holds another configuration "
            f"({first}: {old.get(first)!r}, now {new.get(first)!r}); "
            "give another --run name, or --fresh to start over."
        )

    def read_json(self, path: Path) -> dict[str, object]:
        """Return a JSON object of this run.

        Raises:
            RunError: It is absent or damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror}).") from None
        except ValueError:
            raise RunError(f"{path} is damaged; delete it to have it made again, or start over with --fresh.") from None
        if not isinstance(data, dict):
            raise RunError(f"{path} is damaged: not a JSON object; start over with --fresh.")
        return data

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def policy(self) -> Path:
        """The chosen policy."""
        return self.path / "policy.json"

    @property
    def study(self) -> Path:
        """The Optuna study (SQLite)."""
        return self.path / "study.db"

    @property
    def table(self) -> Path:
        """The latency table the search used."""
        return self.path / "table.json"

    @property
    def references(self) -> Path:
        """Latency of every dense execution tried."""
        return self.path / "references.json"

    @property
    def aim(self) -> Path:
        """Factor on the latency budget that makes deployed networks meet it."""
        return self.path / "aim.json"

    @property
    def result(self) -> Path:
        """Everything the report shows."""
        return self.path / "result.json"

    @property
    def training(self) -> Path:
        """What a training came to."""
        return self.path / "training.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def weights(self) -> Path:
        """Fine-tuned weights of the chosen policy, or the last trained weights."""
        return self.path / "weights.safetensors"

    @property
    def metrics(self) -> Path:
        """Metrics per epoch of a training."""
        return self.path / "metrics.csv"

    @property
    def checkpoint(self) -> Path:
        """The training's resumable state."""
        return self.path / "checkpoint.pt"

    @property
    def comparison(self) -> Path:
        """What a comparison of agents came to."""
        return self.path / "comparison.json"

    def cell(self, label: str) -> Path:
        """One finished cell of a comparison; its folder is made."""
        folder = self.path / "cells"
        make_folder(folder)
        return folder / f"{run_name(label)}.json"

    @property
    def front(self) -> Path:
        """Every policy that no other undercuts in error and cost."""
        return self.path / "front.json"

    @property
    def sensitivity(self) -> Path:
        """Error of each layer's choices, the others left dense."""
        return self.path / "sensitivity.json"

    @property
    def guard(self) -> Path:
        """Accuracy asked for beyond a constraint's."""
        return self.path / "guard.json"

    @property
    def family_record(self) -> Path:
        """How each network of a family of models came about."""
        return self.path / "family.json"

    def family(self, number: int) -> Path:
        """Weights of one network of a family, from 1."""
        return self.path / f"family-{number:03d}.safetensors"

    def tuned(self, label: str) -> Path:
        """Fine-tuned weights of one candidate policy."""
        return self.path / f"tuned-{label}.safetensors"


class Cache:
    """What several runs share: measurements and layer databases, by a key of all they depend on."""

    FOLDER = ".cache"

    def __init__(self, runs_dir: Path) -> None:
        self._folder = runs_dir / self.FOLDER
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make {self._folder}: {error.strerror}; choose another --runs-dir.") from None

    def database(self, key: str) -> Path:
        """Folder of the layer database of one model and its data."""
        return self._folder / f"database-{key}"

    def table(self, key: str) -> Path:
        """Latency table of one context and space."""
        return self._folder / f"table-{key}.json"

    def references(self, key: str) -> Path:
        """Latencies of the dense executions of one model in one context."""
        return self._folder / f"references-{key}.json"

    def aim(self, key: str) -> Path:
        """Factor on one latency budget, found by deploying."""
        return self._folder / f"aim-{key}.json"

    def steps(self, key: str) -> Path:
        """Times of training steps, per layer, direction and kernel, in one context."""
        return self._folder / f"steps-{key}.json"

    def _errors(self, key: str) -> Path:
        return self._folder / f"errors-{key}.json"

    def read_errors(self, key: str) -> dict[str, list[float]]:
        """Return the stored single-layer errors, layer → one per choice; empty when there are none that can be read."""
        try:
            rows: object = json.loads(self._errors(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return rows if isinstance(rows, dict) and all(isinstance(row, list) for row in rows.values()) else {}

    def write_errors(self, key: str, rows: Mapping[str, list[float]]) -> None:
        """Store single-layer errors."""
        write_text(self._errors(key), json.dumps(rows))
