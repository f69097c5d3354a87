"""A memory budget as a constraint: maps + all packed weights + the largest workspace.

A maximum does not add up over layers. But for any bound W on the workspace, the budget holds exactly when no layer
takes a choice of a larger workspace and the weights fit into what maps and W leave. So the problem is posed once for
each W that occurs, and the one whose exact solution promises the least error is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from autoprune.core.budget import Limit
from autoprune.core.choices import Choice, Dense
from autoprune.core.errors import InfeasibleBudget
from autoprune.core.layers import LayerSpec
from autoprune.envs.problem import Constraint, Problem
from autoprune.lut.memory import map_bytes, peak_bytes, workspace_bytes
from autoprune.lut.table import LatencyTable
from autoprune.search.knapsack import solve_problem

_MOST_BOUNDS = 8


@dataclass(frozen=True, slots=True)
class Memory:
    """The parts of a memory budget that no single layer decides.

    Attributes:
        maps_bytes: Feature maps of the deployed network.
        workspace_bytes: The bound on every layer's workspace.
    """

    maps_bytes: int
    workspace_bytes: int


def kept_map_bytes(table: LatencyTable, model: nn.Module, example: Tensor) -> int:
    """Return the bytes of feature maps that the deployed network keeps: the table's note, or by planning the model.

    Args:
        table: Its context says where.
        model: float32, on the CPU.
        example: (N, C, H, W) float32 of the context's batch.
    Raises:
        ModelError: Neither: the model is not one flat plan.
    """
    if table.whole is not None and table.whole.activation_bytes is not None:
        return table.whole.activation_bytes
    return map_bytes(model, example, table.context)


def workspace_bounds(
    layers: tuple[LayerSpec, ...], options: Mapping[LayerSpec, tuple[Choice, ...]], table: LatencyTable
) -> list[int]:
    """Return the workspaces that may be the largest of a network, falling; evenly thinned where they are many."""
    fixed = max((workspace_bytes(table, layer, Dense()) for layer in layers if layer not in options), default=0)
    needed = [[workspace_bytes(table, layer, choice) for choice in choices] for layer, choices in options.items()]
    least = max([fixed, *(min(row) for row in needed)])
    bounds = sorted({least, *(size for row in needed for size in row if size > least)}, reverse=True)
    places = np.unique(np.linspace(0, len(bounds) - 1, min(len(bounds), _MOST_BOUNDS)).round().astype(int))
    return [bounds[place] for place in places]


def memory_constraint(
    limit: Limit,
    layers: tuple[LayerSpec, ...],
    options: Mapping[LayerSpec, tuple[Choice, ...]],
    table: LatencyTable,
    memory: Memory,
) -> tuple[Constraint, float]:
    """Return the constraint over the searched layers' weights under a bound on workspaces, and all other bytes.

    A choice that exceeds the bound costs more than the whole limit.
    """
    fixed = float(memory.maps_bytes + memory.workspace_bytes)
    fixed += sum(table.row(layer, Dense()).weight_bytes for layer in layers if layer not in options)
    whole = limit.absolute(peak_bytes(table, layers, {}, memory.maps_bytes))
    costs = tuple(
        np.array(
            [
                float(table.row(layer, choice).weight_bytes)
                if workspace_bytes(table, layer, choice) <= memory.workspace_bytes
                else 2.0 * max(whole, fixed)
                for choice in choices
            ]
        )
        for layer, choices in options.items()
    )
    return Constraint("memory", costs, whole - fixed), fixed


def best_bounded(bounds: list[int], pose: Callable[[int], Problem]) -> Problem:
    """Return the problem of the workspace bound whose exact solution promises the least error.

    Args:
        bounds: Workspaces, bytes.
        pose: Bound → problem; raises InfeasibleBudget.
    Raises:
        InfeasibleBudget: No bound leaves a policy that meets the budget.
    """
    best: tuple[float, Problem] | None = None
    refused: InfeasibleBudget | None = None
    for bound in bounds:
        try:
            problem = pose(bound)
        except InfeasibleBudget as error:
            refused = error
            continue
        error_nats = problem.additive_error(solve_problem(problem))
        if best is None or error_nats < best[0]:
            best = (error_nats, problem)
    if best is None:
        assert refused is not None
        raise refused
    return best[1]
