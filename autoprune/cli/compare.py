"""``autoprune compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options

if TYPE_CHECKING:
    from autoprune.core.comparison import Comparison


def compare(
    agents: Annotated[
        str | None, typer.Option(help="Searchers, separated by commas.", show_default="all of them")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Budgets, separated by commas; several limits of one budget are joined by +.")
    ] = "latency=50%,latency=33%,latency=25%",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, … of every searcher.")] = 3,
    evaluations: Annotated[int, typer.Option(min=1, help="Policies that every searcher may evaluate.")] = 100,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images that score a policy, the most telling ones.", show_default="1000")
    ] = None,
    fine_tune: Annotated[
        bool, typer.Option("--fine-tune/--no-fine-tune", help="Fine-tune the best three policies of every search.")
    ] = True,
    model: options.Model = "resnet20",
    model_args: options.ModelArgs = None,
    weights: options.Weights = None,
    data: options.Data = "fashion-mnist",
    data_dir: options.DataDir = None,
    space: options.Space = "cpu-default",
    table: Annotated[
        Path | None, typer.Option(help="Latency table to use.", show_default="measured here, kept in the run")
    ] = None,
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    device: options.Device = "cpu",
    run: options.Run = None,
    runs_dir: options.RunsDir = Path("runs"),
    fresh: options.Fresh = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare searchers on the same problem: equal evaluations, several seeds, the same fine-tune at the end."""
    from autoprune.cli.progress import working
    from autoprune.core.rundir import RunDir
    from autoprune.core.undo import undone_when_refused
    from autoprune.report.compare import write_comparison_report
    from autoprune.search.compare import CompareConfig, run_comparison
    from autoprune.tasks.names import with_args

    config = CompareConfig(
        budgets=tuple(part.replace("+", ",") for part in _parts(budgets)),
        agents=tuple(_parts(agents or "")),
        seeds=seeds,
        evaluations=evaluations,
        images=images,
        finetune=fine_tune,
        model=with_args(model, model_args),
        weights=weights,
        data=data,
        data_dir=data_dir,
        space=space,
        table=table,
        batch=batch,
        threads=threads,
        device=device,
        run=run,
        runs_dir=runs_dir,
        fresh=fresh,
    )
    with undone_when_refused(runs_dir, config.name), working() as progress:
        comparison = run_comparison(config, progress)
    folder = RunDir(runs_dir / config.name)
    report = write_comparison_report(folder)
    _show(comparison, {"comparison": folder.comparison, "report": report}, as_json)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _show(comparison: Comparison, paths: dict[str, Path], as_json: bool) -> None:
    from autoprune.report.standing import standing_record

    if as_json:
        from autoprune.cli.record import print_record

        print_record({**standing_record(comparison), "paths": paths})
        return
    from autoprune.cli.table import print_comparison

    print_comparison(comparison, paths)
