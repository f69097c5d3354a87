"""A problem whose layers share channels: what a layer costs depends on the widths of the groups on both its sides.

The cost of a policy is a sum of *factors*, one for each layer, each looked up by the channels that its groups leave it.
``costs_LCD`` here are shares for ordering choices by; every question about a budget is answered by the true sum.

Shapes: L searched groups and layers, C choices (ragged), D constraints, N assignments, R shapes of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoprune.core.choices import Channels, Choice
from autoprune.core.layers import LayerSpec
from autoprune.envs.problem import Assignment, Constraint, FloatArray, IntArray, Problem, Quality

Amounts = tuple[int, int, int]
# Three amounts in one number: no layer has a million channels.
_RADIX = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """The cost of one layer by the choices of the groups that it depends on.

    Attributes:
        units: Places of the groups among the searched ones, rising.
        loss_UC: Per group the packed amounts that each of its choices takes away, (C,) int64.
        whole: Packed amounts of the whole layer.
        shapes_R: Packed amounts of each shape that was measured, rising.
        cost_RD: Cost of each.
    """

    units: tuple[int, ...]
    loss_UC: tuple[IntArray, ...]
    whole: int
    shapes_R: IntArray
    cost_RD: FloatArray

    @staticmethod
    def make(
        units: Sequence[int],
        whole: Amounts,
        losses: Sequence[Sequence[Amounts]],
        costs: Mapping[Amounts, Sequence[float]],
    ) -> Factor:
        """Return a factor from amounts: input channels, filters and groups.

        Args:
            units: Places of the groups, rising.
            whole: Amounts of the layer with all channels.
            losses: Per group, per choice, what the layer loses.
            costs: Amounts → cost under each constraint, of every shape the losses lead to.
        """
        packed = {_packed(key): list(cost) for key, cost in costs.items()}
        shapes_R = np.array(sorted(packed), dtype=np.int64)
        loss_UC = tuple(np.array([_packed(amount) for amount in row], dtype=np.int64) for row in losses)
        return Factor(tuple(units), loss_UC, _packed(whole), shapes_R, np.array([packed[int(k)] for k in shapes_R]))

    def costs(self, picks_NU: IntArray) -> FloatArray:
        """Return the costs, (N, D), for choices of the factor's own groups."""
        left_N = np.full(len(picks_NU), self.whole, dtype=np.int64)
        for column, loss_C in enumerate(self.loss_UC):
            left_N -= loss_C[picks_NU[:, column]]
        return np.asarray(self.cost_RD[np.searchsorted(self.shapes_R, left_N)])


def _packed(amounts: Amounts) -> int:
    channels, filters, groups = amounts
    return (channels * _RADIX + filters) * _RADIX + groups


