"""From a goal to the policies that are worth deploying."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoprune.core.budget import Budget, Limit
from autoprune.core.goal import Goal
from autoprune.envs.problem import Problem
from autoprune.search.base import Progress, Searcher
from autoprune.search.config import FINALISTS
from autoprune.search.front import knee, non_dominated, search_front
from autoprune.search.guarantee import search_cheapest
from autoprune.search.study import Study, Trial


@dataclass(frozen=True, slots=True)
class Proposed:
    """What an agent proposes.

    Attributes:
        finalists: Its best policies, the best first.
        problem: Limits under which baselines compete with them.
        kept: Whether they keep the accuracy asked for, as far as evaluation images tell.
    """

    finalists: list[Trial]
    problem: Problem
    kept: bool = True


@dataclass(frozen=True, slots=True)
class Grant:
    """What an agent may spend: distinct policies, the seed of every draw, and whom to tell (done, total)."""

    evaluations: int
    seed: int
    progress: Progress | None = None


def searched_budget(goal: Goal) -> Budget:
    """Return the limits of the problem that is searched: the budget's, and dense for every other cost in question."""
    wanted = goal.objectives if goal.objectives else ("latency",) if goal.drop is not None else ()
    given = {limit.kind: limit for limit in goal.budget.limits}
    opened = [given.pop(kind, Limit(kind, 1.0, True, f"{kind}=100%")) for kind in wanted]
    return Budget((*opened, *given.values()))


def propose(searcher: Searcher, goal: Goal, study: Study, grant: Grant, extra: float = 0.0) -> Proposed:
    """Search towards a goal and return what is worth deploying.

    Args:
        searcher: The agent.
        goal: What is asked for.
        study: Of the problem with the limits of ``searched_budget``.
        grant: What it may spend.
        extra: Accuracy asked for beyond a constraint's, for what validation data took back before.
    """
    problem = study.problem
    if goal.drop is not None:
        found = search_cheapest(
            searcher, problem, study, grant.evaluations, grant.seed, goal.drop - extra, grant.progress
        )
        return Proposed(found.trials[:FINALISTS], _within(problem, found.trials[0]), found.kept)
    if goal.objectives:
        search_front(searcher, problem, study, grant.evaluations, grant.seed, grant.progress)
        if not goal.budget.limits:
            best = knee(non_dominated(trial for trial in study.trials if trial.proposer == searcher.name))
            return Proposed([best], _within(problem, best))
    else:
        searcher.search(problem, study, grant.evaluations, grant.seed, grant.progress)
    return Proposed(study.best(FINALISTS, searcher.name), problem)


def _within(problem: Problem, trial: Trial) -> Problem:
    """Return the problem whose limits are one policy's costs."""
    return problem.limited(np.minimum(problem.limits_D, problem.costs(trial.assignment)))

