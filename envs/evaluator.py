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

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.envs.database import LayerDatabase
from autoprune.envs.network import BATCH, StitchedNetwork, layer_of, side_by_side
from autoprune.envs.prefix import Parameters, PrefixCache
from autoprune.envs.problem import Quality
from autoprune.envs.store import Moments
from autoprune.tasks.metrics import top1


class Evaluator:
    """Scores assignments of choices to layers.

    Args:
        network: The network to stitch into.
        database: Compensated weights.
        images: Normalised images ``(N, C, H, W)`` float32 to score on.
        labels: Their labels ``(N,)``.
        count: Images to draw of them for scoring policies (see ``telling_images``); None takes all.
    """

    def __init__(
        self,
        network: StitchedNetwork,
        database: LayerDatabase,
        images: Tensor,
        labels: Tensor,
        count: int | None = None,
    ) -> None:
        self._network = network
        self._database = database
        self._images = images
        self._labels = labels
        network.load({})
        network.fold()
        self.dense_logits = network.logits(images)
        self.dense_accuracy = top1(self.dense_logits, labels)
        self._drawn, self._scales = telling_images(self.dense_logits, len(images) if count is None else count)
        self._drawn_images = network.to_native(images[self._drawn])

    def quality(self, choices: Mapping[str, Choice]) -> Quality:
        """Return error, accuracy and seconds of a policy; layers not named are dense."""
        started = time.perf_counter()
        self._network.load(self._database.policy_weights(choices))
        self._network.recalibrate()
        self._network.fold()
        logits = self._network.logits(self._drawn_images)
        error = float((self._scales * divergences(self.dense_logits[self._drawn], logits)).mean())
        right = (logits.argmax(1) == self._labels[self._drawn]).double()
        accuracy = float((self._scales * right).sum() / self._scales.sum())
        return Quality(error=error, accuracy=accuracy, seconds=time.perf_counter() - started)

    def single_errors(
        self,
        options: Mapping[LayerSpec, Sequence[Choice]],
        count: int,
        advance: Callable[[], None] = lambda: None,
        done: Callable[[str, np.ndarray], None] = lambda layer, errors: None,
    ) -> tuple[np.ndarray, ...]:
        """Return for each layer the error of each choice when only that layer is changed.

        A large error shows on every image, a small one on the few that are nearly undecided: those are drawn more
        often, and count less in turn (see ``telling_images``). All choices see the same images; successive halving
        (few images for all, more for the best) is a sixth less exact at the same cost.

        Args:
            options: Choices of each searched layer; dense has error 0.
            count: Images to draw of the evaluation images.
            advance: Called once for every layer done.
            done: Told each layer's name and errors as soon as they are known, by any thread.
        """
        found: dict[str, np.ndarray] = {}
        for layer in [spec for spec in options if any(isinstance(c, Channels) for c in options[spec])]:
            found[layer.name] = self._group_errors(layer.name, options[layer], count)
            done(layer.name, found[layer.name])
            advance()
        self._network.load({})
        self._network.fold()
        drawn, scales = telling_images(self.dense_logits, count)
        images = self._network.to_native(self._images[drawn])
        dense_logits = self.dense_logits[drawn]
        layers = [layer for layer in options if layer.name not in found]

        def work(part: list[LayerSpec], network: StitchedNetwork, cache: PrefixCache) -> None:
            for layer in part:
                own = self._database.moments[layer.name]
                moments = Moments(own.mean_D.to(network.device), own.second_DD.to(network.device))
                alone = _Alone(network, cache, layer.name, moments, dense_logits, scales)
                found[layer.name] = self._single_errors(alone, options[layer])
                done(layer.name, found[layer.name])
                advance()

        workers = torch.get_num_threads()
        parts = [layers[first::workers] for first in range(workers)]
        networks = [copy.deepcopy(self._network) for _ in parts]
        # torch.fx patches every module's call while it traces: no thread may run a network meanwhile.
        caches = [
            PrefixCache(network.fast, images, [layer.name for layer in part], len(images))
            for part, network in zip(parts, networks, strict=True)
        ]
        with side_by_side() as pool:
            list(pool.map(work, parts, networks, caches))
        return tuple(found[layer.name] for layer in options)

    def _group_errors(self, leader: str, choices: Sequence[Choice], count: int) -> np.ndarray:
        """Return the error of each choice of a group alone; several layers change, and the whole network runs."""
        assert self._database.channels is not None
        errors = np.zeros(len(choices))
        for index, choice in enumerate(choices):
            if not isinstance(choice, Dense):
                expanded = self._database.channels.groups.coupling.expanded({leader: choice})
                self._network.load(self._database.policy_weights(expanded))
                self._network.recalibrate()
                self._network.fold()
                errors[index] = divergence(self.dense_logits[:count], self._network.logits(self._images[:count]))
        return errors

    def _single_errors(self, alone: _Alone, choices: Sequence[Choice]) -> np.ndarray:
        errors = np.zeros(len(choices))
        pruned = [index for index, choice in enumerate(choices) if not isinstance(choice, Dense)]
        width = max(1, round(BATCH / len(alone.dense_logits)))
        for first in range(0, len(pruned), width):
            # Weights are made when they are needed: those of all choices at once are many.
            group = pruned[first : first + width]
            made = [self._alone_parameters(alone, choices[index]) for index in group]
            for index, logits in zip(group, self._logits_alone(alone, made), strict=True):
                each = divergences(alone.dense_logits, logits)
                errors[index] = float((each * alone.scales.to(each.device)).mean())
        return errors

    def _alone_parameters(self, alone: _Alone, choice: Choice) -> Parameters:
        weight = self._database.weight(alone.layer, choice).to(alone.network.device)
        norm = alone.network.norm_statistics(alone.layer)
        dense = alone.network.dense_weight(alone.layer)
        shifted = None if norm is None else shifted_statistics(norm, dense, weight, alone.moments)
        return alone.network.changed(alone.layer, weight, shifted)

    @staticmethod
    def _logits_alone(alone: _Alone, made: Sequence[Parameters]) -> list[Tensor]:
        found = alone.cache.branches(alone.layer, 0, made)
        if found is not None:
            return found
        module = layer_of(alone.network.folded, alone.layer)
        found = []
        for weight, bias in made:
            module.weight.copy_(weight)
            if module.bias is not None:
                module.bias.copy_(bias)
            found.append(alone.cache.logits(alone.layer))
        alone.network.fold(alone.layer)
        return found


