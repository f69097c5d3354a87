"""Networks of torchvision and timm through every stage: trace, space, masks, convert, parity, backward, and more.

    python benchmarks/models.py [--only NAME …] [--fresh]

Each network runs in a process of its own, forked; its line is appended to ``results/models.csv`` at once, and networks
that have a line are skipped. A stage passed, or says in one line why it was refused.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import time
import warnings
from multiprocessing.connection import Connection

import timm
import torch
import torchvision
from common import RESULTS, today
from model_list import MODELS
from model_stages import COLUMNS, build, outcomes

FILE = RESULTS / "models.csv"
HEADER = ("model", "parameters", *COLUMNS, "seconds", "versions", "date", "command")
LIMIT_S = 1800


def main() -> None:
    """Try the networks that have no line yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="Networks to try instead of the list.")
    parser.add_argument("--fresh", action="store_true", help="Try all again, and write a new file.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fresh:
        FILE.unlink(missing_ok=True)
    known = _known()
    for name in options.only or MODELS:
        if name not in known:
            line = _in_a_process(name)
            _append(line)
            refused = [f"{key} {text}" for key, text in line.items() if str(text).startswith("refused")]
            print(f"{name}: {'; '.join(refused) or 'pass'} ({line['seconds']} s)", flush=True)
    lines = list(_known().values())
    passed = sum(not any(text.startswith(("refused", "not tried")) for text in line.values()) for line in lines)
    print(f"{passed} of {len(lines)} networks pass every stage")


def _line(name: str) -> dict[str, object]:
    start = time.perf_counter()
    versions = f"torch={torch.__version__} torchvision={torchvision.__version__} timm={timm.__version__}"
    facts: dict[str, object] = {"model": name, "versions": versions, "date": today()}
    try:
        subject = build(name)
        facts |= {"parameters": sum(p.numel() for p in subject.model.parameters()), **outcomes(subject)}
    except Exception as error:  # it could not even be built
        facts["trace"] = f"refused: {' '.join(str(error).split())[:300]}"
    return facts | {"seconds": round(time.perf_counter() - start, 1)}


def _in_a_process(name: str) -> dict[str, object]:
    """Return the line of a network, tried in a child that may use any memory, or die."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=_send, args=(there, name))
    child.start()
    there.close()
    found: dict[str, object] = {"model": name, "seconds": 0, "date": today()}
    if not here.poll(LIMIT_S):
        found["trace"] = f"refused: not done after {LIMIT_S} s"
        child.kill()
    else:
        try:
            found = here.recv()
        except EOFError:
            child.join()
            found["trace"] = f"refused: its process ended with {child.exitcode}"
    child.join()
    return found


def _send(there: Connection, name: str) -> None:
    warnings.simplefilter("ignore")
    there.send(_line(name))


def _known() -> dict[str, dict[str, str]]:
    if not FILE.exists():
        return {}
    with FILE.open(encoding="utf-8", newline="") as file:
        return {line["model"]: line for line in csv.DictReader(file)}


def _append(line: dict[str, object]) -> None:
    new = not FILE.exists()
    with FILE.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n", restval="")
        if new:
            writer.writeheader()
        writer.writerow({**line, "command": "python benchmarks/models.py"})
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
