"""What scoring a policy costs: one evaluation, and the single-layer errors of all layers, in plain forward passes.

    python benchmarks/evaluation.py [--images 1000] [--choices 20] [--rounds 7]

The plain forward runs the same images through the model as it is (BatchNorm and all), in the same precision, the same
batches and on the same threads; all cases take turns in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from common import RESULTS, row

from autoprune.core.choices import Block, Choice, Dense, Fine, Pattern
from autoprune.core.layers import LayerSpec
from autoprune.envs.database import build_database
from autoprune.envs.evaluator import Evaluator
from autoprune.envs.network import BATCH, StitchedNetwork, side_by_side
from autoprune.lut.bench import append_rows
from autoprune.search.setup import MOMENT_IMAGES, RECALIBRATION_IMAGES, SINGLE_LAYER_IMAGES
from autoprune.search_spaces.trace import trace
from autoprune.tasks.precision import native_dtype
from autoprune.tasks.task import Task, load_task

_KEEPS = (0.75, 0.625, 0.5, 0.4, 0.333, 0.25, 0.1875, 0.125, 0.0625)


def make_options(task: Task, count: int) -> dict[LayerSpec, tuple[Choice, ...]]:
    """Return dense and ``count`` pruned choices for every layer that can take them."""
    pool: list[Choice] = [choice for keep in _KEEPS for choice in (Fine(keep), Block(keep, 16))]
    pool += [Pattern(8, 4, kernels, (16, 1)) for kernels in (1.0, 0.5, 0.25)]
    options = {}
    for layer in trace(task.model, task.example):
        fitting = [choice for choice in pool if choice.fits(layer) and layer.channels > 1]
        if layer.op == "conv" and fitting:
            options[layer] = (Dense(), *fitting[:count])
    return options


def plain_forward(task: Task, images: torch.Tensor) -> Callable[[], object]:
    """Return a call that runs the dense model on ``images`` in the evaluator's precision, batches and threads."""
    model = load_task(task.model_name, task.name).model.to(native_dtype(), memory_format=torch.channels_last)
    parts = torch.split(images.to(native_dtype(), memory_format=torch.channels_last), BATCH)

    def one(part: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # a thread's own setting
            out: torch.Tensor = model(part)
        return out

    def run() -> object:
        with side_by_side() as pool:
            return list(pool.map(one, parts))

    return run


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Measure in turn, append the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--choices", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = load_task(options.model, "fashion-mnist")
    data = task.data
    space = make_options(task, options.choices)
    started = time.perf_counter()
    database = build_database(task.model, space, data.normalize(data.train.images[:MOMENT_IMAGES]))
    print(f"layer database: {time.perf_counter() - started:.1f} s", flush=True)
    scored = data.validation.take(options.images)
    images = data.normalize(scored.images)
    network = StitchedNetwork(task.model, data.normalize(data.train.images[:RECALIBRATION_IMAGES]))
    evaluator = Evaluator(network, database, images, scored.labels)
    rng = np.random.default_rng(0)

    def policy() -> dict[str, Choice]:
        return {layer.name: choices[int(rng.integers(len(choices)))] for layer, choices in space.items()}

    plain = plain_forward(task, images)
    plain()
    evaluator.quality(policy())
    samples: dict[str, list[float]] = {"plain forward": [], "one evaluation": [], "single-layer errors": []}
    for number in range(options.rounds):
        samples["plain forward"].append(timed(plain))
        samples["one evaluation"].append(timed(lambda: evaluator.quality(policy())))
        if number < 3:
            samples["single-layer errors"].append(
                timed(lambda: evaluator.single_errors(space, SINGLE_LAYER_IMAGES))
            )
    base = float(np.median(samples["plain forward"]))
    pairs = sum(len(choices) - 1 for choices in space.values())
    case = f"{options.model} fashion-mnist {options.images} images, {len(space)} layers, {pairs} choices in all"
    rows = [
        row(case, name, "seconds", values, baseline=base, unit="s", batch=BATCH, threads=options.threads)
        for name, values in samples.items()
    ]
    append_rows(RESULTS / "evaluation.csv", rows)
    for name, values in samples.items():
        print(f"{name:22s} {np.median(values):8.3f} s = {np.median(values) / base:7.3f} plain forwards", flush=True)


if __name__ == "__main__":
    main()
