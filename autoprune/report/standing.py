"""A comparison of agents in words: the one place where its figures become text, for the table and the report alike."""

from __future__ import annotations

from collections.abc import Callable

from autoprune.core.comparison import Comparison
from autoprune.report.summary import NONE, percent, seconds_text, significant
from autoprune.search.standing import (
    Figure,
    Standing,
    Winner,
    score_correlation,
    standings,
    winner_by_error,
    winner_by_tuned,
)

COLUMNS = ("agent", "error (nats)", "pruned", "tuned", "seconds", "own ms / evaluation", "evaluations")

# Below this rank correlation the search's score says little about accuracy after training.
_LOW = 0.5


def lines(comparison: Comparison, budget: str) -> list[tuple[str, ...]]:
    """Return the table of a budget, one text per entry of ``COLUMNS``, least error first; mean ± deviation."""
    return [_line(row, comparison.seeds) for row in standings(comparison, budget)]


def _line(row: Standing, seeds: int) -> tuple[str, ...]:
    return (
        row.agent,
        _nats(row.error, seeds),
        _percent(row.accuracy, seeds),
        NONE if row.tuned is None else _percent(row.tuned, seeds),
        seconds_text(row.seconds.mean),
        significant(1e3 * row.overhead.mean),
        f"{row.evaluations:.0f}",
    )


def _nats(figure: Figure, seeds: int) -> str:
    return f"{figure.mean:.4f}" + (f" ± {figure.std:.4f}" if seeds > 1 else "")


def _percent(figure: Figure, seeds: int) -> str:
    return percent(figure.mean, 2) if seeds == 1 else f"{100 * figure.mean:.2f} ± {100 * figure.std:.2f} %"


def sentences(comparison: Comparison, budget: str) -> list[str]:
    """Return plainly who wins at a budget, what the fine-tune changes, and whether the score predicts it."""
    rows = standings(comparison, budget)
    found = winner_by_error(rows)
    if found is None:
        return [f"{budget}: no agent found a feasible policy."]
    said = [f"{budget}: {found.agent} finds the least error, {_nats(found.figure, comparison.seeds)} nats; "
            + _others(found, lambda figure: _nats(figure, comparison.seeds), comparison.seeds)]
    tuned = winner_by_tuned(rows)
    if tuned is not None:
        said.append(
            f"After the same fine-tune the best of its three policies: {tuned.agent} leads with "
            f"{_percent(tuned.figure, comparison.seeds)} (dense: {percent(comparison.dense_accuracy, 2)}); "
            + _others(tuned, lambda figure: _percent(figure, comparison.seeds), comparison.seeds)
        )
        said.append(_correlation(comparison, budget))
    early = [row.agent for row in rows if row.evaluations < comparison.evaluations]
    if early:
        said.append(f"Fewer than {comparison.evaluations} evaluations, having nothing more to propose: "
                    f"{', '.join(early)}.")
    return said


def _others(winner: Winner, text: Callable[[Figure], str], seeds: int) -> str:
    beyond = f"next is {winner.next[0]} with {text(winner.next[1])}" if winner.next else "no other is behind it"
    if seeds == 1:
        return f"one seed, so that no spread is known; {beyond}."
    level = f"within one standard deviation: {', '.join(winner.level)}" if winner.level else (
        "no other is within one standard deviation"
    )
    return f"{level}; {beyond}."


def _correlation(comparison: Comparison, budget: str) -> str:
    known = score_correlation(comparison, budget)
    if known is None:
        return "Too few different policies for a correlation of score and fine-tuned accuracy."
    value, count = known
    text = f"Spearman(search score, fine-tuned accuracy) over {count} policies: {value:.2f}"
    if value < _LOW:
        return f"{text}, which is low: the score hardly orders these policies as training does."
    return f"{text}."


def standing_record(comparison: Comparison) -> dict[str, object]:
    """Return the comparison as JSON values: per budget the agents' figures, and who wins."""
    record: dict[str, object] = comparison.model_dump(exclude={"cells"})
    record["standings"] = {budget: [_record(row) for row in standings(comparison, budget)]
                           for budget in comparison.budgets}
    record["verdicts"] = {budget: sentences(comparison, budget) for budget in comparison.budgets}
    correlations = {budget: score_correlation(comparison, budget) for budget in comparison.budgets}
    record["score_correlation"] = {b: None if known is None else known[0] for b, known in correlations.items()}
    return record


def _record(row: Standing) -> dict[str, object]:
    figures = {"error": row.error, "accuracy": row.accuracy, "tuned": row.tuned, "seconds": row.seconds,
               "overhead_seconds": row.overhead}
    values = {name: None if f is None else {"mean": f.mean, "std": f.std} for name, f in figures.items()}
    return {"agent": row.agent, "evaluations": row.evaluations, **values}
