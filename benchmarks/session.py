"""What a session costs a training step: ResNet-20, batch 128, dense and pruned steps by turns in one process.

    python benchmarks/session.py [--rounds 40] [--threads 2] [--precision fp32] [--device cuda]

Cases: Campfire in its era with the masks of an epoch in place (what making them anew costs is spread over the epoch's
468 steps), the same with new masks after every step, ClickTrain's lasso phase, and frozen masks alone.
Two figures each: the time inside the session's hooks over the dense step (CPU only, where work is done when a call
returns), and the whole step over the dense one, which holds everything and the machine's noise.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from common import RESULTS, row
from torch import Tensor, nn

from autoprune.lut.bench import BenchRow, append_rows
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.tasks.models import build_model
from autoprune.trainers.recipe import Recipe, make_optimizer, native_precision
from autoprune.trainers.session import Session, attach

STEPS, EPOCHS, BATCH = 468, 400, 128
PATTERN = ["pattern(count=8,entries=4,kernels=0.5,share=1x1)", "fine(keep=0.5)"]
COMBINED = ["combined(keep=0.3,fraction=0.8)", "fine(keep=0.3)"]
ERA = {"era_start": 0, "era_length": EPOCHS - 1}
STAGES = {"warmup_epochs": 0, "hard_epoch": 2, "batches": 1}


@dataclass
class Case:
    """A network in training, with or without a session, and the seconds of its steps."""

    name: str
    precision: str
    device: str
    session: Session | None = None
    steps: list[float] = field(default_factory=list)
    hooks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = build_model("resnet20", 1, 10).to(self.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, Recipe(peak_lr=1e-3))
        self._spent = self._since = 0.0

    def attach(self, method: str, choices: list[str], settings: Mapping[str, object]) -> Session:
        """Attach a session between two pairs of clocks."""
        example = torch.zeros(1, 1, 28, 28)
        policy = uniform_policy(trace(build_model("resnet20", 1, 10), example), choices, model="resnet20")
        self.optimizer.register_step_pre_hook(self._start)
        self.optimizer.register_step_post_hook(self._start)
        self.session = attach(
            self.model, self.optimizer, policy, steps_per_epoch=STEPS, epochs=EPOCHS, method=method, settings=settings,
            example=example,
        )  # fmt: skip
        self.optimizer.register_step_pre_hook(self._stop)
        self.optimizer.register_step_post_hook(self._stop)
        return self.session

    def _start(self, *call: object) -> None:
        self._since = time.perf_counter()

    def _stop(self, *call: object) -> None:
        self._spent += time.perf_counter() - self._since

    def step(self, images: Tensor, labels: Tensor, repeats: int = 1, *, record: bool = True) -> float:
        """Take steps; return the seconds that the session's hooks took of one."""
        self._spent, before = 0.0, time.perf_counter()
        for _ in range(repeats):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = nn.functional.cross_entropy(self.model(images).float(), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        if record:
            self.steps.append((time.perf_counter() - before) / repeats)
            self.hooks.append(self._spent / repeats)
        return self._spent / repeats


def make_cases(precision: str, device: str, images: Tensor, labels: Tensor) -> dict[str, Case]:
    """Return a case per phase, each brought to where its phase is."""
    names = ("dense", "campfire-era", "campfire-every-step", "clicktrain-lasso", "masks-only")
    cases = {name: Case(name, precision, device) for name in names}
    era = cases["campfire-era"].attach("campfire", COMBINED, ERA)
    every = cases["campfire-every-step"].attach("campfire", COMBINED, {**ERA, "schedule": "step"})
    cases["clicktrain-lasso"].attach("clicktrain", PATTERN, {**STAGES, "hard_epoch": EPOCHS - 1})
    frozen = cases["masks-only"].attach("clicktrain", PATTERN, STAGES)
    for _ in range(3):
        for case in cases.values():
            case.step(images, labels, record=False)
    era.steps = every.steps = (EPOCHS // 4) * STEPS
    frozen.steps = 2 * STEPS
    for _ in range(2):
        for case in cases.values():
            case.step(images, labels, record=False)
    return cases


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def measure(cases: Mapping[str, Case], rounds: int, repeats: int, images: Tensor, labels: Tensor) -> list[float]:
    """Take steps of every case by turns; return the hooks' seconds of the steps that made an epoch's masks anew."""
    remade = []
    era = cases["campfire-era"]
    order = list(cases.values())
    for number in range(rounds):
        assert era.session is not None
        era.session.steps = (EPOCHS // 4 + 1 + number) * STEPS
        remade.append(era.step(images, labels, record=False))
        for case in order[number % len(order) :] + order[: number % len(order)]:
            case.step(images, labels, repeats)
    return remade


def make_rows(cases: Mapping[str, Case], remade: list[float], options: argparse.Namespace) -> list[BenchRow]:
    """Return two rows a case: share of the hooks, and the whole step."""
    dense = float(np.median(cases["dense"].steps))
    common = {"batch": BATCH, "threads": options.threads}
    rows = []
    for name, case in cases.items():
        steps_us = [1e6 * seconds for seconds in case.steps]
        rows.append(row("resnet20", name, "step", steps_us, baseline=1e6 * dense, unit="us", **common))
        if case.session is None or options.device == "cuda":
            continue
        spread = float(np.median(remade)) / STEPS if name == "campfire-era" else 0.0
        shares = [(seconds + spread) / dense for seconds in case.hooks]
        rows.append(row("resnet20", name, "hooks / dense step", shares, baseline=0.0, **common))
    named = {"dtype": "bfloat16" if options.precision == "bf16" else "float32"}
    if options.device == "cuda":
        named["device"] = torch.cuda.get_device_name()
    return [replace(entry, **named) for entry in rows]


def main() -> None:
    """Measure, print and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=1, help="steps between two looks at the clock")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["fp32", "bf16"], default=native_precision())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    images = torch.randn(BATCH, 1, 28, 28, device=options.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), device=options.device)
    with threads(options.threads):
        cases = make_cases(options.precision, options.device, images, labels)
        remade = measure(cases, options.rounds, options.repeats, images, labels)
    rows = make_rows(cases, remade, options)
    append_rows(RESULTS / "session.csv", rows)
    for entry in rows:
        print(f"{entry.choice:<22}{entry.metric:<20}{entry.p50:>12.4f} {entry.unit:<9}{entry.ratio:>8.4f}")


if __name__ == "__main__":
    main()
