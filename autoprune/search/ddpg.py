"""AMC's agent: DDPG chooses the layers' choices one after the other and learns from the finished policy's score.

Stable-Baselines3's DDPG with what AMC needs and it lacks: a learning rate per network, exploration noise truncated
around the actor's output that starts only after the warm-up, the executed action in the replay buffer, the whole
episode's return for every transition (n-step with n = layers, γ = 1), and rewards standardised by the warm-up's.

Source: He et al., AMC: AutoML for Model Compression (2018). We depart in the credit (AMC copies the terminal reward
into every transition and bootstraps on top) and in the decoder (see ``PruningEnv``).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtr, ndtri
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from torch.optim import Optimizer

from autoprune.envs.problem import Assignment, Quality
from autoprune.envs.pruning_env import PruningEnv, Reward
from autoprune.search.base import Account, Searcher


@dataclass(frozen=True, slots=True)
class DDPGSettings:
    """AMC's constants, and how they shrink for short searches.

    Attributes:
        warm_up: Random episodes before the actor acts: this many, but at most ``warm_up_share`` of all.
        sigma, decay, floor: Noise max(floor, σ · decay^(episodes after warm-up)), in units of the action range. AMC's
            floor is 0; ours keeps a settled actor from spending its episodes on one and the same policy.
        actor_rate, critic_rate: Adam's learning rates. A search of fewer than ``episodes`` evaluations has too few
            updates for the actor to arrive anywhere at AMC's rate: it is raised by (episodes / evaluations)^1.5, at
            most tenfold.
        episodes: Of AMC's own searches.
        tau: Share of the new weights in the target networks, per update.
        batch: Transitions per update; one update per step, at the end of an episode.
        critic_start: Updates of the critic alone between the warm-up and the actor's first.
        width: Units of both hidden layers of both networks.
        reward: Scale of the terminal reward.
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


class AMCAgent(DDPG):
    """DDPG as AMC runs it, on a ``PruningEnv``.

    Args:
        env: The environment; its actions lie in [0, 1].
        settings: Constants.
        warm_up: Episodes of uniformly random actions.
        episodes: How many may run in all; sizes the replay buffer, which forgets nothing.
        seed: Of networks, exploration and replay; global generators are seeded too (see ``own_rng``).
    """

    def __init__(self, env: PruningEnv, settings: DDPGSettings, warm_up: int, episodes: int, seed: int) -> None:
        self.settings = settings
        self.warm_up = warm_up
        self.explore = np.random.default_rng([seed, 1])
        self.reward_mean, self.reward_spread = 0.0, 1.0
        steps = len(env.problem.layers)
        super().__init__(
            "MlpPolicy",
            env,
            learning_rate=settings.critic_rate,
            buffer_size=(episodes + 1) * steps,
            learning_starts=warm_up * steps,
            batch_size=settings.batch,
            tau=settings.tau,
            gamma=1.0,
            train_freq=(1, "episode"),
            gradient_steps=-1,
            n_steps=steps,
            policy_kwargs={"net_arch": [settings.width, settings.width]},
            device="cpu",
            seed=seed,
            verbose=0,
        )

    @property
    def noise_sigma(self) -> float:
        """Standard deviation of the exploration noise in this episode; 0 during the warm-up, which is uniform."""
        after = self._episode_num - self.warm_up
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
        if self.num_timesteps < learning_starts:
            action = self.explore.random((n_envs, 2))
        else:
            assert self._last_obs is not None
            mean, _ = self.predict(self._last_obs, deterministic=True)
            action = truncated_normal(mean.astype(np.float64), self.noise_sigma, self.explore)
        executable = action.astype(np.float32)
        return executable, self.policy.scale_action(executable)

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

        warm_up = max(1, min(self.settings.warm_up, round(self.settings.warm_up_share * account.evaluations)))
        episodes = 2 * account.evaluations
        hurry = min(10.0, max(1.0, (self.settings.episodes / account.evaluations) ** 1.5))
        settings = replace(self.settings, actor_rate=hurry * self.settings.actor_rate)
        env = PruningEnv(account.problem, settings.reward, score)
        with own_rng():
            agent = AMCAgent(env, settings, warm_up, episodes, seed)
            agent.learn(episodes * len(account.problem.layers), log_interval=10**9)
