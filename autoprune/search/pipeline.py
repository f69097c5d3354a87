"""The main job: from a budget to a policy that was deployed, timed and fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from autoprune.core.choices import Choice
from autoprune.core.policy import Accuracy, Cost
from autoprune.core.progress import Progress, Silent
from autoprune.core.result import Result
from autoprune.core.rundir import Cache, RunDir
from autoprune.envs.problem import Problem
from autoprune.lut.device import check_device
from autoprune.search.aim import AimFiles, Guard, closer, find_margin, latency_over_budget, off_target
from autoprune.search.base import SEARCHERS
from autoprune.search.channels import open_space
from autoprune.search.closing import make_policy, make_result, save_front
from autoprune.search.config import (
    BASELINE_EVALUATIONS,
    DEFAULT_EVALUATIONS,
    DEFAULT_FRONT_AGENT,
    TOLERANCE,
    SearchConfig,
)
from autoprune.search.context import Clock, Context
from autoprune.search.deploy import Deployer
from autoprune.search.finals import Candidate, Finals, meets, predicted_cost, save_weights
from autoprune.search.knapsack import solve_problem
from autoprune.search.latency import Subject, open_latency
from autoprune.search.memory import Memory, best_bounded, kept_map_bytes, workspace_bounds
from autoprune.search.propose import Grant, propose, searched_budget
from autoprune.search.sensitivity import sensitivity_of
from autoprune.search.setup import (
    Scored,
    check_reachable,
    make_problem,
    measured_space,
    score_choices,
    splits_of,
    worthwhile,
)
from autoprune.search.study import Study
from autoprune.search.workshop import Workshop
from autoprune.search_spaces.trace import trace_report
from autoprune.tasks.metrics import metric_of
from autoprune.tasks.task import Task, judged_task, load_task

BASELINES = ("knapsack", "uniform", "random")
ATTEMPTS = 4


def run_search(config: SearchConfig, progress: Progress) -> Result:
    """Search as configured; a finished run's result is returned as it stands, an unfinished one goes on.

    Raises:
        AutopruneError: Anything a user can mend; see the subclasses.
    """
    _check(config)
    task = load_task(config.model, config.data, data_dir=config.data_dir, weights=config.weights)
    metric_of(config.metric, task.data)
    return _search(config, task, progress)


def search(
    model: nn.Module,
    task: Task | None = None,
    *,
    budget: str = "",
    progress: Progress | None = None,
    **settings: object,
) -> Result:
    """Search a policy for a trained network from Python.

    Args:
        model: Trained dense network; not modified.
        task: Its data; None for the embedded default's data.
        budget: As on the command line; empty with ``constraint`` or ``objective`` among the settings.
        progress: Told of the stages.
        settings: Further fields of ``SearchConfig``; its ``settings`` are the agent's.
    """
    if settings.get("objective"):
        settings.setdefault("agent", DEFAULT_FRONT_AGENT)
    config = replace(SearchConfig(budget=budget), **settings)  # type: ignore[arg-type]
    _check(config)
    base = task or load_task(config.model, config.data, data_dir=config.data_dir, weights=config.weights)
    model_name = config.model if task is None else task.model_name
    own = replace(base, model=model.eval(), model_name=model_name)
    return _search(replace(config, model=model_name), own, progress or Silent())


def _check(config: SearchConfig) -> None:
    """Refuse what cannot be searched before anything is made."""
    _ = config.goal
    SEARCHERS.get(config.agent)(config.settings)
    check_device(config.device)


def _search(config: SearchConfig, task: Task, progress: Progress) -> Result:
    report = trace_report(task.model, task.example)
    layers = report.layers
    space, groups = open_space(config.space, task.model, task.example, layers, config.device)
    for line in report.notes():
        progress.note(line)
    run = RunDir.open(config.runs_dir, config.name, config.resolved(), fresh=config.fresh)
    if run.result.exists():
        progress.note(f"{run.path} is finished; showing its result (--fresh starts over)")
        return Result.load(run.result)
    if not isinstance(task.data.train.images, torch.Tensor):
        progress.stage("images", None)
    task = judged_task(task, config.metric)
    context = Context(
        config, config.goal, run, Cache(config.runs_dir), task, layers, space, progress, Clock(),
        groups=groups, splits=splits_of(task.data),
    )
    threads = torch.get_num_threads()
    try:
        result = _stages(context)
    finally:
        torch.set_num_threads(threads)
        progress.finish()
    return result


def _stages(context: Context) -> Result:
    config, clock = context.config, context.clock
    with clock.stage("table"):
        subject = Subject(context.task, context.layers, context.space, context.run, context.cache, context.groups)
        deployer = open_latency(subject, config, context.progress)
    space, budget = measured_space(context.space, deployer.table), searched_budget(context.goal)
    check_reachable(context.layers, space, deployer.table, budget, deployer.references.best_us)
    with clock.stage("layer database"):
        scored = score_choices(context.task, space, context.cache, context.progress, context.groups)
        scored = worthwhile(scored, deployer.table)
    guard = Guard(context.run.guard)
    for attempt in range(ATTEMPTS):
        finals, candidates, study, kept = _choose(context, deployer, scored, guard.load())
        with clock.stage("fine-tune"):
            rows, models = _tune(context, finals, candidates)
        with clock.stage("verification"):
            rows, chosen = _verify(context, finals, rows, models)
        missed = context.goal.shortfall(chosen.accuracy.tuned, rows[0].accuracy.dense)
        ratio = latency_over_budget(context.budget, chosen.cost)
        late = deployer.measures and attempt == 0 and ratio > 1.0 + TOLERANCE
        if not late and (missed == 0.0 or not kept or attempt == ATTEMPTS - 1):
            break
        study.close()
        _discard(context, candidates)
        if late:
            _aim_lower(context, deployer, ratio)
        else:
            guard.raise_by(missed)
            context.progress.note(f"validation accuracy misses by {100 * missed:.2f} points: searching on")
    weights = models[chosen.name]
    rows = [rows[0], replace(chosen, name="chosen"), *(row for row in rows[1:] if not row.finalist)]
    network = finals.deployer.deploy(weights, chosen.choices)
    result = make_result(context, finals, rows, network, study)
    policy = make_policy(context, finals, chosen, study)
    save_weights(weights, context.run.weights)
    policy.save(context.run.policy)
    save_front(context, finals, study)
    sensitivity_of(study.problem).save(context.run.sensitivity)
    result.save(context.run.result)
    _discard(context, candidates)
    return result


def _aim_files(context: Context, deployer: Deployer) -> AimFiles:
    return AimFiles(context.run.aim, context.cache.aim(f"{deployer.table.hash}-{context.budget.text}"))


def _aim_lower(context: Context, deployer: Deployer, ratio: float) -> None:
    """Correct the aim after a fine-tuned policy measured ``ratio`` of its budget; it met it before."""
    aim = _aim_files(context, deployer)
    aim.save(closer(aim.load(fresh=True) or 1.0, ratio))
    context.progress.note(f"fine-tuned, it measures {ratio:.1%} of the budget: correcting the aim, searching on")


def _discard(context: Context, candidates: list[Candidate]) -> None:
    """Delete the candidates' fine-tuned weights."""
    for candidate in candidates:
        context.run.tuned(candidate.name).unlink(missing_ok=True)


