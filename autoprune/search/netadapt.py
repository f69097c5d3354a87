"""NetAdapt: step by step down to the budget, the layer that hurts least giving way each time.

An iteration must lower the cost by ΔR (2.5 % of dense at first, shrinking by .96). For every layer the table says which
choice gives that alone; each of these candidates is fine-tuned for a moment, the most accurate one is kept and is where
the next iteration starts. Every kept network stays in the run's folder: a family of models, one per cost.

As published that takes layers × iterations evaluations, hundreds for a small network. With fewer granted, an iteration
tries only as many layers as they allow, those of least single-layer error; with fewer than iterations, ΔR grows.

Source: Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications" (2018). We depart in
the changed layer's weights (compensated, from the layer database) and in the number of candidates. Without networks at
hand (a problem that is not of a network) the evaluator's error decides instead of the accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from autoprune.envs.problem import Assignment, Problem, Quality
from autoprune.search.base import Account, Searcher
from autoprune.search.moves import Moves
from autoprune.search.settings import check_setting

if TYPE_CHECKING:
    from torch import nn

    from autoprune.search.workshop import Workshop

# Iterations at most, if the evaluations allow them: the reductions' sum has all but converged.
_MOST = 80


@dataclass(frozen=True, slots=True)
class NetAdaptSettings:
    """Constants of the method.

    Attributes:
        initial: First reduction, a fraction of the dense network's cost.
        decay: Factor on the reduction from one iteration to the next.
        steps: Optimizer steps of a candidate's fine-tune.
        rank: ``accuracy`` keeps the most accurate candidate, ``ratio`` the one that loses least per cost saved.
    """

    initial: float = 0.025
    decay: float = 0.96
    steps: int = 10
    rank: str = "accuracy"

    def __post_init__(self) -> None:
        check_setting("netadapt", "initial", self.initial, 0 < self.initial < 1, "above 0 and below 1")
        check_setting("netadapt", "decay", self.decay, 0 < self.decay <= 1, "above 0 and at most 1")
        check_setting("netadapt", "steps", self.steps, self.steps >= 1, "1 or more")
        check_setting("netadapt", "rank", self.rank, self.rank in ("accuracy", "ratio"), "'accuracy' or 'ratio'")


@dataclass(frozen=True, slots=True)
class Member:
    """One kept network of the family, and the candidates it was chosen from.

    Attributes:
        candidates: Their policies, as choice indices per searched layer.
        accuracies: Their accuracies after the short fine-tune, on the evaluation images.
        winner: Place of the kept one.
    """

    candidates: tuple[Assignment, ...]
    accuracies: tuple[float, ...]
    winner: int


@dataclass(frozen=True, slots=True)
class _Candidate:
    assignment: Assignment
    layer: int
    load: float


class NetAdaptSearcher(Searcher):
    """Greedy descent from the dense network to the budget, with short fine-tunes where there is a network."""

    name = "netadapt"
    settings_class = NetAdaptSettings
    settings: NetAdaptSettings
    _workshop: Workshop | None = None

    def attach(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def propose(self, account: Account, seed: int) -> None:
        problem = account.problem
        current: Assignment = (0,) * len(problem.layers)
        if problem.feasible(current):
            account.evaluate(current)
            return
        first = load(problem, current)
        plan = reductions(first, self.settings.initial, self.settings.decay, min(_MOST, account.evaluations - 1))
        width = max(1, (account.evaluations - 1) // max(1, len(plan)))
        family = _Family(self._workshop, self.settings)
        accuracy = family.first_score()
        for reduction in plan:
            now = load(problem, current)
            candidates = _candidates(problem, current, max(1e-9, min(reduction, now - 1.0)))[:width]
            if not candidates or account.left <= len(candidates):
                break
            qualities = [account.evaluate(candidate.assignment) for candidate in candidates]
            scores = family.scores(problem, current, candidates, qualities)
            saved = [now - candidate.load for candidate in candidates]
            winner = _best(self.settings.rank, accuracy, scores, saved, qualities)
            family.take(candidates, scores, winner)
            current, accuracy = candidates[winner].assignment, scores[winner]
            if problem.feasible(current):
                return
        # What the granted evaluations do not reach step by step, or discrete choices do not reach alone.
        account.evaluate(Moves(problem).repair(current))


def load(problem: Problem, assignment: Assignment) -> float:
    """Return the largest cost over its limit: 1 is just within the budget."""
    return float((problem.costs(assignment) / np.maximum(problem.limits_D, 1e-12)).max())


def reductions(first: float, initial: float, decay: float, most: int) -> list[float]:
    """Return the reductions of the iterations, in shares of the limit; their sum reaches from ``first`` down to 1.

    Args:
        first: Cost of the dense network over the limit.
        initial, decay: Of the first reduction, as a fraction of dense, and from one to the next.
        most: Iterations at most; the reductions grow if they would not arrive.
    """
    if most < 1:
        return []
    total = most if decay == 1.0 else (1.0 - decay**most) / (1.0 - decay)
    step = max(initial * first, (first - 1.0) / total)
    plan: list[float] = []
    while sum(plan) < (first - 1.0) * (1.0 - 1e-12) and len(plan) < most:
        plan.append(step * decay ** len(plan))
    return plan


def _candidates(problem: Problem, current: Assignment, reduction: float) -> list[_Candidate]:
    """Return for each layer the choice of least error that lowers the cost enough, the least added error first.

    Where no layer can give that much alone, each gives the most it can.
    """
    now = load(problem, current)
    enough: list[_Candidate] = []
    partly: list[_Candidate] = []
    for layer, size in enumerate(problem.sizes):
        changed = [(*current[:layer], index, *current[layer + 1 :]) for index in range(size)]
        made = [_Candidate(policy, layer, load(problem, policy)) for policy in changed]
        fits = [candidate for candidate in made if now - candidate.load >= reduction * (1.0 - 1e-9)]
        if fits:
            enough.append(min(fits, key=lambda candidate: (_added(problem, candidate), candidate.load)))
        partly.append(min(made, key=lambda candidate: candidate.load))
    found = enough or [candidate for candidate in partly if candidate.load < now - 1e-9]
    return sorted(found, key=lambda candidate: (_added(problem, candidate), candidate.layer))


def _added(problem: Problem, candidate: _Candidate) -> float:
    return float(problem.errors_LC[candidate.layer][candidate.assignment[candidate.layer]])


def _best(rank: str, before: float, scores: list[float], saved: list[float], qualities: list[Quality]) -> int:
    """Return the place of the candidate to keep; equal ones are told apart by the evaluator's error."""

    def value(place: int) -> tuple[float, float]:
        worth = scores[place] if rank == "accuracy" else (scores[place] - before) / max(saved[place], 1e-12)
        return worth, -qualities[place].error

    return max(range(len(scores)), key=value)


