"""What the searchers themselves cost, evaluations aside: the exact solver, and a step of DDPG, in seconds of one core.

    python benchmarks/solvers.py [--layers 50] [--choices 16] [--buckets 10000] [--rounds 9]

Layers, choices, errors and costs are made up; an evaluation answers at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from common import RESULTS, row

from autoprune.core.choices import Choice, Dense, Fine
from autoprune.core.layers import LayerSpec
from autoprune.envs.problem import Assignment, Constraint, Problem, Quality
from autoprune.lut.bench import append_rows
from autoprune.search.base import SEARCHERS
from autoprune.search.knapsack import solve
from autoprune.search.study import Study


def tables(layers: int, choices: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return per layer the errors and costs of its choices, dense first."""
    rng = np.random.default_rng(0)
    density = np.linspace(1.0, 1.0 / choices, choices)
    errors = [rng.uniform(0.5, 2.0) * (1.0 - density) ** rng.uniform(1.2, 2.6) for _ in range(layers)]
    costs = [100.0 * rng.uniform(0.5, 2.0) * density * rng.uniform(0.97, 1.03, choices) for _ in range(layers)]
    return errors, costs


def make_problem(layers: int, choices: int) -> Problem:
    """Return a problem at half of the dense cost."""
    errors, costs = tables(layers, choices)
    specs = [
        LayerSpec(f"layer{index}", "conv", (64, 64, 3, 3), (1, 1), (1, 1), input_hw=(14, 14), output_hw=(14, 14))
        for index in range(layers)
    ]
    keeps = np.linspace(1.0, 1.0 / choices, choices)[1:]
    own: tuple[Choice, ...] = (Dense(), *(Fine(round(float(keep), 6)) for keep in keeps))

    def evaluate(assignment: Assignment) -> Quality:
        error = float(sum(row[index] for row, index in zip(errors, assignment, strict=True)))
        return Quality(error, 0.9 * float(np.exp(-error)), 0.0)

    limit = 0.5 * float(sum(row[0] for row in costs))
    constraint = Constraint("latency", tuple(costs), limit)
    return Problem(specs, {spec.name: own for spec in specs}, [constraint], errors, evaluate)


def seconds(call: Callable[[], object], rounds: int) -> list[float]:
    """Return the processor seconds of each of several calls, after one that does not count."""
    call()
    found = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return found


def main() -> None:
    """Measure, append the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--choices", type=int, default=16)
    parser.add_argument("--buckets", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--episodes", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    errors, costs = tables(options.layers, options.choices)
    limit = 0.5 * float(sum(row[0] for row in costs))

    def whole_search() -> object:
        problem = make_problem(options.layers, options.choices)
        return SEARCHERS.get("knapsack")().search(problem, Study(problem), 1, 0)

    def ddpg() -> int:
        problem = make_problem(20, options.choices)
        study = Study(problem)
        SEARCHERS.get("ddpg")().search(problem, study, options.episodes, 0)
        return 20 * len(study.trials)

    size = f"{options.layers} layers, {options.choices} choices"
    steps = ddpg()
    samples = {
        (f"{size}, {options.buckets:,} buckets", "knapsack: solve"): seconds(
            lambda: solve(errors, costs, limit, buckets=options.buckets), options.rounds
        ),
        (size, "knapsack: problem, tables and search"): seconds(whole_search, options.rounds),
        (f"20 layers, {options.choices} choices, {options.episodes} episodes", "ddpg: a step, learning and all"): [
            value / steps for value in seconds(ddpg, 3)
        ],
    }
    rows = [
        row(case, choice, "seconds of one core", values, baseline=0.0, unit="s")
        for (case, choice), values in samples.items()
    ]
    append_rows(RESULTS / "solvers.csv", rows)
    for (case, choice), values in samples.items():
        print(f"{choice:38s} {1e3 * float(np.median(values)):8.2f} ms   ({case})", flush=True)


if __name__ == "__main__":
    main()
