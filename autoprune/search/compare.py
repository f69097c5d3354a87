"""Agents against each other: same problem, same evaluator, same number of evaluations, several seeds.

Every cell (agent, budget, seed) is a file of the run, written when its search is done and again when its best policies
are fine-tuned; a comparison that was killed, or is asked again with more agents, budgets or seeds, or with a fine-tune,
only does what is absent. All searches of a seed come first, then its fine-tunes, then the next seed.

Scores are shared: a policy that two agents propose is scored once, and its time is charged to both.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from autoprune.core.budget import parse_budget
from autoprune.core.choices import Choice, parse_choice
from autoprune.core.comparison import Cell, Comparison, RankedPolicy
from autoprune.core.errors import RunError
from autoprune.core.progress import Progress
from autoprune.core.rundir import Cache, RunDir, run_name
from autoprune.envs.network import side_by_side
from autoprune.envs.problem import Problem, Quality
from autoprune.lut.device import check_device
from autoprune.search.base import SEARCHERS
from autoprune.search.channels import open_space
from autoprune.search.closing import package_versions, table_facts
from autoprune.search.config import FINALISTS, SearchConfig
from autoprune.search.deploy import Deployer
from autoprune.search.finals import kept_masks
from autoprune.search.latency import Subject, open_latency
from autoprune.search.setup import (
    EVALUATION_IMAGES,
    Scored,
    Scorer,
    make_problem,
    pruned_model,
    score_choices,
    worthwhile,
)
from autoprune.search.study import Study
from autoprune.search_spaces.trace import trace
from autoprune.tasks.metrics import accuracy
from autoprune.tasks.task import Task, judged_task, load_task
from autoprune.trainers.finetune import FinetuneRecipe, Teacher, finetune


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """What is compared.

    Attributes:
        budgets: Each as in ``--budget``.
        agents: Names; empty for all.
        seeds: Seeds 0, 1, … of every agent.
        evaluations: Distinct policies granted to every agent.
        images: Evaluation images that policies are scored on, the most telling ones drawn more often; None for all.
        finetune: Fine-tune the best three policies of every cell.
        model, weights, data, data_dir, space, table, batch, threads, device, runs_dir: As of a search.
        run: Name of the run's folder; None derives it.
        fresh: Set an existing run aside.
    """

    budgets: tuple[str, ...] = ("latency=50%", "latency=33%", "latency=25%")
    agents: tuple[str, ...] = ()
    seeds: int = 3
    evaluations: int = 100
    finetune: bool = True
    model: str = "resnet20"
    data: str = "fashion-mnist"
    data_dir: Path | None = None
    space: str = "cpu-default"
    table: Path | None = None
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    run: str | None = None
    runs_dir: Path = Path("runs")
    fresh: bool = False
    weights: Path | None = None
    images: int | None = None

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.run or run_name("compare", self.model, self.data, self.space, f"e{self.evaluations}")

    @property
    def identity(self) -> dict[str, object]:
        """What a cell depends on besides its agent, budget and seed, as JSON values."""
        return {
            "model": self.model,
            "data": self.data,
            "data_dir": None if self.data_dir is None else str(self.data_dir),
            "space": self.space,
            "table": None if self.table is None else str(self.table),
            "batch": self.batch,
            "threads": self.threads,
            "evaluations": self.evaluations,
            **({} if self.weights is None else {"weights": str(self.weights)}),
            **({} if self.images is None else {"images": self.images}),
        }


def run_comparison(
    config: CompareConfig,
    progress: Progress,
    task: Task | None = None,
    *,
    known: Iterable[Cell] = (),
    done: Callable[[Cell], None] = lambda cell: None,
) -> Comparison:
    """Make the cells that are absent and return all that were asked for.

    Args:
        config: What is compared.
        progress: Told of stages and cells.
        task: Model and data; None loads those that ``config`` names.
        known: Cells kept elsewhere; taken as they are.
        done: Told of each cell that this call searched or fine-tuned.
    Raises:
        AutopruneError: A name is unknown, a number out of range, a budget infeasible, or the run is of another problem.
    """
    budgets = {parse_budget(text).text: parse_budget(text) for text in config.budgets}
    agents = list(dict.fromkeys(config.agents)) or list(SEARCHERS)
    for agent in agents:
        SEARCHERS.get(agent)
    if config.seeds < 1 or config.evaluations < 1 or not budgets:
        raise RunError(
            f"seeds={config.seeds}, evaluations={config.evaluations}, {len(budgets)} budgets: a comparison needs at "
            "least 1 of each."
        )
    check_device(config.device)
    task = judged_task(
        task or load_task(config.model, config.data, data_dir=config.data_dir, weights=config.weights)
    )
    arena = _Arena(config, task, progress)
    problems = {text: arena.problem(text) for text in budgets}  # an infeasible one is refused before the work begins
    cells = {Cell.label(cell.agent, cell.budget, cell.seed): cell for cell in known}
    passes = (arena.searched, arena.tuned) if config.finetune else (arena.searched,)
    progress.stage("comparison", len(passes) * len(problems) * len(agents) * config.seeds)
    for seed, work, budget, agent in itertools.product(range(config.seeds), passes, problems, agents):
        label = Cell.label(agent, budget, seed)
        before = cells.get(label) or arena.kept(label)
        cells[label] = after = work(before or Cell.empty(agent, budget, seed))
        if after != before:
            done(after)
        progress.advance()
    labels = [Cell.label(*key) for key in itertools.product(agents, problems, range(config.seeds))]
    comparison = Comparison(
        model=config.model,
        data=config.data,
        space=config.space,
        agents=agents,
        budgets=list(problems),
        seeds=config.seeds,
        evaluations=config.evaluations,
        finetuned=config.finetune,
        dense_accuracy=arena.dense_accuracy(),
        cells=sorted((cells[label] for label in labels), key=lambda cell: list(problems).index(cell.budget)),
        context={**table_facts(arena.deployer.table), **package_versions()},
        run=config.name,
    )
    comparison.save(arena.run.comparison)
    return comparison


class _SharedScores:
    """An evaluator that scores a policy once, and counts the seconds in which it really did so."""

    def __init__(self, evaluator: Scorer) -> None:
        self._evaluator = evaluator
        self._known: dict[tuple[tuple[str, str], ...], Quality] = {}
        self.spent = 0.0

    def quality(self, choices: Mapping[str, Choice]) -> Quality:
        """Return what ``Evaluator.quality`` returns, with the seconds of its first time."""
        key = tuple((layer, choice.text) for layer, choice in choices.items())
        if key not in self._known:
            started = time.perf_counter()
            self._known[key] = self._evaluator.quality(choices)
            self.spent += time.perf_counter() - started
        return self._known[key]


class _Arena:
    """What all cells share: task, table, layer database, scores and fine-tunes."""

    def __init__(self, config: CompareConfig, task: Task, progress: Progress) -> None:
        self.config, self.task = config, task
        self.layers = trace(task.model, task.example)
        space, groups = open_space(config.space, task.model, task.example, self.layers)
        self.run = RunDir.open(config.runs_dir, config.name, config.identity, fresh=config.fresh)
        cache = Cache(config.runs_dir)
        search = SearchConfig(
            budget=config.budgets[0], model=config.model, data=config.data, space=config.space, table=config.table,
            batch=config.batch, threads=config.threads, run=config.name, runs_dir=config.runs_dir, fresh=config.fresh,
        )  # fmt: skip
        subject = Subject(task, self.layers, space, self.run, cache, groups)
        self.deployer: Deployer = open_latency(subject, search, progress)
        scored = worthwhile(score_choices(task, space, cache, progress, groups, config.images), self.deployer.table)
        self._scores = _SharedScores(scored.evaluator)
        self._scored: Scored = replace(scored, evaluator=self._scores)
        self._tuned: dict[tuple[tuple[str, str], ...], float] = {}
        self._teacher = Teacher(task.model)

    def problem(self, budget: str) -> Problem:
        """Return a new problem of a budget; problems share their scores."""
        dense_us = self.deployer.references.best_us
        return make_problem(self.layers, self._scored, self.deployer.table, parse_budget(budget), dense_us)

    def dense_accuracy(self) -> float:
        """Return the dense network's accuracy on the validation images."""
        return self._accuracy(self.task.model)

    def kept(self, label: str) -> Cell | None:
        """Return a cell that an earlier session made, at least its search."""
        return Cell.load(self.run.cell(label))

    def searched(self, cell: Cell) -> Cell:
        """Return the cell with its search done."""
        if not cell.curve:
            cell = self._search(cell.agent, cell.budget, cell.seed)
            self._keep(cell)
        return cell

    def tuned(self, cell: Cell) -> Cell:
        """Return the cell with its best policies fine-tuned."""
        if any(policy.tuned is None for policy in cell.top):
            cell = cell.model_copy(update={"top": self._tune(cell.top)})
            self._keep(cell)
        for policy in cell.top:
            if policy.tuned is not None:
                self._tuned.setdefault(_key(policy), policy.tuned)
        return cell

    def _keep(self, cell: Cell) -> None:
        cell.save(self.run.cell(Cell.label(cell.agent, cell.budget, cell.seed)))

    def _search(self, agent: str, budget: str, seed: int) -> Cell:
        problem = self.problem(budget)
        study = Study(problem)
        started, spent = time.perf_counter(), self._scores.spent
        SEARCHERS.get(agent)().search(problem, study, self.config.evaluations, seed)
        own = time.perf_counter() - started - (self._scores.spent - spent)
        scoring = sum(trial.quality.seconds for trial in study.trials)
        curve: list[float | None] = []
        for trial in study.trials:
            before = curve[-1] if curve else None
            value = trial.quality.error if trial.feasible and trial.quality.error < float("inf") else None
            curve.append(value if before is None else before if value is None else min(before, value))
        top = [
            RankedPolicy(
                choices={name: choice.text for name, choice in problem.named(trial.assignment).items()},
                error=trial.quality.error,
                accuracy=trial.quality.accuracy,
            )
            for trial in study.best(FINALISTS, agent)
            if trial.quality.error < float("inf")
        ]
        study.close()
        return Cell(
            agent=agent, budget=budget, seed=seed, curve=curve, seconds=own + scoring, scoring_seconds=scoring, top=top
        )

    def _tune(self, top: list[RankedPolicy]) -> list[RankedPolicy]:
        new = [policy for policy in top if _key(policy) not in self._tuned]
        with side_by_side() as pool:
            for policy, value in zip(new, pool.map(self._tuned_model, [self._pruned(p) for p in new]), strict=True):
                self._tuned[_key(policy)] = self._accuracy(value)
        return [policy.model_copy(update={"tuned": self._tuned[_key(policy)]}) for policy in top]

    def _pruned(self, policy: RankedPolicy) -> tuple[nn.Module, dict[str, Choice]]:
        choices = {name: parse_choice(text) for name, text in policy.choices.items()}
        return pruned_model(self.task, self._scored.database, choices), choices

    def _tuned_model(self, pruned: tuple[nn.Module, dict[str, Choice]]) -> nn.Module:
        model, choices = pruned
        # One seed for all: agents are compared, not orders of training images.
        masks = kept_masks(model, choices) | self._scored.database.parameter_masks(model, choices)
        finetune(model, self._teacher, masks, self.task.data, FinetuneRecipe(), seed=0)
        return model

    def _accuracy(self, model: nn.Module) -> float:
        _, split = self.task.data.judges(EVALUATION_IMAGES)
        return accuracy(model, self.task.data.normalize(split.images), split.labels)


def _key(policy: RankedPolicy) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(policy.choices.items()))
