"""What a searcher is, and the account that it spends its evaluations from."""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from autoprune.core import settings as settings_of
from autoprune.core.errors import RunError
from autoprune.core.registry import Registry
from autoprune.search.settings import NoSettings, owner, read_settings

if TYPE_CHECKING:
    from autoprune.envs.problem import Problem, Quality
    from autoprune.search.study import Study, Trial
    from autoprune.search.workshop import Workshop

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
        problem: What is searched, if its limits differ from those of the study's own.
    """

    def __init__(
        self,
        study: Study,
        proposer: str,
        evaluations: int,
        progress: Progress | None = None,
        problem: Problem | None = None,
    ) -> None:
        self.problem: Problem = problem or study.problem
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
        """Return the quality of an assignment, recorded in the study.

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
    """Proposes policies; deterministic in (problem, evaluations, seed), whatever the study already holds.

    Args:
        settings: The agent's own dataclass, a mapping of its fields, or None for the defaults.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[Any]] = NoSettings
    settings: object

    def __init__(self, settings: object | None = None) -> None:
        self.settings = read_settings(self.settings_class, self.name, settings)

    def attach(self, workshop: Workshop) -> None:
        """Take the means to train networks; an agent that only evaluates policies has no use for them."""
        return

    def search(
        self, problem: Problem, study: Study, evaluations: int, seed: int = 0, progress: Progress | None = None
    ) -> Trial:
        """Evaluate up to ``evaluations`` distinct policies and return the best feasible one.

        Args:
            problem: What is searched; the study's own, or the same under other limits.
            study: Records every evaluated policy, and answers for those it already has.
            evaluations: At least 1; a searcher may stop earlier when it has nothing more to propose.
            seed: Same seed, same proposals.
            progress: Told (done, total) after each evaluation.
        Raises:
            RunError: ``evaluations`` is below 1.
        """
        if evaluations < 1:
            raise RunError(f"evaluations={evaluations}: a search needs at least 1.")
        if study.problem.fingerprint != problem.fingerprint:
            raise ValueError("the study was opened for another problem")
        account = Account(study, self.name, evaluations, progress, problem)
        self.spend(account, seed)
        return study.trial(account.ranked()[0], self.name)

    def spend(self, account: Account, seed: int) -> None:
        """Propose policies until the account's evaluations are spent, or nothing is left to propose."""
        with contextlib.suppress(EvaluationsSpent):
            self.propose(account, seed)

    def propose_front(self, account: Account, seed: int) -> bool:
        """Evaluate policies along the whole trade-off between error and every constraint's cost.

        Returns:
            False, nothing having been done, where the agent searches at one budget at a time.
        """
        return False

    @abstractmethod
    def propose(self, account: Account, seed: int) -> None:
        """Evaluate policies through ``account`` until it raises ``EvaluationsSpent`` or nothing is left to propose."""


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes searchers of one kind; imports the algorithm only when called, so that listing the names stays quick."""

    module: str
    cls: str

    def load(self) -> type[Searcher]:
        """Return the searcher's class."""
        found: type[Searcher] = getattr(importlib.import_module(f"autoprune.search.{self.module}"), self.cls)
        return found

    def __call__(self, settings: object | None = None) -> Searcher:
        """Return a searcher with these settings."""
        return self.load()(settings)


SEARCHERS: Registry[Maker] = Registry("agent")
"""Name → maker."""

for _name, _module, _class in (
    ("annealing", "annealing", "AnnealingSearcher"),
    ("auto", "auto", "AutoSearcher"),
    ("cmaes", "samplers", "CMAESSearcher"),
    ("ddpg", "ddpg", "DDPGSearcher"),
    ("evolution", "evolution", "EvolutionSearcher"),
    ("gp", "samplers", "GPSearcher"),
    ("knapsack", "knapsack", "KnapsackSearcher"),
    ("netadapt", "netadapt", "NetAdaptSearcher"),
    ("nsga2", "samplers", "NSGA2Searcher"),
    ("random", "random_search", "RandomSearcher"),
    ("sensitivity", "sensitivity", "SensitivitySearcher"),
    ("spdy", "spdy", "SPDYSearcher"),
    ("tpe", "samplers", "TPESearcher"),
    ("uniform", "uniform", "UniformSearcher"),
):
    SEARCHERS.register(_name)(Maker(_module, _class))


def parse_settings(agent: str, texts: Sequence[str]) -> dict[str, object]:
    """Return an agent's settings from ``name=value`` texts, as written on a command line; ranges are checked too.

    Raises:
        UnknownName: No such agent or setting.
        AgentError: A value that the agent cannot take.
    """
    cls = SEARCHERS.get(agent).load().settings_class
    values = settings_of.parse_settings(cls, owner(agent), texts)
    read_settings(cls, agent, values)
    return values
