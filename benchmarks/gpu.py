"""Everything that is measured on a GPU, in one run of under nine minutes on an H200.

    python benchmarks/gpu.py [--out DIR] [--work DIR] [--parts layers tables …] [--budget tables=470] [--dry]

Parts, each in a process of its own with a time budget, so that one that fails or hangs costs no other; what was asked
for by name comes first:

    compile      all kernels, in parallel processes
    correctness  every kernel and configuration, forward and gradients, against float64 on the CPU
    layers       per 3×3 layer of ResNet-50 at batch 128: speed-up over the best cuDNN, beside model and floor
    networks     whole ResNet-18 and VGG-16 on 32×32 images, forward, at 2.25× and 4.5×
    training     their training step, forward and backward, at 4.5×
    tables       ResNet-20/32, VGG-16 (CIFAR-sized), ResNet-18/50 at batch 128, 1 and 32; DIR/gpu-tables.zip

Rows go to DIR/gpu.csv as they come; what failed, and why, to DIR/gpu-failures.txt; the bars and what was measured to
DIR/gpu-summary.md, after every part. Tables are kept in --work, so that the same command goes on where it stopped.
--budget gives a part other seconds: the whole set of tables without a limit is asked to take at most 480.
--dry does all of it on a CPU at tiny sizes, without timing anything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from pathlib import Path

from common import RESULTS
from gpu_summary import write_summary

# Seconds each part may take, its process's start included; together under nine minutes.
BUDGETS = {
    "compile": 35.0, "correctness": 60.0, "layers": 35.0, "networks": 85.0, "training": 75.0, "tables": 235.0
}
WHOLE_S = 530.0


def main(argv: list[str] | None = None) -> int:
    """Run the parts one after another; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-benchmark"), help="folder of unfinished tables")
    parser.add_argument("--parts", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--budget", nargs="+", default=[], metavar="PART=SECONDS", type=_seconds)
    parser.add_argument("--dry", action="store_true", help="on a CPU, at tiny sizes, without timing")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    if options.inside:
        return _inside(options)
    start = time.monotonic()
    failed = 0
    for part in options.parts:
        whole = max(WHOLE_S, sum(dict(options.budget).values()))
        budget = min(dict(options.budget).get(part, BUDGETS[part]), whole - (time.monotonic() - start))
        failed += not _outside(part, options, budget)
        write_summary(options.out / "dry" if options.dry else options.out)
    done = len(options.parts) - failed
    print(f"{done} of {len(options.parts)} parts in {time.monotonic() - start:.0f} s", flush=True)
    return failed


def _seconds(text: str) -> tuple[str, float]:
    part, _, seconds = text.partition("=")
    if part not in BUDGETS or not seconds.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write PART=SECONDS, of {', '.join(BUDGETS)}")
    return part, float(seconds)


def _outside(part: str, options: argparse.Namespace, budget: float) -> bool:
    """Run one part in a process of its own and return whether it came to its end."""
    command = [sys.executable, __file__, "--inside", "--parts", part, "--out", str(options.out)]
    command += ["--work", str(options.work), "--budget", f"{part}={budget:.1f}", *(["--dry"] if options.dry else [])]
    started = time.monotonic()
    try:
        if budget < 5.0:
            raise subprocess.TimeoutExpired(command, budget)
        code = subprocess.run(command, timeout=budget, check=False).returncode
        why = f"exit code {code}"
    except subprocess.TimeoutExpired:
        code, why = 1, f"stopped after {budget:.0f} s"
    print(f"{part}: {'done' if code == 0 else why} in {time.monotonic() - started:.0f} s", flush=True)
    if code != 0:
        _note(options.out, f"{part}: {why}")
    return code == 0


def _inside(options: argparse.Namespace) -> int:
    """Do one part here."""
    from gpu_bench import Bench
    from gpu_parts import PARTS

    (part,) = options.parts
    seconds = dict(options.budget).get(part, BUDGETS[part])
    bench = Bench.make(options.out, options.work, dry=options.dry, seconds=seconds)
    try:
        PARTS[part](bench)
    except Exception:  # whatever it was, it is for the file that says what failed
        _note(options.out, f"{part}:\n{traceback.format_exc()}")
        traceback.print_exc()
        return 1
    return int(bool(bench.failures))


def _note(out: Path, text: str) -> None:
    with (out / "gpu-failures.txt").open("a", encoding="utf-8") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
