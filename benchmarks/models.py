"""Networks of torchvision and timm through every stage: trace, space, masks, convert, parity, backward, and more.

    python benchmarks/models.py [--only NAME …] [--fresh]

Each network runs in a process of its own; its line is appended to ``results/models.csv`` at once, and networks that
have a line are skipped. A stage passed, or says in one line why it was refused.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
import warnings

from common import RESULTS, command, today
from model_list import MODELS
from model_stages import COLUMNS, build, outcomes

FILE = RESULTS / "models.csv"
HEADER = ("model", "parameters", *COLUMNS, "seconds", "versions", "date", "command")
LIMIT_S = 600


def main() -> None:
    """Try the networks that have no line yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="Networks to try instead of the list.")
    parser.add_argument("--fresh", action="store_true", help="Try all again, and write a new file.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_line(options.one)))
        return
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
    import timm
    import torch
    import torchvision

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
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
    words = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"model": name, "trace": f"refused: not done after {LIMIT_S} s", "seconds": LIMIT_S, "date": today()}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        why = f"refused: the process ended with {done.returncode}: {last[:200]}"
        return {"model": name, "trace": why, "seconds": 0, "date": today()}
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


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
        writer.writerow({**line, "command": command()})
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
