"""The problem as a gymnasium environment, for DDPG and for anybody's own agent: one step per layer.

``gymnasium.make("autoprune/PruningEnv-v0", problem=problem)``

Source: He et al., AMC (2018): state, action bound and terminal reward. Ours adds what the latency table knows to the
state, and a second action for the scheme; the decoder goes *down* to measured choices, so no policy exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from autoprune.core.errors import AutopruneError
from autoprune.core.registry import unknown_name
from autoprune.envs.problem import Assignment, FloatArray, Problem, Quality, scheme
from autoprune.envs.reach import useful_rows

Reward: TypeAlias = Literal["kl", "log_kl", "error", "error-log-cost", "accuracy"]
REWARDS: tuple[Reward, ...] = ("kl", "log_kl", "error", "error-log-cost", "accuracy")

FEATURES = (
    "t", "n", "c", "h", "w", "stride", "k", "cost", "reduced", "rest", "action",
    "dense_share", "least_share", "slack",
)  # fmt: skip
"""Names of the observation's entries, in order; ``layer_features`` and ``PruningEnv`` say what they are."""

_STATIC = 8
# A network without finite output must not feed an infinite return to a critic.
_WORST_ERROR = 20.0


def layer_features(problem: Problem) -> FloatArray:
    """Return the features that do not change in an episode, (L, 8), each scaled to [0, 1] over the layers.

    t index · n filters · c input channels · h, w input map · stride · k window · cost MACs. A feature that is the same
    for all layers is 0. Of uneven strides and windows, the rows' count.
    """
    rows = [
        (i, s.filters, s.channels, s.input_hw[0], s.input_hw[1], s.stride[0], s.window[0], s.macs)
        for i, s in enumerate(problem.layers)
    ]
    raw_LF = np.array(rows, dtype=np.float64)
    low_F, high_F = raw_LF.min(axis=0), raw_LF.max(axis=0)
    return np.asarray((raw_LF - low_F) / np.where(high_F > low_F, high_F - low_F, 1.0))


