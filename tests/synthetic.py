"""Synthetic search problems whose true error is not the sum of single-layer errors."""

from __future__ import annotations

import numpy as np

from autoprune.core.choices import Block, Choice, Fine, Pattern
from autoprune.core.layers import LayerSpec
from autoprune.envs.problem import Assignment, Constraint, Problem, Quality
from autoprune.search_spaces.space import ordered

_KEEPS = (0.75, 0.625, 0.5, 0.4, 0.333, 0.25, 0.1875, 0.125, 0.0625)


def layer_specs(count: int) -> tuple[LayerSpec, ...]:
    """A ResNet-like chain: maps shrink and channels grow along the way."""
    specs = []
    for index in range(count):
        stage = index * 3 // count
        width, size = 16 * 2**stage, 28 // 2**stage
        specs.append(
            LayerSpec(f"layer{index}", "conv", (width, width, 3, 3), (1, 1), (1, 1), input_hw=(size,) * 2,
                      output_hw=(size,) * 2)
        )
    return tuple(specs)


def layer_choices(layer: LayerSpec) -> tuple[Choice, ...]:
    sparse = [Block(keep, filters) for keep in _KEEPS for filters in (16, 32)]
    sparse += [Pattern(count, 4, kernels, (16, 1)) for count in (4, 8) for kernels in (1.0, 0.5, 0.25)]
    sparse += [Fine(keep) for keep in _KEEPS]
    return tuple(ordered(layer, sparse))


class Truth:
    """The hidden network: every layer's disturbance has a size and a direction, and disturbances add as vectors.

    ``vector``: the error is the squared length of their sum, so that layers reinforce or cancel each other, neighbours
    most; what an early layer loses also amplifies what later ones do. ``context``: each layer's error grows or
    shrinks by its own factor as the others' errors add up, so that single-layer errors misjudge layers unequally.
    """

    def __init__(self, layers: tuple[LayerSpec, ...], seed: int, interaction: float, kind: str = "vector") -> None:
        self.kind = kind
        rng = np.random.default_rng(seed)
        count = len(layers)
        self.choices = {layer.name: layer_choices(layer) for layer in layers}
        sensitivity = np.exp(rng.normal(-3.0, 1.0, count))
        power = rng.uniform(1.2, 2.6, count)
        scheme = {"dense": 0.0, "block": 1.35, "pattern": 1.1, "fine": 0.8}
        self.errors, self.costs = [], []
        for index, layer in enumerate(layers):
            dense_us = layer.macs / 4e4 * rng.uniform(0.8, 1.2)
            error, cost = [], []
            for choice in self.choices[layer.name]:
                density = choice.density(layer)
                jitter = rng.uniform(0.9, 1.1)
                bonus = 0.9 if getattr(choice, "count", 0) == 8 else 1.0
                error.append(sensitivity[index] * scheme[choice.kind] * bonus * jitter * (1 - density) ** power[index])
                slow = {"dense": 1.0, "block": 0.12 + 1.05 * density, "pattern": 0.15 + 1.1 * density}
                cost.append(dense_us * slow.get(choice.kind, 0.3 + 3.0 * density) * rng.uniform(0.97, 1.03))
            self.errors.append(np.array(error))
            self.costs.append(np.array(cost))
        distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
        mixed = rng.normal(size=(count, count))
        mixed = (mixed + mixed.T) / 2
        self.gram = np.eye(count) + interaction * (0.6 * np.exp(-distance / 2.0) + 0.25 * mixed) * (distance > 0)
        self.amplify = interaction * 0.5 * rng.uniform(0.0, 1.0, count)
        self.factor = interaction * rng.normal(0.5, 0.7, count)
        self.calls = 0

    def __call__(self, assignment: Assignment) -> Quality:
        self.calls += 1
        if self.kind == "context":
            alone = np.array([error[index] for error, index in zip(self.errors, assignment, strict=True)])
            others = np.tanh(2.0 * (alone.sum() - alone))
            error = float(np.sum(alone * np.exp(self.factor * others)))
            return Quality(error, float(0.93 * np.exp(-error)), 0.0)
        size = np.sqrt([error[index] for error, index in zip(self.errors, assignment, strict=True)])
        before = np.concatenate([[0.0], np.cumsum(self.amplify * size)[:-1]])
        size = size * (1.0 + before)
        error = float(max(size @ self.gram @ size, 0.2 * (size @ size)))
        return Quality(error, float(0.93 * np.exp(-error)), 0.0)


def make_problem(
    layers: int = 18,
    seed: int = 0,
    budget: float = 0.5,
    interaction: float = 1.0,
    macs: float | None = None,
    kind: str = "vector",
) -> Problem:
    """A problem with ``budget`` of the dense latency, and ``macs`` of the dense MACs if given."""
    specs = layer_specs(layers)
    truth = Truth(specs, seed, interaction, kind)
    constraints = [Constraint("latency", tuple(truth.costs), budget * sum(cost[0] for cost in truth.costs))]
    if macs is not None:
        work = tuple(
            np.array([layer.macs * choice.density(layer) for choice in truth.choices[layer.name]]) for layer in specs
        )
        constraints.append(Constraint("macs", work, macs * sum(row[0] for row in work)))
    return Problem(specs, truth.choices, constraints, tuple(truth.errors), truth)
