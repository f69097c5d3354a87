"""Who wins a comparison, and by how much: means over seeds, and what lies within one standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from autoprune.core.comparison import Cell, Comparison


@dataclass(frozen=True, slots=True)
class Figure:
    """Mean and standard deviation (n − 1) over seeds; the deviation of one seed is 0."""

    mean: float
    std: float

    @staticmethod
    def of(values: Sequence[float]) -> Figure | None:
        """Return the figure of some values, None of none."""
        if not values:
            return None
        return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True, slots=True)
class Standing:
    """One agent at one budget.

    Attributes:
        error: Least error found.
        accuracy: Of that policy, before any training.
        tuned: Best accuracy of its fine-tuned policies; None without a fine-tune.
        seconds: Of a search alone; ``overhead`` without scoring, per evaluation.
        evaluations: Policies it evaluated; an agent may stop early.
    """

    agent: str
    error: Figure
    accuracy: Figure
    tuned: Figure | None
    seconds: Figure
    overhead: Figure
    evaluations: float


def standings(comparison: Comparison, budget: str) -> list[Standing]:
    """Return every agent's standing at a budget, least mean error first; agents without a feasible policy left out."""
    found = []
    for agent in comparison.agents:
        cells = [cell for cell in comparison.at(budget, agent) if cell.top]
        if cells:
            found.append(_standing(agent, cells))
    return sorted(found, key=lambda standing: (standing.error.mean, standing.agent))


def _standing(agent: str, cells: Sequence[Cell]) -> Standing:
    accuracies = [[policy.tuned for policy in cell.top if policy.tuned is not None] for cell in cells]
    overheads = [(cell.seconds - cell.scoring_seconds) / max(1, len(cell.curve)) for cell in cells]
    return Standing(
        agent=agent,
        error=_figure([cell.top[0].error for cell in cells]),
        accuracy=_figure([cell.top[0].accuracy for cell in cells]),
        tuned=Figure.of([max(values) for values in accuracies if values]),
        seconds=_figure([cell.seconds for cell in cells]),
        overhead=_figure(overheads),
        evaluations=statistics.fmean(len(cell.curve) for cell in cells),
    )


def _figure(values: Sequence[float]) -> Figure:
    figure = Figure.of(values)
    assert figure is not None
    return figure


def within_one_deviation(best: Figure, other: Figure) -> bool:
    """Return whether two means differ by no more than the larger of the two standard deviations."""
    return abs(other.mean - best.mean) <= max(best.std, other.std)


@dataclass(frozen=True, slots=True)
class Winner:
    """The best agent by one figure, the others within one standard deviation of it, and the next one beyond."""

    agent: str
    figure: Figure
    level: tuple[str, ...]
    next: tuple[str, Figure] | None


def winner_by_error(rows: Sequence[Standing]) -> Winner | None:
    """Return who finds the least error; None without rows."""
    return _winner([(row.agent, row.error) for row in rows], sign=1.0)


def winner_by_tuned(rows: Sequence[Standing]) -> Winner | None:
    """Return whose fine-tuned policies are best; None when nothing was fine-tuned."""
    return _winner([(row.agent, row.tuned) for row in rows if row.tuned is not None], sign=-1.0)


def _winner(figures: Sequence[tuple[str, Figure]], sign: float) -> Winner | None:
    if not figures:
        return None
    (agent, best), *rest = sorted(figures, key=lambda item: (sign * item[1].mean, item[0]))
    level = tuple(name for name, figure in rest if within_one_deviation(best, figure))
    beyond = next(((name, figure) for name, figure in rest if name not in level), None)
    return Winner(agent, best, level, beyond)


def score_correlation(comparison: Comparison, budget: str) -> tuple[float, int] | None:
    """Return Spearman's correlation of the search's score (−error) with the fine-tuned accuracy, and the number of
    different policies behind it; None for fewer than three, or where either is the same for all."""
    seen = {
        tuple(sorted(policy.choices.items())): (policy.error, policy.tuned)
        for cell in comparison.at(budget)
        for policy in cell.top
        if policy.tuned is not None
    }
    errors, tuned = [error for error, _ in seen.values()], [accuracy for _, accuracy in seen.values()]
    if len(set(errors)) < 3 or len(set(tuned)) < 2:
        return None
    correlation = spearmanr([-error for error in errors], tuned)
    return float(correlation.statistic), len(seen)
