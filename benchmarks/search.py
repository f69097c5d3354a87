"""Search ResNet-20 on Fashion-MNIST at several budgets, batch sizes and thread counts; then time each winner again.

    python benchmarks/search.py [--budgets 50 33 25] [--batches 1 32] [--threads 1 2] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import RESULTS, command, row, today

from autoprune.cli.progress import make_progress
from autoprune.core.policy import Policy
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir
from autoprune.lut.bench import BenchRow, Labels, append_rows, bench, rows
from autoprune.search.config import SearchConfig
from autoprune.search.pipeline import run_search
from autoprune.tasks.task import load_task


def main() -> None:
    """Run every combination; a finished one is shown from its run folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 33, 25])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    options = parser.parse_args()
    for batch in options.batches:
        for threads in options.threads:
            for percent in options.budgets:
                config = SearchConfig(
                    budget=f"latency={percent}%",
                    batch=batch,
                    threads=threads,
                    seed=options.seed,
                    run=f"bench-b{batch}-t{threads}-{percent}",
                    runs_dir=options.runs_dir,
                )
                progress = make_progress()
                result = run_search(config, progress)
                progress.stage("timing", None)
                found = [*_accuracy_rows(config, result), *_latency_rows(config, result)]
                progress.finish()
                append_rows(RESULTS / "search.csv", found)
                _say(config, result)


def _case(config: SearchConfig) -> str:
    return f"{config.model} {config.data} {config.budget}"


def _accuracy_rows(config: SearchConfig, result: Result) -> list[BenchRow]:
    dense = result.row("chosen")
    assert dense is not None
    found = []
    for line in result.rows[1:]:
        assert line.measured is not None
        figures = {"validation accuracy before fine-tune": (line.accuracy.pruned, dense.accuracy.dense)}
        figures["validation accuracy after fine-tune"] = (line.accuracy.tuned, dense.accuracy.dense)
        figures["latency over fastest dense"] = (line.measured.latency_ratio, 1.0)
        if line.name == "chosen":
            figures["test accuracy"] = (line.accuracy.test, dense.accuracy.dense_test)
        for metric, (value, baseline) in figures.items():
            if value is not None and baseline is not None:
                found.append(
                    row(_case(config), line.name, metric, [value], baseline=baseline,
                        compression=1.0 / line.measured.params_ratio, batch=config.batch, threads=config.threads)
                )
    for metric, value in (("table MAPE", result.fidelity_mape), ("table Kendall tau", result.fidelity_kendall_tau),
                          ("search seconds", sum(result.seconds.values()))):
        unit = "s" if "seconds" in metric else "fraction"
        found.append(row(_case(config), "search", metric, [value], baseline=0.0, unit=unit,
                         batch=config.batch, threads=config.threads))
    return found


def _latency_rows(config: SearchConfig, result: Result) -> list[BenchRow]:
    run = RunDir(config.runs_dir / config.name)
    policy = Policy.load(run.policy)
    task = load_task(config.model, config.data, weights=run.weights)
    example = task.example.repeat(config.batch, 1, 1, 1)
    timed = bench(task.model, policy, example, config.threads, 6.0)
    compression = 1.0 / policy.file.predicted.params_ratio
    return rows(timed, Labels(_case(config), "chosen", compression, today(), command()))


def _say(config: SearchConfig, result: Result) -> None:
    chosen = result.row("chosen")
    assert chosen is not None
    assert chosen.measured is not None
    accuracy = chosen.accuracy
    print(
        f"batch {config.batch} threads {config.threads} {config.budget}: measured {chosen.measured.latency_ratio:.3f}, "
        f"validation {accuracy.dense:.4f} -> {accuracy.pruned:.4f} -> {accuracy.tuned:.4f}, test {accuracy.test:.4f} "
        f"(dense {accuracy.dense_test:.4f}), MAPE {result.fidelity_mape:.3f}, tau {result.fidelity_kendall_tau:.3f}, "
        f"{sum(result.seconds.values()):.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