@dataclass(frozen=True, slots=True)
class _Alone:
    """One layer that changes while all others stay dense."""

    network: StitchedNetwork
    cache: PrefixCache
    layer: str
    moments: Moments
    dense_logits: Tensor
    scales: Tensor


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


def telling_images(dense_logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return which images to measure small errors on, and by what to multiply what is found on each.

    To second order the divergence of an image grows with 1 − Σ p² of its class distribution p: of a decided image it is
    next to nothing. Images are drawn in proportion to that (systematic sampling), and what is found is divided by how
    often the image would be drawn, so that the mean over the drawn ones estimates the mean over all.

    Args:
        dense_logits: (N, classes) of the dense network.
        count: Images to draw; N or more takes all of them.
    Returns:
        Indices, (count,) int64, ascending; factors, (count,) float64.
    """
    images = len(dense_logits)
    if count >= images:
        return torch.arange(images), torch.ones(images, dtype=torch.float64)
    undecided = 1.0 - torch.softmax(dense_logits.double().cpu(), 1).square().sum(1)
    size = undecided + 0.1 * undecided.mean() + 1e-12
    chance = (count * size / size.sum()).clamp_max(1.0)
    for _ in range(20):  # what the surest ones leave over goes to the others
        free = chance < 1.0
        missing = count - chance.sum()
        if missing < 1e-9 or not free.any():
            break
        chance = torch.where(free, chance * (1.0 + missing / chance[free].sum()), chance).clamp_max(1.0)
    steps = torch.arange(count, dtype=torch.float64) + 0.5
    drawn = torch.searchsorted(chance.cumsum(0), steps * (chance.sum() / count)).clamp_max(images - 1)
    return drawn, count / (images * chance[drawn])


def divergences(dense_logits: Tensor, logits: Tensor) -> Tensor:
    """Return the KL divergence in nats from ``softmax(dense_logits)`` to ``softmax(logits)`` of each image, (N,)."""
    target = torch.log_softmax(dense_logits.double(), 1)
    found = torch.log_softmax(logits.to(target.device).double(), 1)
    return (target.exp() * (target - found)).sum(1)


def divergence(dense_logits: Tensor, logits: Tensor) -> float:
    """Return the mean of ``divergences`` over the images."""
    return float(divergences(dense_logits, logits).mean())