def _choose(
    context: Context, deployer: Deployer, scored: Scored, extra: float
) -> tuple[Finals, list[Candidate], Study, bool]:
    """Search until a finalist keeps its budget as measured, correcting the aim after each miss.

    The last value tells whether the finalists keep the accuracy asked for, as far as evaluation images tell.
    """
    seed = context.config.seed
    finals = Finals(context.task, context.layers, scored.database, deployer, context.run, context.progress, seed)
    aim = _aim_files(context, deployer)
    margin = _margin(context, scored, finals, aim)
    for attempt in range(ATTEMPTS):
        study = Study(_problem(context, scored, deployer, margin), context.run.study)
        with context.clock.stage("search"):
            workshop = Workshop(context.task, scored.database, context.run, seed)
            finalists, kept = _propose(context, study, workshop, extra)
        candidates = [
            Candidate(name, proposer, choices, _predicted(context, choices, deployer))
            for name, proposer, choices in finalists
        ]
        with context.clock.stage("verification"):
            context.progress.stage("verification", len(candidates))
            candidates = finals.time(candidates, {c.name: finals.pruned(c) for c in candidates})
        if not deployer.measures:
            return finals, candidates, study, kept
        ratio = min(latency_over_budget(context.budget, c.cost) for c in candidates if c.finalist)
        # Who minimises latency leaves some of a limit on it unused.
        missed = ratio > 1.0 + TOLERANCE if context.goal.drop is not None else off_target(margin, ratio)
        if not missed or attempt == ATTEMPTS - 1:
            return finals, candidates, study, kept
        study.close()
        margin = closer(margin, ratio)
        aim.save(margin)
        context.progress.note(f"measured {ratio:.1%} of the budget: correcting the aim, searching on")
    raise AssertionError("the last attempt returns")


def _predicted(context: Context, choices: dict[str, Choice], deployer: Deployer) -> Cost:
    return predicted_cost(context.layers, choices, deployer, context.space.coupling)


def _problem(context: Context, scored: Scored, deployer: Deployer, margin: float) -> Problem:
    table, dense_us, budget = deployer.table, deployer.references.best_us, searched_budget(context.goal)

    def pose(memory: Memory | None = None) -> Problem:
        return make_problem(context.layers, scored, table, budget, dense_us, margin, memory)

    if context.budget.limit("memory") is None:
        return pose()
    maps = kept_map_bytes(table, context.task.model, deployer.example)
    bounds = workspace_bounds(context.layers, scored.options, table)
    return best_bounded(bounds, lambda bound: pose(Memory(maps, bound)))


