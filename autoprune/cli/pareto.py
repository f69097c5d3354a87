"""``autoprune pareto``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from autoprune.core.front import Front


def pareto(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Name of a run, or the path of its folder.", show_default=False),
    ] = None,
    export: Annotated[
        int | None, typer.Option(min=1, help="Write this point as a policy; needs --out.", show_default="none")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File of the exported policy.", show_default="none")] = None,
    run: options.RunRead = None,
    runs_dir: options.RunsDir = Path("runs"),
    batch: options.BatchRead = None,
    threads: options.ThreadsRead = None,
    seed: options.SeedRead = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the policies of a finished search that no other undercuts in error and cost; export any of them.

    Costs are predicted and accuracies are those before any training, on the search's evaluation images.
    """
    from autoprune.core.errors import RunError
    from autoprune.core.front import Front
    from autoprune.core.policy import Policy
    from autoprune.core.result import Result
    from autoprune.core.rundir import RunDir, check_made_with

    if (export is None) != (out is None):
        raise RunError("--export and --out: got one of them; a point is exported with --export N --out policy.json.")
    given = options.one_of("RUN", name, "--run", run)
    folder = RunDir.existing(runs_dir, run) if run is not None else RunDir.find(runs_dir, given)
    front = Front.load(folder)
    result = Result.load(folder.result)
    made = {**result.context, "seed": result.seed}
    check_made_with(f"run {folder.path}", made, {"batch": batch, "threads": threads, "seed": seed})
    if export is not None and out is not None:
        front.policy(export, Policy.load(folder.policy).file).save(out)
    if as_json:
        from autoprune.cli.record import print_record

        points = [{"point": number, **point.model_dump()} for number, point in enumerate(front.points, 1)]
        paths = {"front": folder.front} if out is None else {"front": folder.front, "policy": out}
        print_record({"run": folder.path.name, "objectives": front.objectives, "points": points, "paths": paths})
        return
    _show(front, export)
    if out is not None:
        print(f"  {'policy':<8}{out}  (point {export}, predicted only)")


def _show(front: Front, export: int | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from autoprune.cli.table import make_console
    from autoprune.report.summary import NONE, percent, significant, time_text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    sized = "size" in front.objectives
    for column in ("point", "accuracy", "error", "latency", "× dense", "MACs", "weights", *(["size"] if sized else [])):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("proposed by", no_wrap=True)
    for number, point in enumerate(front.points, 1):
        cost = point.predicted
        cells = [
            str(number),
            percent(point.accuracy, 2),
            significant(point.error),
            time_text(cost.latency_us),
            NONE if cost.latency_ratio is None else f"{cost.latency_ratio:.2f}",
            percent(cost.macs_ratio),
            percent(cost.params_ratio),
            *([f"{point.costs['size'] / 1e3:.1f} KB"] if sized else []),
            f"{point.proposer} (trial {point.trial})",
        ]
        table.add_row(*cells, style="bold" if number == export else "")
    console = make_console()
    console.print(table)
    words = " and ".join(front.objectives[1:])
    console.print(
        f"{len(front.points)} policies that no other undercuts in error and {words}; predicted, before any training.",
        markup=False,
    )