class PruningEnv(gymnasium.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
    """Choose the layers' choices one after the other; the last step scores the policy.

    Observation, (14,) in [0, 1]: the eight ``layer_features`` of the layer to choose for; ``reduced`` and ``rest``, the
    cost already removed and the dense cost still to visit after this layer, as fractions of the dense cost;
    ``action``, what the previous layer kept (its executed first action; 0 at the start); ``dense_share`` and
    ``least_share``, this layer's dense and cheapest cost as fractions of the dense cost of all layers; ``slack``, the
    part of the budget left if every layer from here on takes its cheapest choice (the least over all constraints).
    Cost is the first constraint's. After the last layer the static features are 0.

    Action, (2,) in [0, 1]: the fraction of the layer's dense cost to keep, and the scheme (pattern count and all that
    sets two choices of one density apart) as a place on the layer's list of schemes. Executed is the dearest choice of
    that scheme (dense counts to every scheme) within the fraction, among those from which the budget can still be met;
    if none, the scheme's cheapest, then any scheme's. With ``useful`` choices that another one undercuts in cost and
    single-layer error are not on the list: AMC's ratio has one way to prune a layer, and of several ways to spend
    the same time only the best is worth learning about.
    ``info["executed"]`` holds the action that names what was executed: store it, not the raw one.

    Reward: 0 before the last layer, then by ``reward``: ``kl`` −error in nats (not below −20); ``log_kl`` −ln(error
    + 0.001), the same order with small errors spread apart; ``error`` accuracy − 1; ``accuracy`` accuracy;
    ``error-log-cost`` (accuracy − 1) · ln(1 + cost), AMC's accuracy-guaranteed reward, with the policy's first cost.
    Returns are undiscounted: use γ = 1.

    Args:
        problem: What is searched.
        reward: Scale of the terminal reward.
        evaluate: Scores the finished assignment; the problem's own by default.
        useful: Leave out what another choice of the layer undercuts.
    Raises:
        UnknownName: No such reward.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium declares it so

    def __init__(
        self,
        problem: Problem,
        reward: Reward = "kl",
        evaluate: Callable[[Assignment], Quality] | None = None,
        *,
        useful: bool = True,
    ) -> None:
        if reward not in REWARDS:
            raise unknown_name("reward", reward, REWARDS)
        self.problem = problem
        self.reward_kind = reward
        self._score = evaluate or problem.evaluate
        self.observation_space = spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32)
        self.action_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self._static_LF = layer_features(problem)
        self._dense_L = np.array([costs_CD[0, 0] for costs_CD in problem.costs_LCD])
        self._least_L = problem.cheapest()
        self._suffix_DL = [problem.cheapest_suffix(index) for index in range(len(problem.constraints))]
        rows = [row.tolist() for row in useful_rows(problem.errors_LC, problem.costs_LCD)]
        self._rows = [set(row) for row in (rows if useful else map(range, problem.sizes))]
        self._schemes = [
            sorted({scheme(choices[index]) for index in row if index > 0}) or ["dense"]
            for choices, row in zip(problem.choices, self._rows, strict=True)
        ]
        self._prefix: list[int] = []
        self._kept = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start a new policy; the environment has no randomness of its own."""
        super().reset(seed=seed)
        self._prefix, self._kept = [], 0.0
        return self._observation(), {}

    def step(
        self, action: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Choose for the next layer.

        ``info`` holds ``choice`` (index), ``executed`` ((2,) float32) and, after the last layer, ``assignment`` and
        ``quality``.
        """
        if len(self._prefix) == len(self.problem.layers):
            raise AutopruneError("the policy is complete; call reset() before step().")
        choice, executed = self.decode(tuple(self._prefix), action)
        self._prefix.append(choice)
        self._kept = float(executed[0])
        info: dict[str, Any] = {"choice": choice, "executed": executed}
        if len(self._prefix) < len(self.problem.layers):
            return self._observation(), 0.0, False, False, info
        assignment = tuple(self._prefix)
        quality = self._score(assignment)
        info |= {"assignment": assignment, "quality": quality}
        return self._observation(), self._reward(assignment, quality), True, False, info

    def decode(self, prefix: Assignment, action: npt.NDArray[np.float32]) -> tuple[int, npt.NDArray[np.float32]]:
        """Return the choice index that the action means after ``prefix``, and the action that names it exactly."""
        layer = len(prefix)
        keep, place = (min(max(float(value), 0.0), 1.0) for value in action)
        names = self._schemes[layer]
        wanted = min(int(place * len(names)), len(names) - 1)
        allowed = self.problem.allowed(prefix)
        # Several constraints, or coupled layers, may leave only what is not useful by itself.
        allowed = [index for index in allowed if index in self._rows[layer]] or allowed
        choice = self._pick(layer, names[wanted], keep * self._dense_L[layer], allowed)
        return choice, self.action_of(layer, choice, place)

    def action_of(self, layer: int, choice: int, place: float = 0.5) -> npt.NDArray[np.float32]:
        """Return the action that names a choice exactly; ``place`` is kept for dense, which belongs to every scheme."""
        if choice == 0:
            return np.array([1.0, place], dtype=np.float32)
        names = self._schemes[layer]
        name = scheme(self.problem.choices[layer][choice])
        kept = self.problem.costs_LCD[layer][choice, 0] / max(self._dense_L[layer], 1e-12)
        centre = (names.index(name) + 0.5) / len(names) if name in names else place
        return np.array([min(kept, 1.0), centre], dtype=np.float32)

    def _pick(self, layer: int, name: str, cost: float, allowed: list[int]) -> int:
        choices, costs_C = self.problem.choices[layer], self.problem.costs_LCD[layer][:, 0]
        members = [index for index in allowed if index == 0 or scheme(choices[index]) == name]
        if any(costs_C[index] <= cost * (1.0 + 1e-6) for index in members):
            return self.problem.nearest_below(layer, cost, members)
        sparse = [index for index in members if index > 0 and costs_C[index] <= costs_C[0]]
        if sparse:
            return min(sparse, key=lambda index: (costs_C[index], index))
        return self.problem.nearest_below(layer, cost, allowed)

    def _reward(self, assignment: Assignment, quality: Quality) -> float:
        error = min(quality.error, _WORST_ERROR)
        values = {
            "kl": -error,
            "log_kl": -float(np.log(max(error, 0.0) + 1e-3)),
            "error": quality.accuracy - 1.0,
            # 1 + cost: the logarithm of a cost below its unit would turn the reward's sign.
            "error-log-cost": (quality.accuracy - 1.0) * float(np.log1p(self.problem.costs(assignment)[0])),
            "accuracy": quality.accuracy,
        }
        return float(values[self.reward_kind])

    def _observation(self) -> npt.NDArray[np.float32]:
        layer, layers = len(self._prefix), len(self.problem.layers)
        total = max(float(self._dense_L.sum()), 1e-12)
        used_D = self.problem.costs(self._prefix)
        ends = layer == layers
        values = np.zeros(len(FEATURES))
        values[:_STATIC] = 0.0 if ends else self._static_LF[layer]
        values[_STATIC:] = [
            (self._dense_L[:layer].sum() - used_D[0]) / total,
            self._dense_L[layer + 1 :].sum() / total,
            self._kept,
            0.0 if ends else self._dense_L[layer] / total,
            0.0 if ends else self._least_L[layer] / total,
            self._slack(used_D, layer),
        ]
        return np.clip(values, 0.0, 1.0).astype(np.float32)

    def _slack(self, used_D: FloatArray, layer: int) -> float:
        parts = []
        for used, limit, suffix_L in zip(used_D, self.problem.limits_D, self._suffix_DL, strict=True):
            parts.append((limit - used - suffix_L[layer]) / max(limit, 1e-12))
        return float(min(parts))
