"""AMC's agent: DDPG chooses the layers' choices one after the other and learns from the finished policy's score.

Stable-Baselines3's DDPG with what AMC needs and it lacks: a learning rate per network, exploration noise truncated
around the actor's output that starts only after the warm-up, the executed action in the replay buffer, the whole
episode's return for every transition (n-step with n = layers, γ = 1), and rewards standardised by the warm-up's.

Source: He et al., AMC: AutoML for Model Compression (2018). We depart in the credit (AMC copies the terminal reward
into every transition and bootstraps on top), in the decoder and its list of choices (see ``PruningEnv``), in the
networks' first layer (see ``LayerCode``), in episodes that use the budget up (see ``_acted``; the warm-up's are
random policies of useful choices), and in the noise, which falls over the whole search instead of within 30 episodes:
what a critic learns from is how episodes differ.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtr, ndtri
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch.optim import Optimizer

from autoprune.core.errors import AutopruneError
from autoprune.core.registry import unknown_name
from autoprune.envs.problem import Assignment, Problem, Quality
from autoprune.envs.pruning_env import REWARDS, PruningEnv, Reward
from autoprune.envs.reach import useful_rows
from autoprune.search.base import Account, Searcher
from autoprune.search.knapsack import perturbed_solution
from autoprune.search.random_search import filled_up, random_assignment


@dataclass(frozen=True, slots=True)
class DDPGSettings:
    """AMC's constants, and how they shrink for short searches.

    Attributes:
        warm_up: Episodes of random policies before the actor acts: this many, but at most ``warm_up_share`` of all.
        sigma, decay, floor: Noise max(floor, σ · decay^(episodes after warm-up)), in units of the action range. In a
            long search it decays more slowly, so that the floor is not reached before four fifths of the episodes.
            AMC's floor is 0; ours keeps a settled actor from spending its episodes on one and the same policy.
        actor_rate, critic_rate: Adam's learning rates. A search of fewer than ``episodes`` evaluations has too few
            updates for the actor to arrive anywhere at AMC's rate: it is raised by (episodes / evaluations)^1.5, at
            most tenfold.
        episodes: Of AMC's own searches.
        tau: Share of the new weights in the target networks, per update.
        batch: Transitions per update; one update per step, at the end of an episode.
        critic_start: Updates of the critic alone between the warm-up and the actor's first.
        width: Units of both hidden layers of both networks.
        reward: Scale of the terminal reward; see ``PruningEnv``.
        warm_start: Episodes before the warm-up that follow solutions of the knapsack, the first exact, the others with
            errors scaled at random per layer; 0 starts from scratch.
    """

    warm_up: int = 100
    warm_up_share: float = 0.25
    sigma: float = 0.5
    decay: float = 0.95
    floor: float = 0.1
    actor_rate: float = 1e-4
    critic_rate: float = 1e-3
    episodes: int = 400
    tau: float = 0.01
    batch: int = 64
    critic_start: int = 300
    width: int = 300
    reward: Reward = "log_kl"
    warm_start: int = 0

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise unknown_name("reward", self.reward, REWARDS)
        for name in ("actor_rate", "critic_rate", "sigma", "decay", "warm_up", "batch", "width", "episodes"):
            if not getattr(self, name) > 0:
                raise AutopruneError(f"ddpg setting {name}={getattr(self, name)!r}: must be above 0.")
        for name in ("floor", "critic_start", "warm_start"):
            if getattr(self, name) < 0:
                raise AutopruneError(f"ddpg setting {name}={getattr(self, name)!r}: must not be negative.")
        for name in ("tau", "warm_up_share", "decay"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise AutopruneError(f"ddpg setting {name}={getattr(self, name)!r}: must be above 0 and at most 1.")


class AMCAgent(DDPG):
    """DDPG as AMC runs it, on a ``PruningEnv``.

    Args:
        env: The environment; its actions lie in [0, 1].
        settings: Constants.
        warm_up: Episodes of random policies that use their budget up.
        episodes: How many may run in all; sizes the replay buffer, which forgets nothing.
        seed: Of networks, exploration and replay; global generators are seeded too (see ``own_rng``).
    """

    def __init__(self, env: PruningEnv, settings: DDPGSettings, warm_up: int, episodes: int, seed: int) -> None:
        self.settings = settings
        self.warm_up = warm_up
        self._pruning = env
        draws = np.random.default_rng([seed, 2])
        self._rows = [row.tolist() for row in useful_rows(env.problem.errors_LC, env.problem.costs_LCD)]
        self._plan: Assignment = ()
        self._rollouts = [
            *_knapsack_rollouts(env.problem, settings.warm_start, draws),
            *(random_assignment(env.problem, draws, self._rows) for _ in range(warm_up)),
        ]
        self.explore = np.random.default_rng([seed, 1])
        self.reward_mean, self.reward_spread = 0.0, 1.0
        steps = len(env.problem.layers)
        super().__init__(
            "MlpPolicy",
            env,
            learning_rate=settings.critic_rate,
            buffer_size=(episodes + 1) * steps,
            learning_starts=(settings.warm_start + warm_up) * steps,
            batch_size=settings.batch,
            tau=settings.tau,
            gamma=1.0,
            train_freq=(1, "episode"),
            gradient_steps=-1,
            n_steps=steps,
            policy_kwargs={
                "net_arch": [settings.width, settings.width],
                "features_extractor_class": LayerCode,
                "features_extractor_kwargs": {"layers": steps},
            },
            device="cpu",
            seed=seed,
            verbose=0,
        )

    @property
    def noise_sigma(self) -> float:
        """Standard deviation of the exploration noise in this episode; 0 before the actor acts."""
        after = self._episode_num - self.settings.warm_start - self.warm_up
        return max(self.settings.floor, self.settings.sigma * self.settings.decay**after) if after >= 0 else 0.0

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Update the networks; before the first update, fit the critic to the warm-up, its rewards standardised.

        An untrained critic sends every layer's action to the same end of its range, and the way back is long.
        """
        if self._n_updates == 0:
            self._standardise()
            self._fit_critic(batch_size)
        super().train(gradient_steps, batch_size)

    def _fit_critic(self, batch_size: int) -> None:
        """Regress the critic on returns: n-step sampling reaches the end of every episode, so no target is needed."""
        buffer = self.replay_buffer
        assert buffer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        for _ in range(self.settings.critic_start):
            samples = buffer.sample(batch_size)
            (value,) = self.critic(samples.observations, samples.actions)
            loss = torch.nn.functional.mse_loss(value, samples.rewards)
            self.critic.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.critic.optimizer.step()
        self.critic_target.load_state_dict(self.critic.state_dict())

    def _standardise(self) -> None:
        """Centre and scale rewards by those of the warm-up: errors differ by orders of magnitude between problems."""
        buffer = self.replay_buffer
        assert buffer is not None
        last = buffer.dones[: buffer.pos] > 0.0
        rewards = buffer.rewards[: buffer.pos]
        self.reward_mean = float(rewards[last].mean())
        self.reward_spread = max(float(rewards[last].std()), 1e-6)
        rewards[last] = (rewards[last] - self.reward_mean) / self.reward_spread

    def _update_learning_rate(self, optimizers: list[Optimizer] | Optimizer) -> None:
        # TD3.train passes actor and critic, in this order.
        pair = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer, rate in zip(pair, (self.settings.actor_rate, self.settings.critic_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        layer = self.num_timesteps % len(self._pruning.problem.layers)
        if layer == 0:
            plan = self._episode_num < len(self._rollouts)
            self._plan = self._rollouts[self._episode_num] if plan else self._acted()
        executable = self._pruning.action_of(layer, self._plan[layer])[None]
        return executable, self.policy.scale_action(executable)

    def _acted(self) -> Assignment:
        """Return the policy of the actor's noisy actions, with what it leaves of the budget given to random layers.

        An actor learns late how much it may spend: at half of the latency it left a third unused in every episode, and
        a few random policies that use theirs up beat it.
        """
        env = PruningEnv(self._pruning.problem, evaluate=lambda _: Quality(0.0, 0.0, 0.0))
        observation, ended = env.reset()[0], False
        while not ended:
            mean, _ = self.predict(observation[None], deterministic=True)
            action = truncated_normal(mean.astype(np.float64), self.noise_sigma, self.explore)
            observation, _, ended, _, info = env.step(action[0].astype(np.float32))
        assignment: Assignment = info["assignment"]
        return filled_up(self._pruning.problem, assignment, self.explore, self._rows)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: npt.NDArray[np.float32],
        new_obs: npt.NDArray[np.float32] | dict[str, npt.NDArray[np.float32]],
        reward: npt.NDArray[np.float32],
        dones: npt.NDArray[np.bool_],
        infos: list[dict[str, Any]],
    ) -> None:
        executed = np.stack([info["executed"] for info in infos])
        reward = np.where(dones, (reward - self.reward_mean) / self.reward_spread, 0.0)
        super()._store_transition(
            replay_buffer, self.policy.scale_action(executed), new_obs, reward, dones, infos
        )


def paced(settings: DDPGSettings, evaluations: int, acting: int) -> DDPGSettings:
    """Return settings for a search of this length: the actor's rate and the noise's decay; see ``DDPGSettings``.

    Args:
        settings: AMC's pace.
        evaluations: Granted in all.
        acting: Those in which the actor acts.
    """
    hurry = min(10.0, max(1.0, (settings.episodes / evaluations) ** 1.5))
    slowest = min(1.0, settings.floor / settings.sigma) ** (1.0 / max(1.0, 0.8 * acting))
    return replace(settings, actor_rate=hurry * settings.actor_rate, decay=max(settings.decay, slowest))


class LayerCode(BaseFeaturesExtractor):
    """The observation, and beside it which layer it is of as a unit vector.

    AMC tells layers apart by t in [0, 1]. A network learns a smooth function of that; two neighbours that differ in
    nothing but how much they matter take it hundreds of episodes to tell apart.

    Args:
        observation_space: Of ``PruningEnv``.
        layers: L.
    """

    def __init__(self, observation_space: gymnasium.spaces.Box, layers: int) -> None:
        super().__init__(observation_space, observation_space.shape[0] + layers)
        self._layers = layers

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Return (N, F + L) for observations (N, F)."""
        index = (observations[:, :1] * max(1, self._layers - 1)).round()
        code = (index == torch.arange(self._layers)).float()
        return torch.cat([observations, code], 1)


def _knapsack_rollouts(problem: Problem, count: int, rng: np.random.Generator) -> list[Assignment]:
    """Return solutions of the knapsack: the exact one, then some with each layer's errors scaled at random."""
    layers = len(problem.layers)
    scales = [rng.normal(0.0, 0.5 if number else 0.0, layers) for number in range(count)]
    return [perturbed_solution(problem, scale) for scale in scales]


def truncated_normal(
    mean: npt.NDArray[np.float64], sigma: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return samples of N(mean, σ²) conditioned on [0, 1], by inverting the distribution function."""
    if sigma < 1e-6:
        return np.clip(mean, 0.0, 1.0)
    low, high = ndtr((0.0 - mean) / sigma), ndtr((1.0 - mean) / sigma)
    return np.asarray(np.clip(mean + sigma * ndtri(low + (high - low) * rng.random(mean.shape)), 0.0, 1.0))


@contextlib.contextmanager
def own_rng(seed: int | None = None) -> Iterator[None]:
    """Keep python's, numpy's and torch's global generators as they are outside, whatever happens inside."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


class DDPGSearcher(Searcher):
    """AMC: one episode per policy.

    Episodes that arrive at a known policy cost nothing; at most twice as many episodes run as evaluations are granted.

    Args:
        settings: AMC's by default.
    """

    name = "ddpg"
    settings_class = DDPGSettings
    settings: DDPGSettings

    def propose(self, account: Account, seed: int) -> None:
        def score(assignment: Assignment) -> Quality:
            # An evaluator may draw random numbers; a search that is answered from its study draws none. The agent's
            # own stream must not tell the difference.
            with own_rng():
                return account.evaluate(assignment)

        fresh = max(1, account.evaluations - self.settings.warm_start)
        warm_up = max(1, min(self.settings.warm_up, round(self.settings.warm_up_share * fresh)))
        episodes = 2 * account.evaluations
        settings = paced(self.settings, account.evaluations, fresh - warm_up)
        env = PruningEnv(account.problem, settings.reward, score)
        with own_rng():
            agent = AMCAgent(env, settings, warm_up, episodes, seed)
            agent.learn(episodes * len(account.problem.layers), log_interval=10**9)
