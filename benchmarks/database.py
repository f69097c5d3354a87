"""What the layer database of a large network costs on this machine: built, found again, and the errors that follow.

    python benchmarks/database.py --data imagefolder:DIR [--model torchvision:resnet50] [--threads 2]

Random weights, under BatchNorm statistics of these images: as they are made, deep layers see next to constant inputs,
which no trained network does. A build that is stopped goes on from the layers that are done.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS, row
from safetensors.torch import save_file

from autoprune.core.progress import Silent
from autoprune.core.rundir import Cache
from autoprune.envs.network import recalibrate
from autoprune.lut.bench import append_rows
from autoprune.search.channels import open_space
from autoprune.search.setup import MOMENT_IMAGES, score_choices
from autoprune.search_spaces.trace import trace
from autoprune.tasks.networks import network_for
from autoprune.tasks.task import judged_task, load_task


class Stopwatch(Silent):
    """Notes how long each stage took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name = "preparation"
        self._steps, self._started = 0, time.perf_counter()

    def stage(self, name: str, total: int | None = None) -> None:
        self.finish()
        self._name, self._steps, self._started = name, 0, time.perf_counter()
        print(f"{name}: {total} steps", flush=True)

    def advance(self, n: int = 1) -> None:
        self._steps += n
        print(f"{self._name} {self._steps}: {time.perf_counter() - self._started:.0f} s", flush=True)

    def finish(self) -> None:
        self.seconds[self._name] = time.perf_counter() - self._started


def main() -> None:
    """Make it, find it again; append the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--space", default="cpu-default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        model = network_for(options.model, torch.zeros(1, 3, 224, 224), 1_000)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
        task = judged_task(load_task(options.model, options.data, weights=weights), "agreement")
    recalibrate(task.model, task.data.normalize(task.data.train.images[:64]), batch=32)
    space, groups = open_space(options.space, task.model, task.example, trace(task.model, task.example))
    count = sum(len(space.choices[layer.name]) for layer in space.searched)
    cache, seconds = Cache(options.runs_dir), dict[str, float]()
    for when in ("made", "found again"):
        clock = Stopwatch()
        score_choices(task, space, cache, clock, groups)
        clock.finish()
        seconds |= {f"{stage}, {when}": value for stage, value in clock.seconds.items()}
    images = min(MOMENT_IMAGES, len(task.data.train))
    case = f"{options.model} 224, {images} images, {len(space.searched)} layers, {count} choices"
    rows = [row(case, name, "seconds", [value], baseline=0.0, unit="s", threads=options.threads)
            for name, value in seconds.items()]  # fmt: skip
    append_rows(RESULTS / "database.csv", rows)
    for one in rows:
        print(one.choice, one.p50)


if __name__ == "__main__":
    main()
