"""What a command works on: a policy and its weights, given as files or as a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoprune.cli import options


@dataclass(frozen=True, slots=True)
class Subject:
    """A policy's file, the weights (None: the package's), and the settings it was made with."""

    policy: Path
    weights: Path | None
    data: str
    batch: int
    threads: int


def subject_of(policy: Path | None, run: str | None, runs_dir: Path) -> Subject:
    """Return the subject of ``--policy`` or ``--run``.

    Raises:
        RunError: Both were given or neither, or the run is not finished.
    """
    from autoprune.core.errors import RunError
    from autoprune.core.rundir import RunDir

    options.one_of("--policy", policy, "--run", run)
    if run is None:
        assert policy is not None
        return Subject(policy, None, "fashion-mnist", 1, 1)
    folder = RunDir.existing(runs_dir, run)
    for path in (folder.policy, folder.weights):
        if not path.exists():
            raise RunError(
                f"run {folder.path} has no {path.name}: it is not finished, or trained without a policy; give its "
                "command again, or another --run."
            )
    made = folder.read_json(folder.config)
    # A training's configuration leaves batch and threads out: they do not change what is trained.
    batch, threads = (value if isinstance(value := made.get(key), int) else 1 for key in ("batch", "threads"))
    return Subject(folder.policy, folder.weights, str(made.get("data", "fashion-mnist")), batch, threads)
