"""The problem as a gymnasium environment."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from synthetic import make_problem

import autoprune.envs.problem  # noqa: F401 - registers the environment, as any use of a problem does
from autoprune.core.choices import Block, Dense, Fine, Pattern
from autoprune.core.errors import AutopruneError, UnknownName
from autoprune.core.layers import LayerSpec
from autoprune.envs.problem import Constraint, Problem, Quality, scheme
from autoprune.envs.pruning_env import FEATURES, PruningEnv

_LAYERS = (
    LayerSpec("a", "conv", (16, 4, 3, 3), (2, 2), input_hw=(20, 10), output_hw=(10, 5)),
    LayerSpec("b", "conv", (64, 16, 1, 1), (1, 1), input_hw=(10, 5), output_hw=(10, 5)),
    LayerSpec("c", "conv", (32, 64, 3, 3), (1, 1), input_hw=(10, 5), output_hw=(10, 5)),
)
_CHOICES = {
    "a": (Dense(), Fine(0.5)),
    "b": (Dense(), Block(0.5), Fine(0.25), Block(0.25)),
    "c": (Dense(), Pattern(8, 4, 1.0, (16, 1)), Pattern(8, 4, 0.5, (16, 1)), Pattern(4, 4, 0.5, (16, 1))),
}
_COSTS = ([20.0, 10.0], [30.0, 18.0, 24.0, 12.0], [50.0, 30.0, 20.0, 15.0])


def small(limit: float = 60.0) -> Problem:
    costs = tuple(np.array(row) for row in _COSTS)
    # Rising as costs fall: no choice undercuts another.
    errors = [0.3 * (1.0 - np.array(row) / row[0]) for row in _COSTS]

    def evaluate(assignment: tuple[int, ...]) -> Quality:
        return Quality(0.1 * sum(assignment), 0.9 - 0.05 * sum(assignment), 0.0)

    return Problem(_LAYERS, _CHOICES, [Constraint("latency", costs, limit)], errors, evaluate)


def action(keep: float, place: float) -> np.ndarray:
    return np.array([keep, place], dtype=np.float32)


def observe(env: PruningEnv, *actions: np.ndarray) -> dict[str, float]:
    observation, _ = env.reset()
    for one in actions:
        observation = env.step(one)[0]
    return dict(zip(FEATURES, observation.tolist(), strict=True))


EXPECTED = {
    # Hand-computed over the three layers; after layer a ran fine(0.5) and layer b block(0.25).
    "t": (0.0, 0.5, 1.0),
    "n": (0.0, 1.0, (32 - 16) / 48),
    "c": (0.0, 12 / 60, 1.0),
    "h": (1.0, 0.0, 0.0),
    "w": (1.0, 0.0, 0.0),
    "stride": (1.0, 0.0, 0.0),
    "k": (1.0, 0.0, 1.0),
    # MACs: a 16·4·9·50 = 28,800; b 64·16·50 = 51,200; c 32·64·9·50 = 921,600.
    "cost": (0.0, (51_200 - 28_800) / (921_600 - 28_800), 1.0),
    "reduced": (0.0, 10 / 100, 28 / 100),
    "rest": (80 / 100, 50 / 100, 0.0),
    "action": (0.0, 10 / 20, 12 / 30),
    "dense_share": (0.2, 0.3, 0.5),
    "least_share": (0.1, 0.12, 0.15),
    "slack": ((60 - 37) / 60, (60 - 10 - 27) / 60, (60 - 22 - 15) / 60),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_is_what_one_computes_by_hand(feature: str) -> None:
    env = PruningEnv(small())
    steps = [action(0.5, 0.0), action(0.45, 0.0)]
    seen = [observe(env, *steps[:count])[feature] for count in range(3)]
    assert seen == pytest.approx(EXPECTED[feature], abs=1e-6)


def test_features_are_fourteen_and_all_are_checked() -> None:
    assert set(EXPECTED) == set(FEATURES)
    assert len(FEATURES) == 14


def test_action_names_density_and_scheme() -> None:
    env = PruningEnv(small())
    # Layer b: schemes block(filters=16) and fine; block takes the lower half of the second action.
    assert sorted({scheme(choice) for choice in _CHOICES["b"][1:]}) == ["block,filters=16", "fine"]
    assert env.decode((1,), action(0.7, 0.2))[0] == 1
    assert env.decode((1,), action(0.59, 0.2))[0] == 3
    assert env.decode((1,), action(0.9, 0.9))[0] == 2
    assert env.decode((1,), action(1.0, 0.9))[0] == 0


def test_what_another_choice_undercuts_is_not_on_the_list() -> None:
    problem = make_problem(layers=4)
    env, everything = PruningEnv(problem), PruningEnv(problem, useful=False)
    rng = np.random.default_rng(0)
    seen: tuple[set[int], set[int]] = (set(), set())
    for one in rng.random((400, 2)):
        for found, each in zip(seen, (env, everything), strict=True):
            found.add(each.decode((), one.astype(np.float32))[0])
    errors, costs = problem.errors_LC[0], problem.costs_LCD[0][:, 0]
    for index in seen[0]:
        assert not ((errors < errors[index]) & (costs <= costs[index])).any()
    assert len(seen[1]) > len(seen[0])


def test_a_scheme_that_cannot_go_as_low_takes_its_cheapest() -> None:
    env = PruningEnv(small())
    assert env.decode((1,), action(0.0, 0.9))[0] == 2
    assert env.decode((1,), action(0.0, 0.2))[0] == 3


def test_the_budget_overrides_the_action() -> None:
    env = PruningEnv(small(38.0))
    env.reset()
    infos = [env.step(action(1.0, 0.9))[4] for _ in range(3)]
    assert [info["choice"] for info in infos] == [1, 3, 3]
    assert infos[0]["executed"].tolist() == pytest.approx([0.5, 0.5])
    assert infos[2]["assignment"] == (1, 3, 3)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("kl", -0.7), ("log_kl", -np.log(0.701)), ("error", -0.45), ("accuracy", 0.55),
        ("error-log-cost", -0.45 * np.log(1 + 10 + 12 + 15)),
    ],
)
def test_the_reward_is_terminal_and_scaled_as_documented(kind: str, value: float) -> None:
    env = PruningEnv(small(), reward=kind)  # type: ignore[arg-type]
    env.reset()
    results = [env.step(action(0.5, 0.0)) for _ in range(3)]
    assert results[2][4]["quality"] == env.problem.evaluate((1, 3, 3))
    assert [result[1] for result in results] == [0.0, 0.0, pytest.approx(value)]
    assert [result[2] for result in results] == [False, False, True]


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'accuracy'"):
        PruningEnv(small(), reward="acuracy")  # type: ignore[arg-type]


def test_a_broken_network_gives_a_finite_reward() -> None:
    env = PruningEnv(small(), evaluate=lambda assignment: Quality(np.inf, 0.1, 0.0))
    env.reset()
    assert [env.step(action(1.0, 0.0))[1] for _ in range(3)] == [0.0, 0.0, -20.0]


def test_a_finished_policy_must_be_reset() -> None:
    env = PruningEnv(small())
    env.reset()
    for _ in range(3):
        env.step(action(1.0, 0.0))
    with pytest.raises(AutopruneError, match="call reset"):
        env.step(action(1.0, 0.0))


def test_environment_is_made_by_name_and_passes_gymnasiums_checker() -> None:
    env = gymnasium.make("autoprune/PruningEnv-v0", problem=make_problem(layers=4))
    check_env(env.unwrapped)
    env.close()


def test_environment_passes_stable_baselines_checker() -> None:
    with warnings.catch_warnings():
        # The action range [0, 1] is AMC's; the agent here scales to [-1, 1] itself.
        warnings.filterwarnings("ignore", message=".*symmetric and normalized Box action space.*")
        sb3_check_env(PruningEnv(make_problem(layers=4)))


_ACTIONS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=6, max_size=6)


@given(_ACTIONS, st.floats(0.2, 1.0), st.integers(0, 5), st.booleans())
def test_no_sequence_of_actions_exceeds_the_budget(
    actions: list[tuple[float, float]], budget: float, seed: int, two: bool
) -> None:
    problem = make_problem(layers=6, seed=seed, budget=budget, macs=0.4 if two else None)
    env = PruningEnv(problem)
    observation, _ = env.reset()
    for keep, place in actions:
        assert env.observation_space.contains(observation)
        prefix = tuple(env._prefix)
        observation, _, _, _, info = env.step(action(keep, place))
        # The executed action names what was executed, exactly.
        assert env.decode(prefix, info["executed"])[0] == info["choice"]
        assert env.action_space.contains(info["executed"])
    assert problem.feasible(info["assignment"])
    assert env.observation_space.contains(observation)


def test_a_layer_with_one_choice_is_walked_through() -> None:
    layers, choices = _LAYERS[:2], {"a": (Dense(),), "b": _CHOICES["b"]}
    costs = (np.array([20.0]), np.array(_COSTS[1]))
    constraint = Constraint("latency", costs, 40.0)
    errors = [np.zeros(1), 30.0 - np.array(_COSTS[1])]
    problem = Problem(layers, choices, [constraint], errors, lambda a: Quality(0.1, 0.5, 0.0))
    env = PruningEnv(problem)
    env.reset()
    assert env.step(action(0.1, 0.5))[4]["choice"] == 0
    assert env.step(action(1.0, 0.0))[4]["assignment"] == (0, 1)
