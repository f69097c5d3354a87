"""Every agent on the same problem: ``autoprune compare``, each cell a line of a file that is kept with the project.

    python benchmarks/agents.py [--budgets latency=25% latency=50%] [--agents auto tpe …] [--seeds 3] [--summary]

A cell is one agent at one budget with one seed. Its line is written to ``results/agents.csv`` when its search is done
and written anew when its three best policies had the same two-epoch fine-tune; a cell whose line is complete and of
this machine is not made again. All agents of a seed come before the next seed. ``--summary`` runs nothing: it says who
wins by the lines there are.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common import RESULTS, command, today

from autoprune.core.comparison import Cell, Comparison, RankedPolicy
from autoprune.core.progress import Silent
from autoprune.core.rundir import write_text
from autoprune.lut.measure import machine
from autoprune.report.standing import COLUMNS, lines, sentences
from autoprune.search.compare import CompareConfig, run_comparison

FILE = RESULTS / "agents.csv"
AGENTS = (
    "auto", "knapsack", "random", "ddpg", "tpe", "evolution", "spdy", "uniform",
    "nsga2", "cmaes", "netadapt", "sensitivity", "annealing", "gp",
)  # fmt: skip
MARKS = (1, 10, 25, 50, 75, 100, 125, 150, 200)
_KEY = ("model", "data", "budget", "agent", "seed", "granted", "images", "device", "batch", "threads")
HEADER = (
    *_KEY, "evaluations", "error", "accuracy", *(f"error_{mark}" for mark in MARKS), "seconds", "scoring_seconds",
    "policies", "errors", "accuracies", "tuned", "dense_accuracy", "versions", "date", "command",
)  # fmt: skip


def device() -> str:
    """Return the processor, as lines name it."""
    facts = machine()
    return f"{facts['cpu']} {facts['isa']}"


def line_of(cell: Cell, config: CompareConfig) -> dict[str, str]:
    """Return a cell's line, the dense accuracy still to be told."""
    facts = machine()
    curve = {f"error_{mark}": cell.curve[mark - 1] for mark in MARKS if mark <= len(cell.curve)}
    tuned = [policy.tuned for policy in cell.top if policy.tuned is not None]
    values: dict[str, object] = {
        "model": config.model, "data": config.data, "budget": cell.budget, "agent": cell.agent, "seed": cell.seed,
        "granted": config.evaluations, "images": config.images or "",
        "device": device(), "batch": config.batch, "threads": config.threads,
        "evaluations": len(cell.curve), "error": f"{cell.top[0].error:.6f}" if cell.top else "",
        "accuracy": f"{cell.top[0].accuracy:.4f}" if cell.top else "",
        **{name: "" if value is None else f"{value:.6f}" for name, value in curve.items()},
        "seconds": f"{cell.seconds:.2f}", "scoring_seconds": f"{cell.scoring_seconds:.2f}",
        "policies": _joined([_digest(policy) for policy in cell.top]),
        "errors": _joined([f"{policy.error:.6f}" for policy in cell.top]),
        "accuracies": _joined([f"{policy.accuracy:.4f}" for policy in cell.top]),
        "tuned": _joined([f"{value:.4f}" for value in tuned]),
        "versions": " ".join(f"{name}={facts[name]}" for name in ("python", "torch", "numba", "onnxruntime")),
        "date": today(), "command": command(),
    }  # fmt: skip
    return {name: str(values.get(name, "")) for name in HEADER}


def _joined(texts: Sequence[str]) -> str:
    return " ".join(texts)


def _digest(policy: RankedPolicy) -> str:
    """Return eight letters that tell policies apart."""
    return hashlib.sha256(json.dumps(sorted(policy.choices.items())).encode()).hexdigest()[:8]


