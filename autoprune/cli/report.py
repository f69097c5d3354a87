"""``autoprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli import options


def report(
    run: Annotated[str, typer.Argument(help="Name of a run, or the path of its folder.")],
    runs_dir: options.RunsDir = Path("runs"),
    debug: options.Debug = False,
) -> None:
    """Write a finished search's HTML report again, and show its closing table."""
    from autoprune.cli.table import print_result
    from autoprune.core.result import Result
    from autoprune.core.rundir import RunDir
    from autoprune.report.html import write_report

    folder = RunDir.find(runs_dir, run)
    path = write_report(folder)
    print_result(Result.load(folder.result), {"report": path})
