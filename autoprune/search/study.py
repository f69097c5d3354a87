"""The record of every evaluated policy: an Optuna study, whoever proposes.

Each policy is one finished trial, committed before the search goes on; optuna-dashboard can show the file as it grows.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.pool import NullPool

from autoprune.core.errors import RunError
from autoprune.envs.problem import Assignment, Problem, Quality

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated policy.

    Attributes:
        number: Its number in the study.
        assignment: Choice index per searched layer.
        proposer: Name of the searcher.
        quality: Error, accuracy and the seconds it took to score (0 when another proposer's score was reused).
        costs: Constraint kind → cost of the searched layers, in the constraint's unit.
        feasible: Whether it meets every constraint of the problem the study was opened for.
    """

    number: int
    assignment: Assignment
    proposer: str
    quality: Quality
    costs: dict[str, float]
    feasible: bool


class Study:
    """Evaluates policies of one problem and records them.

    Args:
        problem: What is searched; limits may differ from those of an earlier session, the space may not.
        path: SQLite file, made if absent; None keeps the study in memory.
        identity: What else the scores depend on (weights, data, evaluator settings), as one text.
    Raises:
        RunError: The file is unreadable, or holds a study of another space or identity.
    """

    def __init__(self, problem: Problem, path: Path | None = None, identity: str = "") -> None:
        self.problem = problem
        self._path = path
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._study = optuna.create_study(
                study_name="autoprune", storage=_storage(path), direction="minimize", load_if_exists=True
            )
            self._check_owner("space", problem.fingerprint)
            self._check_owner("identity", identity)
            self._trials = [trial for stored in self._study.get_trials() if (trial := self._read(stored)) is not None]
        except RunError:
            raise
        except Exception as error:  # SQLAlchemy, Optuna and the driver have no common base
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RunError(f"study {path}: cannot be used ({reason}); move the file away to start over.") from error
        self._distributions: dict[str, BaseDistribution] = {
            layer.name: CategoricalDistribution([choice.text for choice in choices])
            for layer, choices in zip(problem.layers, problem.choices, strict=True)
        }
        self._by_proposer: dict[tuple[str, Assignment], Trial] = {}
        self._by_assignment: dict[Assignment, Trial] = {}
        for trial in self._trials:
            self._file(trial)

    def _check_owner(self, key: str, value: str) -> None:
        stored = self._study.user_attrs.get(key)
        if stored is None:
            self._study.set_user_attr(key, value)
        elif stored != value:
            raise RunError(
                f"study {self._path} holds another search ({key} {stored!r}, now {value!r}); "
                "give another run name or move the file away."
            )

    def _read(self, stored: FrozenTrial) -> Trial | None:
        if stored.state != TrialState.COMPLETE or stored.value is None:
            return None
        texts = [[choice.text for choice in choices] for choices in self.problem.choices]
        try:
            assignment = tuple(
                text.index(stored.params[layer.name]) for layer, text in zip(self.problem.layers, texts, strict=True)
            )
            attributes = stored.user_attrs
            quality = Quality(stored.value, float(attributes["accuracy"]), float(attributes["seconds"]))
            proposer = str(attributes["proposer"])
        except (KeyError, ValueError, TypeError):
            raise RunError(f"study {self._path}: trial {stored.number} is damaged; start over with --fresh.") from None
        return self._trial(stored.number, assignment, proposer, quality)

    def _trial(self, number: int, assignment: Assignment, proposer: str, quality: Quality) -> Trial:
        kinds = [constraint.kind for constraint in self.problem.constraints]
        costs = dict(zip(kinds, (float(cost) for cost in self.problem.costs(assignment)), strict=True))
        return Trial(number, assignment, proposer, quality, costs, self.problem.feasible(assignment))

    def _file(self, trial: Trial) -> None:
        self._by_proposer.setdefault((trial.proposer, trial.assignment), trial)
        self._by_assignment.setdefault(trial.assignment, trial)
        self.problem.remember(trial.assignment, trial.quality)

    def evaluate(self, assignment: Sequence[int], proposer: str) -> Quality:
        """Return the quality of an assignment, and record it.

        What this proposer already proposed is answered from the record and not recorded again. What only another
        one proposed is recorded for this one too, with the known score, so that every searcher has its own account.
        """
        key = self.problem.check(assignment)
        known = self._by_proposer.get((proposer, key))
        if known is not None:
            return known.quality
        other = self._by_assignment.get(key)
        if other is not None:
            quality = Quality(other.quality.error, other.quality.accuracy, 0.0)
        else:
            quality = self.problem.evaluate(key)
        self._record(key, proposer, quality)
        return quality

    def _record(self, assignment: Assignment, proposer: str, quality: Quality) -> None:
        trial = self._trial(len(self._trials), assignment, proposer, quality)
        limits = {constraint.kind: constraint.limit for constraint in self.problem.constraints}
        attributes = {"proposer": proposer, "accuracy": quality.accuracy, "error": quality.error}
        if not math.isfinite(quality.error):
            del attributes["error"]  # JSON has no infinity; the trial's value has it
        self._study.add_trial(
            optuna.create_trial(
                params={
                    layer.name: choices[index].text
                    for layer, choices, index in zip(
                        self.problem.layers, self.problem.choices, assignment, strict=True
                    )
                },
                distributions=self._distributions,
                value=quality.error,
                user_attrs={**attributes, "costs": trial.costs, "seconds": quality.seconds},
                constraints={kind: cost - limits[kind] for kind, cost in trial.costs.items()},
            )
        )
        self._trials.append(trial)
        self._file(trial)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every recorded policy, oldest first."""
        return tuple(self._trials)

    def trial(self, assignment: Sequence[int], proposer: str) -> Trial:
        """Return the record of what one proposer evaluated; KeyError if it did not."""
        return self._by_proposer[(proposer, self.problem.check(assignment))]

    def best(self, k: int = 1, proposer: str | None = None) -> list[Trial]:
        """Return up to ``k`` feasible trials of different policies, least error first; of one proposer if given."""
        chosen: dict[Assignment, Trial] = {}
        for trial in self._trials:
            if trial.feasible and proposer in (None, trial.proposer):
                chosen.setdefault(trial.assignment, trial)
        return sorted(chosen.values(), key=lambda trial: trial.quality.error)[:k]

    def close(self) -> None:
        """Let go of the file."""
        storage: BaseStorage = self._study._storage
        storage.remove_session()


def _storage(path: Path | None) -> optuna.storages.RDBStorage | None:
    if path is None:
        return None

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=60.0, check_same_thread=False)

    # Not as an URL, in which a path may not hold every character; no pool, so that no connection outlives its use.
    return optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": NullPool})
