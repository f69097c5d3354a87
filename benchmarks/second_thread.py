"""What a second thread gives one image: ResNet-20 dense and under uniform policies, alternating in one process.

    python benchmarks/second_thread.py [--rounds 12]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from common import RESULTS, row

from autoprune.core.choices import Choice, parse_choice
from autoprune.kernels.cpu.program import Program
from autoprune.kernels.plan import Plan, build_plan
from autoprune.lut.bench import append_rows
from autoprune.lut.deploy import masked_copy
from autoprune.search_spaces.trace import trace
from autoprune.tasks.task import load_task

CHOICES = ("block(keep=0.5,filters=16)", "block(keep=0.333,filters=16)", "block(keep=0.22,filters=16)",
           "fine(keep=0.22)", "fine(keep=0.11)")
_REST_S, _RUNS = 0.002, 60


def programs() -> dict[tuple[str, int], Program]:
    """Return (policy, threads) → ResNet-20 at batch 1 with that choice in every 3×3 layer but the first."""
    task = load_task("resnet20", "fashion-mnist")
    inner = [layer.name for layer in trace(task.model, task.example)[1:] if layer.window == (3, 3)]
    found = {}
    for text in ("dense", *CHOICES):
        choices: dict[str, Choice] = {} if text == "dense" else dict.fromkeys(inner, parse_choice(text))
        masked = masked_copy(task.model, choices)
        for threads in (1, 2):
            plan = build_plan(masked, task.example, choices, threads=threads)
            assert isinstance(plan, Plan)
            found[text, threads] = plan.program(1)
    return found


def main() -> None:
    """Time every network in turn, round after round, and append a row for each policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    cases = programs()
    samples: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case, program in cases.items():
            time.sleep(_REST_S)  # the threads of the case before stop spinning
            program.time_us(_RUNS // 3)
            samples[case].append(float(np.median(program.time_us(_RUNS))))
    rows = []
    for text in ("dense", *CHOICES):
        alone = float(np.median(samples[text, 1]))
        rows.append(row("resnet20 28x28, whole network", text, "latency on 2 threads over 1", samples[text, 2],
                        baseline=alone, unit="us", threads=2))
        print(f"{text:30s} {alone:7.1f} us on one thread, {np.median(samples[text, 2]):7.1f} us on two")
    append_rows(RESULTS / "second_thread.csv", rows)


if __name__ == "__main__":
    main()
