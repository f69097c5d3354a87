"""The one gate through which every searcher evaluates: budget, scoring, memo and counting exist here once.

Shapes: L searched layers, C choices of a layer (ragged: one array per layer), D constraints, P points of a front.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from autoprune.core.choices import Choice
from autoprune.core.errors import InfeasibleBudget
from autoprune.core.layers import LayerSpec
from autoprune.envs.reach import cheapest_suffixes
from autoprune.search_spaces.space import fingerprint

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Assignment: TypeAlias = tuple[int, ...]
"""One choice index per searched layer."""

# A sum taken in another order may differ in its last digits; that is not a budget exceeded.
_TOLERANCE = 1e-9
_UNITS = {"latency": "us", "macs": " MACs", "params": " weights", "size": "B", "memory": "B"}


@dataclass(frozen=True, slots=True)
class Quality:
    """How good one policy is.

    Attributes:
        error: KL divergence to the dense network's outputs, nats; infinite when the network gives no finite output.
        accuracy: Top-1 on the evaluation subset, 0..1.
        seconds: What the evaluation took.
    """

    error: float
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Constraint:
    """One budget over the searched layers.

    Attributes:
        kind: ``latency``, ``macs``, ``params``, ``size`` or ``memory``.
        costs: One (C,) array per searched layer, in the kind's unit (µs, MACs, weights, bytes), all calls together.
        limit: Upper bound of their sum, the parts that no choice changes already taken off.
    """

    kind: str
    costs: tuple[FloatArray, ...]
    limit: float


def scheme(choice: Choice) -> str:
    """Return the choice's text without the amount it keeps: choices of one scheme differ in density alone."""
    parts = [part for part in choice.text.removesuffix(")").partition("(")[2].split(",") if part]
    return ",".join([choice.kind, *(part for part in parts if part.partition("=")[0] not in ("keep", "kernels"))])


