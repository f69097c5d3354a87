"""What a training step takes under final masks, on dense and on the sparse kernels that the table chooses.

    python benchmarks/training_step.py [--rounds 12] [--threads 1] [--precision fp32 bf16] [--ratios 4.5 8.6]

ResNet-20, batch 128, dense network, masked one and sparse one by turns in one process; the layers' rows of each
direction are measured first, as ``autoprune train`` does. ``ratio`` is over the dense network's step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from common import RESULTS, row
from torch import Tensor, nn
from trainers_cells import kernels_for

from autoprune.lut.bench import BenchRow, append_rows
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.tasks.models import build_model
from autoprune.trainers.recipe import Recipe, make_optimizer
from autoprune.trainers.session import Session, attach
from autoprune.trainers.steps import StepChooser, StepSettings

BATCH = 128


def choices_for(ratio: float, kind: str) -> list[str]:
    """Return the uniform policy's choices for ``ratio`` times fewer convolution weights."""
    layers = trace(build_model("resnet20", 1, 10), torch.zeros(1, 1, 28, 28))
    kernels = kernels_for(layers, ratio)
    keep = round(kernels * 4 / 9, 4)
    return {
        "pattern share 1x1": [f"pattern(count=8,entries=4,kernels={kernels},share=1x1)"],
        "pattern share 16x1": [f"pattern(count=8,entries=4,kernels={kernels},share=16x1)"],
        "single weights": [f"fine(keep={keep})"],
        "blocks of 16": [f"block(keep={keep},filters=16)"],
    }[kind]


class Case:
    """A network in training under final masks, from its first step on."""

    def __init__(self, choices: list[str] | None, half: bool, sparse: bool) -> None:
        torch.manual_seed(0)
        self.half = half
        self.model: nn.Module = build_model("resnet20", 1, 10).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, Recipe(peak_lr=1e-3))
        self.seconds: list[float] = []
        self.session: Session | None = None
        self.chooser = StepChooser(StepSettings(BATCH, half))
        if choices is not None:
            example = torch.zeros(1, 1, 28, 28)
            policy = uniform_policy(trace(self.model, example), choices, model="resnet20")
            self.session = attach(
                self.model, self.optimizer, policy, steps_per_epoch=1, epochs=10**6, method="clicktrain",
                settings={"warmup_epochs": 0, "hard_epoch": 0, "batches": 1}, example=example,
            )  # fmt: skip
            if sparse:
                self.session.run_sparse(self.chooser)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Take a step; return its seconds."""
        before = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = nn.functional.cross_entropy(self.model(images).float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        return time.perf_counter() - before


def measure(name: str, choices: list[str], ratio: float, half: bool, options: argparse.Namespace) -> Iterator[BenchRow]:
    """Yield the rows of one policy in one precision."""
    images = torch.randn(BATCH, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    cases = {"dense": Case(None, half, False), "masked": Case(choices, half, False)}
    cases["sparse"] = Case(choices, half, True)
    for number in range(options.rounds + 3):
        for case in cases.values():
            seconds = case.step(images, labels)
            if number >= 3:
                case.seconds.append(seconds)
    dense_us = 1e6 * float(np.median(cases["dense"].seconds))
    session = cases["sparse"].session
    assert session is not None
    share = f"{len(session.sparse_layers)} of {len(session.masks)} layers sparse"
    for kind in ("masked", "sparse"):
        case = f"resnet20 training step, {kind}" + (f", {share}" if kind == "sparse" else "")
        samples = [1e6 * seconds for seconds in cases[kind].seconds]
        found = row(
            case, f"{name} {ratio}x", "step", samples, baseline=dense_us, compression=ratio, unit="us", batch=BATCH,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        yield replace(found, dtype="bfloat16" if half else "float32")
    runs = cases["sparse"].chooser.explain()
    measured = [run for run in runs if run.dense_us > 0]
    chosen, dense = (sum(getattr(run, field) for run in measured) for field in ("chosen_us", "dense_us"))
    found = row(
        "resnet20 training step, convolutions by the table", f"{name} {ratio}x", "step", [chosen], baseline=dense,
        compression=ratio, unit="us", batch=BATCH, threads=torch.get_num_threads(),
    )  # fmt: skip
    yield replace(found, dtype="bfloat16" if half else "float32")


def main() -> None:
    """Measure, print and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[4.5, 8.6])
    kinds = ["pattern share 1x1", "pattern share 16x1", "single weights", "blocks of 16"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for ratio in options.ratios:
        for kind in options.kinds:
            for precision in options.precision:
                rows = list(measure(kind, choices_for(ratio, kind), ratio, precision == "bf16", options))
                append_rows(RESULTS / "training_step.csv", rows)
                for entry in rows:
                    print(f"{entry.case:<62}{entry.choice:<26}{entry.dtype:<10}{entry.p50:>9.0f} us{entry.ratio:>8.3f}")


if __name__ == "__main__":
    main()
