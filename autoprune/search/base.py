"""What a searcher is, and the account that it spends its evaluations from."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from autoprune.core.errors import RunError
from autoprune.core.registry import Registry

if TYPE_CHECKING:
    from autoprune.envs.problem import Problem, Quality
    from autoprune.search.study import Study, Trial

Progress: TypeAlias = "Callable[[int, int], None]"
"""Called after each evaluation with (done, total)."""


class EvaluationsSpent(Exception):
    """A signal, no failure: one more policy would exceed the number granted."""


class Account:
    """Evaluates policies for one searcher and stops it when its evaluations are spent.

    A policy counts once, however often it is proposed, and counts whether it is scored now or answered from the
    study: so a searcher that was killed and is run again with its seed goes through the same states.

    Args:
        study: Records what is evaluated.
        proposer: The searcher's name.
        evaluations: Number of distinct policies granted.
        progress: Told after each of them.
    """

    def __init__(self, study: Study, proposer: str, evaluations: int, progress: Progress | None = None) -> None:
        self.problem: Problem = study.problem
        self.study = study
        self.proposer = proposer
        self.evaluations = evaluations
        self.scored: dict[tuple[int, ...], Quality] = {}
        self._progress = progress

    @property
    def left(self) -> int:
        """Evaluations not yet spent."""
        return self.evaluations - len(self.scored)

    def evaluate(self, assignment: Sequence[int]) -> Quality:
        """Return the quality of a feasible assignment.

        Raises:
            EvaluationsSpent: It is a new one and none is left.
        """
        key = self.problem.check(assignment)
        if key not in self.scored:
            if self.left <= 0:
                raise EvaluationsSpent
            self.scored[key] = self.study.evaluate(key, self.proposer)
            if self._progress is not None:
                self._progress(len(self.scored), self.evaluations)
        return self.scored[key]

    def ranked(self) -> list[tuple[int, ...]]:
        """Return the feasible assignments evaluated so far, least error first; ties keep the order of proposal."""
        feasible = [key for key in self.scored if self.problem.feasible(key)]
        return sorted(feasible, key=lambda key: self.scored[key].error)


class Searcher(ABC):
    """Proposes policies; deterministic in (problem, evaluations, seed), whatever the study already holds."""

    name: ClassVar[str]

    def search(
        self, problem: Problem, study: Study, evaluations: int, seed: int = 0, progress: Progress | None = None
    ) -> Trial:
        """Evaluate up to ``evaluations`` distinct policies and return the best feasible one.

        Args:
            problem: What is searched; the study's own.
            study: Records every evaluated policy, and answers for those it already has.
            evaluations: At least 1; a searcher may stop earlier when it has nothing more to propose.
            seed: Same seed, same proposals.
            progress: Told (done, total) after each evaluation.
        Raises:
            RunError: ``evaluations`` is below 1.
        """
        if evaluations < 1:
            raise RunError(f"evaluations={evaluations}: a search needs at least 1.")
        if study.problem is not problem:
            raise ValueError("the study was opened for another problem")
        account = Account(study, self.name, evaluations, progress)
        with contextlib.suppress(EvaluationsSpent):
            self.propose(account, seed)
        return study.trial(account.ranked()[0], self.name)

    @abstractmethod
    def propose(self, account: Account, seed: int) -> None:
        """Evaluate policies through ``account`` until it raises ``EvaluationsSpent`` or nothing is left to propose."""


SEARCHERS: Registry[Callable[[], Searcher]] = Registry("agent")
"""Name → maker; a maker imports its algorithm only when called, so that listing the names stays quick."""


@SEARCHERS.register("knapsack")
def _knapsack() -> Searcher:
    from autoprune.search.knapsack import KnapsackSearcher

    return KnapsackSearcher()


@SEARCHERS.register("ddpg")
def _ddpg() -> Searcher:
    from autoprune.search.ddpg import DDPGSearcher

    return DDPGSearcher()


@SEARCHERS.register("tpe")
def _tpe() -> Searcher:
    from autoprune.search.tpe import TPESearcher

    return TPESearcher()


@SEARCHERS.register("random")
def _random() -> Searcher:
    from autoprune.search.random_search import RandomSearcher

    return RandomSearcher()


@SEARCHERS.register("uniform")
def _uniform() -> Searcher:
    from autoprune.search.uniform import UniformSearcher

    return UniformSearcher()


@SEARCHERS.register("auto")
def _auto() -> Searcher:
    from autoprune.search.auto import AutoSearcher

    return AutoSearcher()
