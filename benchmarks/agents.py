"""Every agent on one real problem: same budget, evaluator and number of evaluations, several seeds.

    python benchmarks/agents.py [--budgets 33 25] [--evaluations 100] [--seeds 3] [--agents auto tpe …]

The score is the error the search minimises (KL divergence to the dense network, nats; lower is better), and the
validation accuracy of the same policy, both before any training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from common import RESULTS, row

from autoprune.core.budget import parse_budget
from autoprune.core.progress import Silent
from autoprune.core.rundir import Cache, RunDir
from autoprune.envs.problem import Problem
from autoprune.lut.bench import append_rows
from autoprune.search.base import SEARCHERS
from autoprune.search.config import SearchConfig
from autoprune.search.latency import Subject, open_latency
from autoprune.search.setup import make_problem, score_choices, worthwhile
from autoprune.search.study import Study
from autoprune.search_spaces.space import load_space
from autoprune.search_spaces.trace import trace
from autoprune.tasks.task import load_task


def make_problems(runs_dir: Path, percents: list[int]) -> dict[int, Problem]:
    """Return the problem of each latency budget, in percent, on this machine."""
    task = load_task("resnet20", "fashion-mnist")
    layers = trace(task.model, task.example)
    space = load_space("cpu-default", layers)
    config = SearchConfig(budget="latency=50%", run="bench-agents", runs_dir=runs_dir)
    run, cache = RunDir.open(runs_dir, config.name, config.resolved()), Cache(runs_dir)
    deployer = open_latency(Subject(task, layers, space, run, cache), config, Silent())
    scored = worthwhile(score_choices(task, space, cache, Silent()), deployer.table)
    dense_us = deployer.references.best_us
    return {
        percent: make_problem(layers, scored, deployer.table, parse_budget(f"latency={percent}%"), dense_us)
        for percent in percents
    }


def main() -> None:
    """Run every agent on every budget and seed; rows hold percentiles over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[33, 25])
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--agents", nargs="+", default=["knapsack", "auto", "tpe", "ddpg", "random", "uniform"])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    options = parser.parse_args()
    for percent, problem in make_problems(options.runs_dir, options.budgets).items():
        exact = 0.0
        for agent in options.agents:
            errors, accuracies, seconds = [], [], []
            for seed in range(options.seeds):
                started = time.perf_counter()
                trial = SEARCHERS.get(agent)().search(problem, Study(problem), options.evaluations, seed)
                seconds.append(time.perf_counter() - started)
                errors.append(trial.quality.error)
                accuracies.append(trial.quality.accuracy)
            exact = exact or float(np.median(errors))
            case = f"resnet20 fashion-mnist latency={percent}% {options.evaluations} evaluations {options.seeds} seeds"
            found = [
                row(case, agent, "error", errors, baseline=exact, unit="nats"),
                row(case, agent, "validation accuracy (1000 images)", accuracies, baseline=0.0),
                row(case, agent, "seconds (scores shared between agents)", seconds, baseline=0.0, unit="s"),
            ]
            append_rows(RESULTS / "agents.csv", found)
            print(
                f"latency={percent}% {agent:9s} error {np.mean(errors):.5f} ± {np.std(errors):.5f} "
                f"({np.mean(errors) / exact:.3f} of the first agent), accuracy {np.mean(accuracies):.4f}, "
                f"{np.mean(seconds):.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
