"""The closing table of a search, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.core.comparison import Comparison
from autoprune.core.result import Result

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"dense": "dim", "chosen": "bold green", "baseline": ""}
_WIDTH_OF_A_FILE = 200


def make_console() -> Console:
    """Return a console on stdout; wide enough for the table where stdout is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE, highlight=False)


def print_result(result: Result, paths: Mapping[str, Path]) -> None:
    """Print the table, the dense executions, whether the budget is met, and the files written."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from autoprune.report.summary import COLUMNS, metric_text, reference_lines, table_lines, verdict

    console = make_console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("policy", "budget") else "right", no_wrap=True)
    for line in table_lines(result):
        missed = line.role == "chosen" and not result.met
        table.add_row(*map(escape, line.cells), style="bold red" if missed else _STYLES[line.role])
    console.print(table)
    if result.metric != "accuracy":
        console.print(metric_text(result.metric), markup=False, soft_wrap=True)
    where = f" on {result.predicted_for}" if result.predicted_for else ""
    console.print(f"Dense executions, measured{where}:", markup=False)
    for name, time, remark in reference_lines(result):
        console.print(f"  {name:<24}{time:>10}  {remark}", markup=False)
    for sentence in result.left_out:
        console.print(sentence, markup=False, soft_wrap=True)
    console.print()
    console.print(verdict(result), markup=False, style="bold" if result.met else "bold red")
    for name, path in paths.items():
        console.print(f"  {name:<8}{path}", markup=False, soft_wrap=True)


def print_comparison(comparison: Comparison, paths: Mapping[str, Path]) -> None:
    """Print a table per budget, who wins, and the files written."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from autoprune.report.standing import COLUMNS, lines, sentences

    console = make_console()
    for budget in comparison.budgets:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=escape(budget), title_justify="left")
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for place, line in enumerate(lines(comparison, budget)):
            table.add_row(*map(escape, line), style="bold" if place == 0 else "")
        console.print(table)
        for sentence in sentences(comparison, budget):
            console.print(sentence, markup=False, soft_wrap=True)
        console.print()
    for name, path in paths.items():
        console.print(f"  {name:<12}{path}", markup=False, soft_wrap=True)
