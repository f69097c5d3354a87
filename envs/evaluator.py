"""Score a policy without training it: stitch, recalibrate, compare with the dense network's outputs.

The error is the mean Kullback-Leibler divergence (nats) from the dense network's class distribution to the pruned
one's, on validation images: smoother than accuracy, and it needs no labels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoprune.core.choices import Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.envs.database import LayerDatabase, Moments
from autoprune.envs.network import StitchedNetwork, side_by_side
from autoprune.envs.prefix import PrefixCache
from autoprune.envs.problem import Quality
from autoprune.tasks.metrics import top1


class Evaluator:
    """Scores assignments of choices to layers.

    Args:
        network: The network to stitch into.
        database: Compensated weights.
        images: Normalised images ``(N, C, H, W)`` float32 to score on.
        labels: Their labels ``(N,)``.
    """

    def __init__(self, network: StitchedNetwork, database: LayerDatabase, images: Tensor, labels: Tensor) -> None:
        self._network = network
        self._database = database
        self._images = images
        self._labels = labels
        network.load({})
        network.fold()
        self.dense_logits = network.logits(images)
        self.dense_accuracy = top1(self.dense_logits, labels)

    def quality(self, choices: Mapping[str, Choice]) -> Quality:
        """Return error, accuracy and seconds of a policy; layers not named are dense."""
        started = time.perf_counter()
        self._network.load(self._database.policy_weights(choices))
        self._network.recalibrate()
        self._network.fold()
        logits = self._network.logits(self._images)
        error = divergence(self.dense_logits, logits)
        return Quality(error=error, accuracy=top1(logits, self._labels), seconds=time.perf_counter() - started)

    def single_errors(
        self,
        options: Mapping[LayerSpec, Sequence[Choice]],
        count: int,
        advance: Callable[[], None] = lambda: None,
    ) -> tuple[np.ndarray, ...]:
        """Return for each layer the error of each choice when only that layer is changed.

        Args:
            options: Choices of each searched layer; dense has error 0.
            count: Images to use of the evaluation images, from the first on.
            advance: Called once for every layer done.
        """
        self._network.load({})
        self._network.fold()
        images = self._network.to_native(self._images[:count])
        dense_logits = self.dense_logits[:count]
        layers = list(options)
        found: dict[str, np.ndarray] = {}

        def work(part: list[LayerSpec], network: StitchedNetwork, cache: PrefixCache) -> None:
            for layer in part:
                alone = _Alone(network, cache, layer.name, self._database.moments[layer.name], dense_logits)
                found[layer.name] = np.array([self._single_error(alone, choice) for choice in options[layer]])
                network.load({})
                network.fold(layer.name)
                advance()

        workers = torch.get_num_threads()
        parts = [layers[first::workers] for first in range(workers)]
        networks = [copy.deepcopy(self._network) for _ in parts]
        # torch.fx patches every module's call while it traces: no thread may run a network meanwhile.
        caches = [
            PrefixCache(network.folded, images, [layer.name for layer in part])
            for part, network in zip(parts, networks, strict=True)
        ]
        with side_by_side() as pool:
            list(pool.map(work, parts, networks, caches))
        return tuple(found[layer.name] for layer in layers)

    def _single_error(self, alone: _Alone, choice: Choice) -> float:
        if isinstance(choice, Dense):
            return 0.0
        network, layer = alone.network, alone.layer
        weight = self._database.weight(layer, choice)
        network.load({layer: weight})
        norm = network.norm_statistics(layer)
        if norm is not None:
            network.set_norm(layer, *shifted_statistics(norm, network.dense_weight(layer), weight, alone.moments))
        network.fold(layer)
        return divergence(alone.dense_logits, alone.cache.logits(layer))


@dataclass(frozen=True, slots=True)
class _Alone:
    """One layer that changes while all others stay dense."""

    network: StitchedNetwork
    cache: PrefixCache
    layer: str
    moments: Moments
    dense_logits: Tensor


def shifted_statistics(
    norm: tuple[Tensor, ...], dense: Tensor, weight: Tensor, moments: Moments
) -> tuple[Tensor, Tensor]:
    """Return a BatchNorm's mean and variance (K,) after its convolution's weights changed.

    The input moments give both weights' output statistics exactly; the running statistics are moved by their
    difference (mean) and ratio (variance), since they were taken on augmented images.
    """
    mean_old, variance_old = _output_statistics(dense, moments)
    mean_new, variance_new = _output_statistics(weight, moments)
    ratio = (variance_new / variance_old.clamp_min(1e-12)).clamp_max(1e4)
    return norm[0] + (mean_new - mean_old), norm[1] * ratio


def _output_statistics(weight: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    flat_KD = weight.flatten(1)
    mean = flat_KD @ moments.mean_D
    second = ((flat_KD @ moments.second_DD) * flat_KD).sum(1)
    return mean, (second - mean.square()).clamp_min(0.0)


def divergence(dense_logits: Tensor, logits: Tensor) -> float:
    """Return the mean KL divergence in nats from ``softmax(dense_logits)`` to ``softmax(logits)``, (N, classes)."""
    target = torch.log_softmax(dense_logits.double(), 1)
    return float((target.exp() * (target - torch.log_softmax(logits.double(), 1))).sum(1).mean())