class CoupledProblem(Problem):
    """A problem with factors.

    Args:
        layers: Leaders of the searched groups, and layers searched by themselves, in execution order.
        choices: Layer name → its choices, dense first.
        constraints: Their ``costs`` hold what a layer's own choice costs by itself: zeros for a group.
        factors: Of all layers that depend on a group.
        errors_LC, evaluate, describe: As of any problem.
        followers: Leader → the other writers of its group, which get its choice in ``named``.
    Raises:
        InfeasibleBudget: No policy was found that meets the constraints.
        ValueError: Shapes do not agree.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        choices: Mapping[str, Sequence[Choice]],
        constraints: Sequence[Constraint],
        factors: Sequence[Factor],
        errors_LC: Sequence[FloatArray],
        evaluate: Callable[[Assignment], Quality],
        describe: Callable[[str, float], str] | None = None,
        *,
        followers: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.factors = tuple(factors)
        self.followers = {leader: tuple(names) for leader, names in (followers or {}).items()}
        self.own_LCD = tuple(
            np.stack([np.asarray(c.costs[index], dtype=np.float64) for c in constraints], axis=1)
            for index in range(len(layers))
        )
        self.touching: tuple[tuple[Factor, ...], ...] = tuple(
            tuple(factor for factor in self.factors if index in factor.units) for index in range(len(layers))
        )
        self._plan: object | None = None
        self._shares_made = False
        super().__init__(layers, choices, constraints, errors_LC, evaluate, describe)

    @property
    def separable(self) -> bool:
        return False

    def _set_limits(self) -> None:
        self.limits_D = np.array([constraint.limit for constraint in self.constraints])
        self._slack_D = 1e-9 * np.maximum(1.0, np.abs(self.limits_D))
        if not self._shares_made:
            self.costs_LCD = self._shares()
            self._shares_made = True
        self.floors_PL = self._floors()
        self._parts_PLD = np.stack([self._parts(floor_L) for floor_L in self.floors_PL])
        # The cheapest rest of a policy, as the base class states it.
        self.suffix_PD = [
            np.concatenate([self._parts_PLD[:, layer:].sum(axis=1)]) for layer in range(len(self.layers) + 1)
        ]
        if not self.allowed(()):
            raise self._infeasible()

    def _shares(self) -> tuple[FloatArray, ...]:
        """Return what each choice costs while all others are dense, a factor's cost shared by its groups."""
        shares = []
        for index, own_CD in enumerate(self.own_LCD):
            total_CD = own_CD.copy()
            for factor in self.touching[index]:
                picks = np.zeros((len(own_CD), len(factor.units)), dtype=np.int64)
                picks[:, factor.units.index(index)] = np.arange(len(own_CD))
                total_CD += factor.costs(picks) / len(factor.units)
            shares.append(total_CD)
        return tuple(shares)

    def _floors(self) -> IntArray:
        """Return policies that are as cheap as can be, (P, L): of each constraint, and of their sum over the limits."""
        scale_D = np.maximum(self.limits_D, 1e-12)
        weights = [*np.eye(len(scale_D)), np.ones(len(scale_D)) / scale_D]
        weights += [np.ones(len(scale_D)) / scale_D + 3.0 * row / scale_D for row in np.eye(len(scale_D))]
        found = []
        for weight_D in weights if len(scale_D) > 1 else weights[:1]:
            starts = [np.array([int((c @ weight_D).argmin()) for c in self.costs_LCD]), np.array(self.sizes) - 1]
            ends = [descend(self, start, [own_CD @ weight_D for own_CD in self.own_LCD], weight_D) for start in starts]
            found.append(min(ends, key=lambda end: float(self.costs_of(end[None])[0] @ weight_D)))
        return np.unique(np.array(found), axis=0)

    def _parts(self, assignment_L: IntArray) -> FloatArray:
        """Return the cost that each layer's choice completes, (L, D): its own and the factors that end with it."""
        parts_LD = np.stack([own_CD[pick] for own_CD, pick in zip(self.own_LCD, assignment_L, strict=True)])
        for factor in self.factors:
            parts_LD[factor.units[-1]] += factor.costs(assignment_L[None, list(factor.units)])[0]
        return parts_LD

    def costs_of(self, assignments_NL: IntArray) -> FloatArray:
        rows_N = np.asarray(assignments_NL)
        total_ND = np.zeros((len(rows_N), len(self.constraints)))
        for index, own_CD in enumerate(self.own_LCD):
            total_ND += own_CD[rows_N[:, index]]
        for factor in self.factors:
            total_ND += factor.costs(rows_N[:, list(factor.units)])
        return total_ND

    def costs(self, assignment: Sequence[int]) -> FloatArray:
        """Return the costs of an assignment, (D,); of a prefix, those of the layers that it alone decides."""
        count = len(assignment)
        row = np.zeros((1, len(self.layers)), dtype=np.int64)
        row[0, :count] = list(assignment)
        total_D = np.zeros(len(self.constraints))
        for index in range(count):
            total_D += self.own_LCD[index][row[0, index]]
        for factor in self.factors:
            if factor.units[-1] < count:
                total_D += factor.costs(row[:, list(factor.units)])[0]
        return total_D

    def after_moves(self, assignment: IntArray) -> FloatArray:
        now_D = self.costs(assignment.tolist())
        after_LCD = np.full((len(self.layers), max(self.sizes), len(self.constraints)), np.inf)
        for index, size in enumerate(self.sizes):
            change_CD = self.own_LCD[index] - self.own_LCD[index][assignment[index]]
            for factor in self.touching[index]:
                costs_CD = factor.costs(self._varied(factor, index, assignment))
                change_CD = change_CD + costs_CD - costs_CD[assignment[index]]
            after_LCD[index, :size] = now_D + change_CD
        return after_LCD

    def _varied(self, factor: Factor, index: int, assignment: IntArray) -> IntArray:
        """Return the factor's picks, (C, U), for every choice of one of its groups."""
        picks_CU = np.repeat(np.asarray(assignment)[None, list(factor.units)], self.sizes[index], axis=0)
        picks_CU[:, factor.units.index(index)] = np.arange(self.sizes[index])
        return picks_CU

    def cheapest(self, constraint: int = 0) -> FloatArray:
        """Return each layer's part of the least cost under one constraint, (L,)."""
        sums_P = self._parts_PLD[:, :, constraint].sum(axis=1)
        return np.asarray(self._parts_PLD[int(sums_P.argmin()), :, constraint])

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """Return the choices of the next layer from which the budget can still be met.

        Every index returned has a completion, one of the cheapest policies' rests; following returned indices never
        runs into a dead end. Where a wider layer is the cheaper one, a very tight completion may be overlooked.
        """
        layer = len(prefix)
        if layer == len(self.layers):
            return []
        size = self.sizes[layer]
        rows = np.repeat(self.floors_PL[:, None, :], size, axis=1)
        rows[:, :, :layer] = np.asarray(prefix, dtype=np.int64)
        rows[:, :, layer] = np.arange(size)
        fits_N = (self.costs_of(rows.reshape(-1, len(self.layers))) <= self.limits_D + 0.5 * self._slack_D).all(axis=1)
        return [int(index) for index in np.flatnonzero(fits_N.reshape(-1, size).any(axis=0))]

    def named(self, assignment: Sequence[int]) -> dict[str, Choice]:
        """Return layer name → choice, the other writers of a group beside its leader."""
        found = super().named(assignment)
        for leader, names in self.followers.items():
            choice = found.get(leader)
            if isinstance(choice, Channels):
                found.update(dict.fromkeys(names, choice))
        return found


def descend(
    problem: CoupledProblem,
    start_L: IntArray,
    own_LC: Sequence[npt.NDArray[np.float64]],
    weight_D: FloatArray,
    sweeps: int = 20,
) -> IntArray:
    """Return the assignment that no change of one layer makes cheaper, going down from ``start_L``.

    Args:
        problem: Gives the factors.
        start_L: Where to start.
        own_LC: Per layer (C,): what each choice costs by itself, in the unit of the weighted constraints.
        weight_D: By which the factors' costs are summed.
        sweeps: Most passes over all layers.
    """
    now = np.array(start_L, dtype=np.int64)
    for _ in range(sweeps):
        changed = False
        for index, own_C in enumerate(own_LC):
            total_C = np.array(own_C, dtype=np.float64)
            for factor in problem.touching[index]:
                total_C += factor.costs(problem._varied(factor, index, now)) @ weight_D
            best = int(total_C.argmin())
            if total_C[best] < total_C[now[index]] - 1e-15 * abs(total_C[best]):
                now[index], changed = best, True
        if not changed:
            break
    return now
