"""The ``autoprune`` command: its sub-commands, and the one place where an error becomes a line and an exit code.

Exit codes: 0 done, 1 failed (also: budget missed), 2 bad input, 3 budget infeasible, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from autoprune.cli import apply, bench, compare, evaluate, export, lut, pareto, report, search, train
from autoprune.core.errors import AutopruneError
from autoprune.core.launch import launched_rank, launched_size

INTERRUPTED = 130

app = typer.Typer(
    name="autoprune",
    help="Search per-layer pruning policies under a measured budget, train them, and run them faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("search")(search.search)
app.command("compare")(compare.compare)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("apply")(apply.apply)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("pareto")(pareto.pareto)
app.add_typer(lut.app, name="lut")


@app.callback()
def _root() -> None:
    """Search per-layer pruning policies under a measured budget, train them, and run them faster."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run the command line ``argv`` and return its exit code; errors are told on stderr, one line each."""
    try:
        code = app(args=list(argv), prog_name="autoprune", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return _tell(error, argv)
    # typer answers Ctrl-C with a code instead of the exception
    return _interrupted(argv) if code == INTERRUPTED else int(code or 0)


def _tell(error: BaseException, argv: Sequence[str]) -> int:
    debug = "--debug" in argv
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return _interrupted(argv)
    if isinstance(error, AutopruneError):
        line, code = str(error), error.exit_code
    elif hasattr(error, "format_message"):  # a usage error; its class is click's or typer's, by typer's version
        path = getattr(getattr(error, "ctx", None), "command_path", "autoprune")
        message = error.format_message().rstrip(".")
        if not message:
            return 2  # no arguments at all: the help has been shown
        line, code = f"{message}. See: {path} --help", 2
    else:
        hint = "" if debug else " Run it again with --debug for the traceback."
        line, code = f"unexpected {type(error).__name__}: {error}.{hint}", 1
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    who = f"rank {launched_rank()}: " if launched_size() > 1 else ""
    print(f"autoprune: {who}{' '.join(line.split())}", file=sys.stderr)
    return code


def _interrupted(argv: Sequence[str]) -> int:
    command = next(iter(argv), "")
    next_step = "give the command again"
    if launched_rank() > 0:
        return INTERRUPTED  # the first of several processes says it
    if command in ("search", "compare", "train") or "--resume" in argv:
        next_step = "the same command resumes where it stopped"
    elif command == "lut":
        next_step = "the same command with --resume keeps the rows measured so far"
    print(f"autoprune: interrupted; {next_step}.", file=sys.stderr)
    return INTERRUPTED


def _drop_stdout() -> None:
    """Send what is still buffered nowhere: the reader has gone, and Python would complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
