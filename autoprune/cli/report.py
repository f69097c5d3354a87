"""``autoprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from autoprune.core.result import Result
    from autoprune.core.rundir import RunDir


def report(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Name of a run, or the path of its folder.", show_default=False),
    ] = None,
    run: options.RunRead = None,
    runs_dir: options.RunsDir = Path("runs"),
    batch: options.BatchRead = None,
    threads: options.ThreadsRead = None,
    seed: options.SeedRead = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a finished search's HTML report again, and show its closing table."""
    from autoprune.core.rundir import RunDir, check_made_with
    from autoprune.report.html import write_report

    given = options.one_of("RUN", name, "--run", run)
    folder = RunDir.existing(runs_dir, run) if run is not None else RunDir.find(runs_dir, given)
    result = _load(folder)
    made = {**result.context, "seed": result.seed}
    check_made_with(f"run {folder.path}", made, {"batch": batch, "threads": threads, "seed": seed})
    paths = {"report": write_report(folder)}
    if as_json:
        from autoprune.cli.record import print_result_record

        print_result_record(result, paths)
        return
    from autoprune.cli.table import print_result

    print_result(result, paths)


def _load(folder: RunDir) -> Result:
    from autoprune.core.errors import RunError
    from autoprune.core.result import Result

    if folder.training.exists() and not folder.result.exists():
        raise RunError(f"run {folder.path} is a training, which has no report; its figures are in {folder.training}.")
    return Result.load(folder.result)