def _margin(context: Context, scored: Scored, finals: Finals, aim: AimFiles) -> float:
    """Return where to aim, found by deploying the exact solver's policy.

    1 where nothing is deployed, or where no latency is to be kept.
    """
    if not finals.deployer.measures or context.budget.limit("latency") is None:
        return 1.0

    def probe(margin: float) -> float:
        problem = _problem(context, scored, finals.deployer, margin)
        choices = problem.named(solve_problem(problem))
        candidate = Candidate("aim", "knapsack", choices, _predicted(context, choices, finals.deployer))
        timed = finals.time([candidate], {"aim": finals.pruned(candidate)})[0]
        assert timed.measured is not None
        return latency_over_budget(context.budget, timed.measured)

    known = aim.load(fresh=context.config.fresh)
    if known is None:
        context.progress.stage("aim", None)
        with context.clock.stage("verification"):
            known = find_margin(probe)
    aim.save(known)
    return known


def _propose(
    context: Context, study: Study, workshop: Workshop, extra: float
) -> tuple[list[tuple[str, str, dict[str, Choice]]], bool]:
    """Return (row name, proposer, choices) of the agent's best policies and of each baseline's best beside them.

    The second value tells whether the agent's keep the accuracy asked for.
    """
    config = context.config
    evaluations = config.evaluations or DEFAULT_EVALUATIONS
    baselines = {name: min(evaluations, BASELINE_EVALUATIONS) for name in BASELINES if name != config.agent}
    context.progress.stage("search", evaluations + sum(baselines.values()))

    def grant(count: int) -> tuple[Grant, Callable[[], None]]:
        done = 0

        def told(now: int, total: int) -> None:
            nonlocal done
            context.progress.advance(now - done)
            done = now

        return Grant(count, config.seed, told), lambda: told(count, count)

    searcher = SEARCHERS.get(config.agent)(config.settings)
    searcher.attach(workshop)
    spend, finish = grant(evaluations)
    proposed = propose(searcher, context.goal, study, spend, extra)
    finish()
    named = study.problem.named
    rows = [(f"finalist-{n}", config.agent, named(t.assignment)) for n, t in enumerate(proposed.finalists, 1)]
    for name, count in baselines.items():
        spend, finish = grant(count)
        trial = SEARCHERS.get(name)().search(proposed.problem, study, count, config.seed, spend.progress)
        finish()
        rows.append((name, name, named(trial.assignment)))
    return rows, proposed.kept


def _tune(
    context: Context, finals: Finals, candidates: list[Candidate]
) -> tuple[list[Candidate], dict[str, nn.Module]]:
    """Return the dense network's row and every candidate's after its fine-tune, and their networks by name."""
    context.progress.stage("fine-tune", len(candidates) * finals.steps)
    tuned, models = finals.tune(candidates)
    dense = Candidate("dense", "dense", {}, _predicted(context, {}, finals.deployer))
    score = finals.score(context.task.model, dense, finals.judged)
    dense = replace(dense, accuracy=Accuracy(dense=score, pruned=score, tuned=score))
    return [dense, *tuned], {**models, "dense": context.task.model}


def _verify(
    context: Context, finals: Finals, rows: list[Candidate], models: dict[str, nn.Module]
) -> tuple[list[Candidate], Candidate]:
    """Time every row in one interleaved run; return them and the chosen one.

    Chosen is the finalist that keeps the budget with the best validation accuracy, or the fastest that keeps the
    accuracy asked for; test data comes in afterwards.
    """
    context.progress.stage("verification", len(rows))
    rows = finals.time(rows, models)
    # They met it before they were fine-tuned: a miss now is confirmed first.
    if finals.deployer.measures and not _met(context, rows):
        context.progress.stage("verification again", len(rows))
        rows = finals.time(rows, models)
    own = [row for row in rows if row.finalist]
    met = _met(context, rows)
    kept = [row for row in met if context.goal.shortfall(row.accuracy.tuned, rows[0].accuracy.dense) == 0.0]
    if context.goal.drop is not None and kept:
        chosen = min(kept, key=lambda row: row.cost.latency_us or 0.0)
    else:
        chosen = max(met or own, key=lambda row: (row.accuracy.tuned or 0.0, row.accuracy.pruned or 0.0))
    accuracy = chosen.accuracy.model_copy(
        update={
            "dense": rows[0].accuracy.dense,
            "test": finals.closing_score(models[chosen.name], chosen),
            "dense_test": finals.closing_score(context.task.model, rows[0]),
        }
    )
    return rows, replace(chosen, accuracy=accuracy)


def _met(context: Context, rows: list[Candidate]) -> list[Candidate]:
    """Return the finalists that keep the budget, as measured where anything is."""
    return [row for row in rows if row.finalist and meets(context.budget, row.cost)]