class _Family:
    """Scores candidates by fine-tuning them, and keeps the winners; replays what an earlier session kept."""

    def __init__(self, workshop: Workshop | None, settings: NetAdaptSettings) -> None:
        self._workshop = workshop
        self._settings = settings
        self._kept = workshop.members() if workshop else []
        self._members: list[Member] = []
        self._parent: nn.Module | None = None
        self._made: list[nn.Module] = []

    def scores(
        self, problem: Problem, current: Assignment, candidates: list[_Candidate], qualities: list[Quality]
    ) -> list[float]:
        """Return the accuracy of each candidate after its fine-tune, or exp(−error) where there is no network."""
        if self._workshop is None:
            return [math.exp(-quality.error) for quality in qualities]
        known = self._known(candidates)
        if known is not None:
            return list(known.accuracies)
        if self._parent is None:
            self._parent = self._workshop.load(len(self._members))
        policies = [problem.named(candidate.assignment) for candidate in candidates]
        layers = [problem.layers[candidate.layer].name for candidate in candidates]
        self._made, accuracies = self._workshop.adapted(self._parent, policies, layers, self._settings.steps)
        return accuracies

    def first_score(self) -> float:
        """Return what ``scores`` would give the dense network."""
        return 1.0 if self._workshop is None else self._workshop.dense_accuracy()

    def _known(self, candidates: list[_Candidate]) -> Member | None:
        """Return what an earlier session kept at this place of the same path."""
        place = len(self._members)
        if place < len(self._kept):
            if self._kept[place].candidates == tuple(candidate.assignment for candidate in candidates):
                return self._kept[place]
            self._kept = []  # another path: what follows is none of it either
        return None

    def take(self, candidates: list[_Candidate], scores: list[float], winner: int) -> None:
        """Keep the winner's network, unless it is kept already."""
        if self._workshop is None:
            return
        again = self._known(candidates) is not None
        policies = tuple(candidate.assignment for candidate in candidates)
        self._members.append(Member(policies, tuple(scores), winner))
        self._parent = None
        if not again:
            self._parent = self._made[winner]
            self._workshop.keep(self._members, self._parent)
        self._made = []