class Problem:
    """Layers, choices and budget of one search, and the function that scores a policy.

    Args:
        layers: The L searched layers, in execution order.
        choices: Layer name → its choices, dense first.
        constraints: One or more; all must hold.
        errors_LC: Per layer a (C,) array: the network's error in nats with only this layer changed.
        evaluate: Scores an assignment; called once per distinct one.
        describe: Words for a constraint's kind and a cost in the constraint's unit, to put into error messages;
            the caller knows the fixed parts and the user's unit. By default the bare number with its unit.
    Raises:
        InfeasibleBudget: No policy meets the constraints; names the least that is reachable and the layer that
            holds it up.
        ValueError: Shapes do not agree.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        choices: Mapping[str, Sequence[Choice]],
        constraints: Sequence[Constraint],
        errors_LC: Sequence[FloatArray],
        evaluate: Callable[[Assignment], Quality],
        describe: Callable[[str, float], str] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.choices = tuple(tuple(choices[layer.name]) for layer in self.layers)
        self.constraints = tuple(constraints)
        self.errors_LC = tuple(np.asarray(error, dtype=np.float64) for error in errors_LC)
        self.fingerprint = fingerprint(self.layers, choices)
        self.evaluations = 0
        self._evaluate = evaluate
        self._describe = describe or (lambda kind, cost: f"{cost:g}{_UNITS.get(kind, '')}")
        self._memo: dict[Assignment, Quality] = {}
        self._check_shapes()
        self.costs_LCD = tuple(
            np.stack([np.asarray(constraint.costs[index], dtype=np.float64) for constraint in self.constraints], axis=1)
            for index in range(len(self.layers))
        )
        self._set_limits()

    def limited(self, limits_D: FloatArray) -> Problem:
        """Return the same problem under other limits, (D,); both remember each other's evaluations.

        Raises:
            InfeasibleBudget: No policy meets them.
        """
        other = copy.copy(self)
        pairs = zip(self.constraints, limits_D.tolist(), strict=True)
        other.constraints = tuple(replace(constraint, limit=limit) for constraint, limit in pairs)
        other._set_limits()
        return other

    def _set_limits(self) -> None:
        self.limits_D = np.array([constraint.limit for constraint in self.constraints])
        self._slack_D = _TOLERANCE * np.maximum(1.0, np.abs(self.limits_D))
        self.suffix_PD = cheapest_suffixes(self.costs_LCD, np.maximum(self.limits_D, 1e-12))
        if not self.allowed(()):
            raise self._infeasible()

    def _check_shapes(self) -> None:
        if not self.layers or not self.constraints:
            raise ValueError("a problem needs at least one searched layer and one constraint")
        tables = [self.errors_LC, *(constraint.costs for constraint in self.constraints)]
        for table in tables:
            if [len(row) for row in table] != list(self.sizes):
                raise ValueError(f"rows of {[len(row) for row in table]} choices for layers with {list(self.sizes)}")
        for constraint in self.constraints:
            if not all(np.isfinite(row).all() and (np.asarray(row) >= 0.0).all() for row in constraint.costs):
                raise ValueError(f"costs of '{constraint.kind}' must be finite and not negative")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices of each layer."""
        return tuple(len(choices) for choices in self.choices)

    def check(self, assignment: Sequence[int]) -> Assignment:
        """Return the assignment as a tuple of ints, or raise ValueError if it is none of this problem."""
        result = tuple(int(index) for index in assignment)
        if len(result) != len(self.layers) or not all(
            0 <= i < size for i, size in zip(result, self.sizes, strict=True)
        ):
            raise ValueError(f"assignment {result} does not index {self.sizes} choices")
        return result

    def named(self, assignment: Sequence[int]) -> dict[str, Choice]:
        """Return layer name → choice."""
        indices = self.check(assignment)
        rows = zip(self.layers, self.choices, indices, strict=True)
        return {layer.name: choices[index] for layer, choices, index in rows}

    def costs(self, assignment: Sequence[int]) -> FloatArray:
        """Return the cost under each constraint, (D,), in the constraints' units."""
        total_D = np.zeros(len(self.constraints))
        for layer, index in enumerate(assignment):
            total_D += self.costs_LCD[layer][index]
        return total_D

    @property
    def separable(self) -> bool:
        """Whether costs are sums over layers, each by its own choice."""
        return True

    @functools.cached_property
    def _padded_LCD(self) -> FloatArray:
        padded_LCD = np.full((len(self.layers), max(self.sizes), len(self.constraints)), np.inf)
        for layer, costs_CD in enumerate(self.costs_LCD):
            padded_LCD[layer, : len(costs_CD)] = costs_CD
        return padded_LCD

    def costs_of(self, assignments_NL: IntArray) -> FloatArray:
        """Return the costs of many assignments, (N, D)."""
        return np.asarray(self._padded_LCD[np.arange(len(self.layers)), assignments_NL].sum(axis=1))

    def after_moves(self, assignment: IntArray) -> FloatArray:
        """Return the costs after every move of one layer, (L, C, D), infinite where a layer has no such choice."""
        here_LD = self._padded_LCD[np.arange(len(self.layers)), assignment]
        return np.asarray(self.costs(assignment.tolist()) + (self._padded_LCD - here_LD[:, None, :]))

    def feasible(self, assignment: Sequence[int]) -> bool:
        """Return whether the assignment meets every constraint."""
        return bool((self.costs(assignment) <= self.limits_D + self._slack_D).all())

    def cheapest(self, constraint: int = 0) -> FloatArray:
        """Return each layer's least cost under one constraint, (L,)."""
        return np.array([costs_CD[:, constraint].min() for costs_CD in self.costs_LCD])

    def cheapest_suffix(self, constraint: int = 0) -> FloatArray:
        """Return (L + 1,): entry l is the least cost of layers l, l + 1, … under one constraint."""
        return np.append(np.cumsum(self.cheapest(constraint)[::-1])[::-1], 0.0)

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """Return the choices of the next layer from which the budget can still be met.

        Exact: every index returned has a completion, and following returned indices never runs into a dead end.
        With several constraints a very tight completion may be overlooked, never invented (see ``reach``).
        """
        layer = len(prefix)
        used_D = self.costs(prefix)
        reach_PD = self.suffix_PD[layer + 1]
        left_CD = self.limits_D + 0.5 * self._slack_D - used_D - self.costs_LCD[layer]
        fits_C = (reach_PD[None, :, :] <= left_CD[:, None, :]).all(axis=2).any(axis=1)
        return [int(index) for index in np.flatnonzero(fits_C)]

    def nearest_below(self, layer: int, cost: float, among: Sequence[int]) -> int:
        """Return the choice of largest cost ≤ ``cost`` (first constraint), or the cheapest; ties go to least error."""
        costs_C = self.costs_LCD[layer][:, 0]
        errors_C = self.errors_LC[layer]
        # A requested cost that went through float32 may lie a hair below the choice it came from.
        below = [index for index in among if costs_C[index] <= cost * (1.0 + 1e-6)]
        if below:
            return min(below, key=lambda index: (-costs_C[index], errors_C[index], index))
        return min(among, key=lambda index: (costs_C[index], errors_C[index], index))

    def decode_down(self, assignment: Sequence[int]) -> Assignment:
        """Return a feasible assignment: layer by layer the choice asked for, or the nearest cheaper one allowed."""
        done: list[int] = []
        for layer, index in enumerate(self.check(assignment)):
            allowed = self.allowed(done)
            if index not in allowed:
                index = self.nearest_below(layer, float(self.costs_LCD[layer][index, 0]), allowed)
            done.append(index)
        return tuple(done)

    def additive_error(self, assignment: Sequence[int]) -> float:
        """Return the sum of the single-layer errors, nats: a prediction that ignores how layers interact."""
        return float(sum(self.errors_LC[layer][index] for layer, index in enumerate(self.check(assignment))))

    def evaluate(self, assignment: Sequence[int]) -> Quality:
        """Return the quality of an assignment, feasible or not; scored once, then remembered."""
        key = self.check(assignment)
        if key not in self._memo:
            quality = self._evaluate(key)
            self.evaluations += 1
            if math.isnan(quality.error):
                quality = Quality(math.inf, quality.accuracy, quality.seconds)
            self._memo[key] = quality
        return self._memo[key]

    def remember(self, assignment: Sequence[int], quality: Quality) -> None:
        """Take over a quality that an earlier run scored."""
        self._memo.setdefault(self.check(assignment), quality)

    def _infeasible(self) -> InfeasibleBudget:
        for index, constraint in enumerate(self.constraints):
            least_L = self.cheapest(index)
            if least_L.sum() > constraint.limit + self._slack_D[index]:
                layer = self.layers[int(least_L.argmax())].name
                limit = self._describe(constraint.kind, constraint.limit)
                least = self._describe(constraint.kind, float(least_L.sum()))
                return InfeasibleBudget(
                    f"{constraint.kind} {limit}; the least this space reaches is {least} (held up by {layer}); "
                    "raise the budget or widen the space."
                )
        return self._jointly_infeasible()

    def _jointly_infeasible(self) -> InfeasibleBudget:
        # Each limit can be reached alone: name the one that is missed when all others are met as nearly as possible.
        over_PD = self.suffix_PD[0] / self.limits_D - 1.0
        best_D = self.suffix_PD[0][int(np.maximum(over_PD, 0.0).max(axis=1).argmin())]
        index = int((best_D / self.limits_D).argmax())
        kind = self.constraints[index].kind
        layer = self.layers[int(self.cheapest(index).argmax())].name
        limits = " and ".join(f"{c.kind} {self._describe(c.kind, c.limit)}" for c in self.constraints)
        return InfeasibleBudget(
            f"{limits} cannot hold together; with the others the least {kind} this space reaches is "
            f"{self._describe(kind, float(best_D[index]))} (held up by {layer}); raise one of them or widen the space."
        )