def cell_of(line: dict[str, str]) -> Cell:
    """Return the cell of a line; its curve is flat between the marks, and of a policy only the digest is known."""
    curve: list[float | None] = []
    for place in range(int(line["evaluations"])):
        past = [mark for mark in MARKS if mark <= place + 1 and line[f"error_{mark}"]]
        curve.append(float(line[f"error_{past[-1]}"]) if past else None)
    tuned = [float(text) for text in line["tuned"].split()]
    figures = zip(line["policies"].split(), line["errors"].split(), line["accuracies"].split(), strict=True)
    top = [
        RankedPolicy(
            choices={"policy": digest}, error=float(error), accuracy=float(accuracy),
            tuned=tuned[place] if tuned else None,
        )
        for place, (digest, error, accuracy) in enumerate(figures)
    ]  # fmt: skip
    return Cell(
        agent=line["agent"], budget=line["budget"], seed=int(line["seed"]), curve=curve,
        seconds=float(line["seconds"]), scoring_seconds=float(line["scoring_seconds"]), top=top,
    )  # fmt: skip


def read_lines() -> list[dict[str, str]]:
    """Return the file's lines."""
    if not FILE.exists():
        return []
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process at a time change the file."""
    with (FILE.parent / ".agents.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_line(new: dict[str, str]) -> None:
    """Put a line in, instead of the same cell's earlier one."""
    with _alone():
        kept = [line for line in read_lines() if any(line[name] != new[name] for name in _KEY)]
        rows = [",".join(HEADER), *(",".join(line[name] for name in HEADER) for line in [*kept, new])]
        write_text(FILE, "\n".join(rows) + "\n")


def of_this(config: CompareConfig, lines: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the lines of this problem on this machine."""
    wanted = {
        "model": config.model, "data": config.data, "granted": str(config.evaluations),
        "images": str(config.images or ""), "device": device(), "batch": str(config.batch),
        "threads": str(config.threads),
    }  # fmt: skip
    return [line for line in lines if all(line[name] == value for name, value in wanted.items())]


def summary(config: CompareConfig, lines_found: Sequence[dict[str, str]]) -> None:
    """Say who wins at every budget, by the lines there are."""
    for budget in config.budgets:
        at = [line for line in lines_found if line["budget"] == budget]
        if not at:
            continue
        cells = [cell_of(line) for line in at]
        comparison = Comparison(
            model=config.model, data=config.data, space=config.space,
            agents=list(dict.fromkeys(cell.agent for cell in cells)), budgets=[budget],
            seeds=len({cell.seed for cell in cells}), evaluations=config.evaluations, finetuned=True,
            dense_accuracy=max(float(line["dense_accuracy"] or 0.0) for line in at), cells=cells, context={},
        )  # fmt: skip
        print(budget, "|", " | ".join(COLUMNS), "| seeds")
        for texts in lines(comparison, budget):
            print("  ", " | ".join(texts), "|", len([cell for cell in cells if cell.agent == texts[0]]))
        print("\n".join(sentences(comparison, budget)))


def main() -> None:
    """Make the cells that are absent, and say who wins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", nargs="+", default=["latency=25%", "latency=50%"])
    parser.add_argument("--agents", nargs="+", default=list(AGENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=150)
    parser.add_argument("--images", type=int, help="that score a policy, the most telling ones; all 1,000 by default")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-fine-tune", dest="finetune", action="store_false")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    options = parser.parse_args()
    config = CompareConfig(
        budgets=tuple(options.budgets), agents=tuple(options.agents), seeds=options.seeds, model=options.model,
        evaluations=options.evaluations, finetune=options.finetune, threads=options.threads, runs_dir=options.runs_dir,
        images=options.images, run=f"agents-{options.model}-e{options.evaluations}-i{options.images or 'all'}",
    )  # fmt: skip
    if not options.summary:

        def done(cell: Cell) -> None:
            line = line_of(cell, config)
            write_line(line)
            print(*(line[name] for name in ("budget", "agent", "seed", "error", "tuned")), flush=True)

        complete = [line for line in of_this(config, read_lines()) if line["tuned"] or not config.finetune]
        found = run_comparison(config, Silent(), known=[cell_of(line) for line in complete], done=done)
        for line in of_this(config, read_lines()):
            if not line["dense_accuracy"]:
                write_line({**line, "dense_accuracy": f"{found.dense_accuracy:.4f}"})
    summary(config, of_this(config, read_lines()))


if __name__ == "__main__":
    main()
