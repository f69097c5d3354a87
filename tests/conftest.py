"""What several test files share."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import settings

from autoprune.core.choices import Block, Choice, Dense, Pattern, parse_choice
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Accuracy, Cost, Policy, macs_ratio
from autoprune.core.result import FidelityPoint, LayerRow, Result, Row, TrialRow
from autoprune.core.rundir import RunDir, write_text

# Derandomised: a red test on one machine is red on every machine. No deadline: machines are shared.
settings.register_profile("autoprune", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("autoprune")

_LIMIT_US = 500.0


def _conv(name: str, filters: int, channels: int, size: int) -> LayerSpec:
    return LayerSpec(
        name, "conv", (filters, channels, 3, 3), padding=(1, 1), input_hw=(size, size), output_hw=(size, size)
    )


@pytest.fixture
def layers() -> tuple[LayerSpec, ...]:
    """Ten convolutions in three widths and a linear layer, like a small residual network's."""
    specs = [_conv("conv1", 16, 1, 28)]
    for stage, (width, size) in enumerate(((16, 28), (32, 14), (64, 7)), start=1):
        specs += [_conv(f"layer{stage}.{block}.conv1", width, width, size) for block in range(3)]
    return (*specs, LayerSpec("fc", "linear", (10, 64), bias=True))


def _choice(layer: LayerSpec, index: int) -> Choice:
    options = (Block(keep=0.25), Pattern(count=8, kernels=0.5, share=(16, 1)), Block(keep=0.5, filters=32), Dense())
    choice = options[index % len(options)]
    return choice if choice.fits(layer) and layer.channels > 1 and layer.op == "conv" else Dense()


@pytest.fixture
def policy(layers: tuple[LayerSpec, ...]) -> Policy:
    """A policy that mixes kinds of choices."""
    choices = {layer.name: _choice(layer, index) for index, layer in enumerate(layers)}
    return Policy.make(choices, layers, model="resnet20", budget="latency=50%")


def _layer_row(layer: LayerSpec, choice: Choice) -> LayerRow:
    dense = 2.0 + layer.macs / 2.5e4
    predicted = dense * (0.15 + 0.85 * choice.density(layer))
    return LayerRow(
        name=layer.name,
        shape=layer.signature,
        choice=choice.text,
        kernel=choice.kernel,
        density=choice.density(layer),
        dense_us=dense,
        predicted_us=predicted,
        measured_us=predicted * (1.0 + 0.04 * math.sin(layer.macs)),
        floor_us=layer.macs * choice.density(layer) / 6e4,
        why="the space holds no other choice" if choice == Dense() else "fastest of this choice's kernels",
    )


def _row(name: str, proposer: str, latency: float, accuracy: Accuracy, kept: float, choices: dict[str, str]) -> Row:
    def cost(us: float) -> Cost:
        return Cost(
            latency_us=us, dense_latency_us=1000.0, latency_ratio=us / 1000.0, macs_ratio=kept, params_ratio=kept
        )

    return Row(
        name=name,
        proposer=proposer,
        predicted=cost(latency),
        measured=cost(1.02 * latency) if name in ("dense", "chosen", "uniform") else None,
        accuracy=accuracy,
        feasible=None if name == "dense" else latency * 1.02 <= _LIMIT_US,
        choices=choices,
    )


def _trials() -> list[TrialRow]:
    trials = []
    for number in range(90):
        proposer = ("random", "tpe", "knapsack")[number // 30]
        latency = 330.0 + 240.0 * ((number * 0.618) % 1.0)
        error = (3.0 - number // 30) * math.exp(-(latency - 300.0) / 120.0) * (0.3 + 0.1 * math.sin(7.0 * number))
        trials.append(
            TrialRow(
                number=number,
                proposer=proposer,
                error=error,
                accuracy=0.93 - error / 20.0,
                latency_us=latency,
                seconds=0.3,
            )
        )
    return trials


def _fidelity(index: int) -> FidelityPoint:
    predicted = 300.0 + 20.0 * index
    return FidelityPoint(predicted_us=predicted, measured_us=predicted * (1.0 + 0.05 * math.sin(index)))


@pytest.fixture
def result(layers: tuple[LayerSpec, ...], policy: Policy) -> Result:
    """A whole result whose figures are made by formulas: nothing here was measured."""
    kept = macs_ratio(layers, policy.choices)
    text = dict(policy.file.choices)
    dense = {layer.name: "dense" for layer in layers}
    final = Accuracy(dense=0.932, pruned=0.881, tuned=0.928, test=0.9231, dense_test=0.9292)
    trials = _trials()
    best = min((trial for trial in trials if trial.latency_us < _LIMIT_US), key=lambda trial: trial.error)
    return Result(
        model="resnet20",
        data="fashion-mnist",
        budget="latency=50%",
        agent="knapsack",
        seed=0,
        met=True,
        rows=[
            _row("dense", "dense", 1000.0, Accuracy(dense=0.932), 1.0, dense),
            _row("chosen", "knapsack", 482.0, final, kept, text),
            _row("uniform", "uniform", 470.0, Accuracy(dense=0.932, pruned=0.71, tuned=0.911), 0.4, text),
            _row("random best", "random", 489.0, Accuracy(dense=0.932, pruned=0.65), 0.45, text),
        ],
        layers=[_layer_row(layer, parse_choice(text[layer.name])) for layer in layers],
        references={"plan": 1000.0, "onnxruntime": 1110.0, "torch-compile": 1904.0, "torch-folded": 2310.0},
        trials=trials,
        fidelity=[_fidelity(index) for index in range(30)],
        fidelity_mape=0.031,
        fidelity_kendall_tau=0.94,
        seconds={"table": 61.2, "layer database": 24.0, "search": 71.5, "verification": 12.0, "fine-tune": 95.0},
        context={"device": "cpu", "cpu": "made up for a test", "threads": 1, "batch": 1, "dtype": "float32"},
        absent_references={"torch-jit-optimized": "not made for this test"},
        latency_limit_us=_LIMIT_US,
        chosen_trial=best.number,
        run="made-up",
    )


@pytest.fixture
def run(tmp_path: Path, result: Result, policy: Policy) -> RunDir:
    """A finished run's folder, below ``tmp_path/runs``."""
    folder = tmp_path / "runs" / "made-up"
    folder.mkdir(parents=True)
    run = RunDir(folder)
    write_text(run.config, "{}\n")
    result.save(run.result)
    policy.save(run.policy)
    return run
