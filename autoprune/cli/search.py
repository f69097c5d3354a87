"""``autoprune search``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options
from autoprune.search.base import SEARCHERS

if TYPE_CHECKING:
    from autoprune.core.result import Result


def search(
    budget: Annotated[
        str | None,
        typer.Option(
            help="What the network may cost: latency=50%, latency=8ms, speedup=2x, macs=50%, size=1MB, memory=2MB.",
            show_default="none; needed unless --constraint or --objective is given",
        ),
    ] = None,
    constraint: Annotated[
        str | None, typer.Option(help="Accuracy to keep at the least latency: accuracy=-0.5%.", show_default="none")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="A Pareto front instead of one policy: accuracy with latency, size, macs or params, by commas.",
            show_default="none",
        ),
    ] = None,
    model: options.Model = "resnet20",
    model_args: options.ModelArgs = None,
    weights: options.Weights = None,
    data: options.Data = "fashion-mnist",
    data_dir: options.DataDir = None,
    transform: options.Transform = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What finalists are judged by: accuracy, or agreement with the dense network, which needs no labels.",
            show_default="accuracy",
        ),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(help=f"Searcher: {', '.join(SEARCHERS)}.", show_default="auto; nsga2 with --objective"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the agent, such as warm_starts=8; repeatable."),
    ] = None,
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
    """Find the sparsity of every layer that meets a measured budget with the least loss of accuracy.

    With --constraint: that keeps an accuracy at the least latency. With --objective: every trade-off between them
    (autoprune pareto lists it).
    """
    from autoprune.cli.progress import working
    from autoprune.core.budget import parse_budget
    from autoprune.core.goal import parse_goal
    from autoprune.core.rundir import RunDir
    from autoprune.core.undo import undone_when_refused
    from autoprune.report.html import write_report
    from autoprune.search.base import parse_settings
    from autoprune.search.config import DEFAULT_AGENT, DEFAULT_FRONT_AGENT, SearchConfig
    from autoprune.search.elsewhere import default_space
    from autoprune.search.pipeline import run_search
    from autoprune.tasks.names import with_args

    # What is wrong is refused before anything heavy starts; an empty budget is not the same as none.
    if budget is not None:
        parse_budget(budget)
    parse_goal(budget or "", constraint, objective)
    agent = agent or (DEFAULT_FRONT_AGENT if objective else DEFAULT_AGENT)
    config = SearchConfig(
        budget=budget or "",
        model=with_args(model, model_args),
        weights=weights,
        data=options.prepared_data(data, transform),
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
        constraint=constraint,
        objective=objective,
        settings=parse_settings(agent, settings) if settings else None,
        metric=metric,
    )
    with undone_when_refused(runs_dir, config.name), working() as progress:
        result = run_search(config, progress)
    folder = RunDir(runs_dir / config.name)
    report = write_report(folder)
    paths = {"policy": folder.policy, "weights": folder.weights, "front": folder.front, "report": report}
    _show(result, paths, as_json)
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
