"""A refused command leaves the folder of runs as it found it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from autoprune.core.errors import AutopruneError
from autoprune.core.rundir import Cache, RunDir


@contextlib.contextmanager
def undone_when_refused(root: Path, name: str) -> Iterator[None]:
    """Undo the run folder of a command that is refused for bad input before it did any work.

    What is undone: a folder made meanwhile that holds nothing but inputs, and the setting aside of an older run.

    Args:
        root: The folder of all runs.
        name: The run's name.
    """
    missing = [path for path in (root, *root.parents) if not path.exists()]
    before = _names(root)
    try:
        yield
    except AutopruneError as error:
        if error.exit_code == AutopruneError.exit_code:
            _undo(root, name, before)
            for path in missing:
                with contextlib.suppress(OSError):  # not empty, or never made
                    path.rmdir()
        raise


def _names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} if root.is_dir() else set()


def _undo(root: Path, name: str, before: set[str]) -> None:
    now = _names(root)
    run = RunDir(root / name)
    aside = [path for path in sorted(now - before) if path.startswith(f"{name}.old-")]
    new = name in now and (name not in before or bool(aside))
    if new and _names(run.path) <= {run.config.name, run.policy.name}:
        run.config.unlink(missing_ok=True)
        run.policy.unlink(missing_ok=True)
        run.path.rmdir()
        if aside:
            (root / aside[-1]).rename(run.path)
    if Cache.FOLDER in now - before:
        with contextlib.suppress(OSError):  # it holds measurements: they are true whoever asked
            (root / Cache.FOLDER).rmdir()
