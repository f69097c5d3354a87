"""``autoprune search``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from autoprune.core.result import Result


def search(
    budget: Annotated[
        str,
        typer.Option(
            help="What the network may cost: latency=50%, latency=8ms, speedup=2x, macs=50%, size=1MB, memory=2MB."
        ),
    ],
    model: options.Model = "resnet20",
    data: options.Data = "fashion-mnist",
    data_dir: options.DataDir = None,
    agent: Annotated[str, typer.Option(help="Searcher; auto takes the one that suits the budget.")] = "auto",
    space: options.SpaceByDevice = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="Latency table to use: a file, or an embedded one's name such as h200. Measured elsewhere, it gives "
            "predictions; nothing is deployed then.",
            show_default="measured here, kept in the run",
        ),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="Policies to evaluate.", show_default="the searcher's own number")
    ] = None,
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    run: options.Run = None,
    runs_dir: options.RunsDir = Path("runs"),
    fresh: options.Fresh = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Find the sparsity of every layer that meets a measured budget with the least loss of accuracy."""
    from autoprune.cli.progress import working
    from autoprune.core.budget import parse_budget
    from autoprune.core.rundir import RunDir
    from autoprune.core.undo import undone_when_refused
    from autoprune.report.html import write_report
    from autoprune.search.config import SearchConfig
    from autoprune.search.elsewhere import default_space
    from autoprune.search.pipeline import run_search

    parse_budget(budget)  # a wrong budget is refused before anything heavy starts
    config = SearchConfig(
        budget=budget,
        model=model,
        data=data,
        data_dir=data_dir,
        agent=agent,
        space=space or default_space(table, device),
        table=table,
        evaluations=evaluations,
        batch=batch,
        threads=threads,
        seed=seed,
        device=device,
        run=run,
        runs_dir=runs_dir,
        fresh=fresh,
    )
    with undone_when_refused(runs_dir, config.name), working() as progress:
        result = run_search(config, progress)
    folder = RunDir(runs_dir / config.name)
    report = write_report(folder)
    _show(result, {"policy": folder.policy, "weights": folder.weights, "report": report}, as_json)
    if not result.met:
        raise typer.Exit(1)


def _show(result: Result, paths: dict[str, Path], as_json: bool) -> None:
    present = {name: path for name, path in paths.items() if path.exists()}
    if as_json:
        from autoprune.cli.record import print_result_record

        print_result_record(result, present)
        return
    from autoprune.cli.table import print_result

    print_result(result, present)
