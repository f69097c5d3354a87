"""The solver for coupled layers: least additive error within a budget when layers share the widths between them.

A chain is the simplest case: a layer's cost depends on its own width and the one before, so that the table's state is
(budget used, last width). Of a residual network a few widths stay open at once: the state holds all those that a later
layer still asks for. Exact up to rounding while they are few; where they are many (a concatenation of everything), a
Lagrangian descent with moves of one and two layers, checked by the true cost.

Shapes: L layers, C choices (ragged), S states, B buckets, J joint states of the open widths and the next layer's.
Source: the coupled table of SEARCH §3; elimination along an order as in Dechter, "Bucket elimination" (1999).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.envs.coupled import CoupledProblem, descend
from autoprune.envs.problem import FloatArray, IntArray
from autoprune.search.dp_tables import finite_errors

# Cells of all tables together; a solution takes about a nanosecond for each.
_CELLS = 120_000_000
_LEAST_BUCKETS = 500
_LAGRANGE_STEPS = 24


@dataclass(frozen=True, slots=True)
class Step:
    """One layer of the order.

    Attributes:
        costs_JD: What it completes, by joint state: open widths before it, then its own choice.
        before: Number of states before it.
        after_J: The state that each joint state leads to.
        states: Number of states after it.
    """

    costs_JD: FloatArray
    before: int
    after_J: IntArray
    states: int


def elimination(problem: CoupledProblem) -> list[Step] | None:
    """Return the steps of the exact solver, or None where too many widths are open at once."""
    if problem._plan is None:
        problem._plan = _steps(problem) or "wide"
    return None if problem._plan == "wide" else problem._plan  # type: ignore[return-value]


def _steps(problem: CoupledProblem) -> list[Step] | None:
    sizes = problem.sizes
    last = [max([index, *(f.units[-1] for f in problem.touching[index])]) for index in range(len(sizes))]
    open_: list[int] = []
    steps, cells = [], 0
    for index, size in enumerate(sizes):
        scope = [*open_, index]
        joint = math.prod(sizes[u] for u in scope)
        cells += joint
        if cells * _LEAST_BUCKETS > _CELLS:
            return None
        picks_JU = np.stack(np.unravel_index(np.arange(joint), [sizes[u] for u in scope]), axis=1)
        costs_JD = problem.own_LCD[index][picks_JU[:, -1]].copy()
        for factor in problem.touching[index]:
            if factor.units[-1] == index:
                costs_JD += factor.costs(picks_JU[:, [scope.index(u) for u in factor.units]])
        left = [place for place, u in enumerate(scope) if last[u] > index]
        after_J = np.zeros(joint, dtype=np.int64)
        for place in left:
            after_J = after_J * sizes[scope[place]] + picks_JU[:, place]
        steps.append(Step(costs_JD, joint // size, after_J, math.prod(sizes[scope[place]] for place in left)))
        open_ = [scope[place] for place in left]
    return steps


def solve_coupled(
    problem: CoupledProblem, error_LC: Sequence[FloatArray], weight_D: FloatArray, budget: float, buckets: int
) -> IntArray:
    """Return the assignment, (L,), of least additive error whose weighted cost is within a budget.

    Exact up to rounding where the state stays small: no assignment whose cost is at most
    ``budget - L * (budget - floor) / buckets`` has a smaller error, with the floor the sum of each step's least cost;
    buckets are fewer than asked for where tables would be large.

    Args:
        problem: Gives the factors.
        error_LC: Per layer (C,); non-finite ones are chosen only where nothing else is left.
        weight_D: By which constraints are summed to one cost.
        budget: Upper bound of the sum; the cheapest policy is returned where no other is found within it.
        buckets: Resolution of the cost axis.
    """
    errors = [finite_errors(np.asarray(error_C, dtype=np.float64)) for error_C in error_LC]
    steps = elimination(problem)
    if steps is not None:
        buckets = max(_LEAST_BUCKETS, min(buckets, _CELLS // sum(len(step.costs_JD) for step in steps)))
        found = _table(steps, errors, weight_D, budget, buckets)
    else:
        found = _lagrangian(problem, errors, weight_D, budget)
    return found if found is not None else cheapest(problem, weight_D)


def cheapest(problem: CoupledProblem, weight_D: FloatArray) -> IntArray:
    """Return the cheapest policy that the problem knows, (L,)."""
    return np.asarray(problem.floors_PL[int((problem.costs_of(problem.floors_PL) @ weight_D).argmin())])


def _table(
    steps: Sequence[Step], errors: Sequence[FloatArray], weight_D: FloatArray, budget: float, buckets: int
) -> IntArray | None:
    costs = [step.costs_JD @ weight_D for step in steps]
    floor = sum(float(cost_J.min()) for cost_J in costs)
    if budget < floor:
        return None
    width = (budget - floor) / buckets
    tables = [np.zeros((1, buckets + 1))]
    weights = []
    for step, error_C, cost_J in zip(steps, errors, costs, strict=True):
        # Round the bucket up: rounding down lets the sum exceed the budget.
        share_J = (cost_J - cost_J.min()) / width if width > 0.0 else np.where(cost_J > cost_J.min(), np.inf, 0.0)
        weight_J = np.ceil(np.minimum(share_J, buckets + 1.0) - 1e-9).astype(np.int64)
        weights.append(weight_J)
        tables.append(_forward(tables[-1], step, error_C, weight_J))
    if not np.isfinite(tables[-1][0, buckets]):
        return None
    return _walk_back(steps, errors, weights, tables)


def _forward(before_SB: FloatArray, step: Step, error_C: FloatArray, weight_J: IntArray) -> FloatArray:
    buckets = before_SB.shape[1] - 1
    now_SB = np.full((step.states, buckets + 1), np.inf)
    candidate = np.empty(buckets + 1)
    choices = len(error_C)
    for joint, (weight, state) in enumerate(zip(weight_J.tolist(), step.after_J.tolist(), strict=True)):
        if weight > buckets:
            continue
        size = buckets + 1 - weight
        np.add(before_SB[joint // choices, :size], error_C[joint % choices], out=candidate[:size])
        np.minimum(now_SB[state, weight:], candidate[:size], out=now_SB[state, weight:])
    return now_SB


def _walk_back(
    steps: Sequence[Step], errors: Sequence[FloatArray], weights: Sequence[IntArray], tables: Sequence[FloatArray]
) -> IntArray:
    picks = np.zeros(len(steps), dtype=np.int64)
    state, left = 0, tables[-1].shape[1] - 1
    for index in range(len(steps) - 1, -1, -1):
        choices = len(errors[index])
        joint_J = np.flatnonzero((steps[index].after_J == state) & (weights[index] <= left))
        value_J = tables[index][joint_J // choices, left - weights[index][joint_J]] + errors[index][joint_J % choices]
        joint = int(joint_J[value_J.argmin()])
        picks[index] = joint % choices
        state, left = joint // choices, left - int(weights[index][joint])
    return picks


def _lagrangian(
    problem: CoupledProblem, errors: Sequence[FloatArray], weight_D: FloatArray, budget: float
) -> IntArray | None:
    """Return the best assignment within the budget that descents under rising prices of cost come to."""
    most = float(sum(error_C.max() for error_C in errors))
    cost = problem.costs_of(np.zeros((1, len(errors)), dtype=np.int64))[0] @ weight_D
    low, high = 1e-9, 1e3
    unit = max(most, 1e-30) / max(float(cost), 1e-30)
    best, least = None, math.inf
    now = np.zeros(len(errors), dtype=np.int64)
    for _ in range(_LAGRANGE_STEPS):
        price = math.sqrt(low * high) * unit
        own = [e + price * (c @ weight_D) for e, c in zip(errors, problem.own_LCD, strict=True)]
        now = descend(problem, now, own, price * weight_D, sweeps=6)
        if float(problem.costs_of(now[None])[0] @ weight_D) <= budget:
            error = float(sum(error_C[pick] for error_C, pick in zip(errors, now, strict=True)))
            if error < least:
                best, least = now.copy(), error
            high = math.sqrt(low * high)
        else:
            low = math.sqrt(low * high)
    return best
