"""What a weight is worth: one small object per score, fed with the training's own gradients.

Shapes: a score has the shape of the layer's weight, float32; a weight that is already removed scores −1, below every
zero that is still alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoprune.trainers.method import PrunedLayer, State


class Score:
    """|w|, and the interface of the others (Han et al., arXiv 1506.02626)."""

    def collect(self, layers: Sequence[PrunedLayer], scale: float | Tensor) -> None:
        """See the gradients of one backward pass.

        Args:
            layers: With ``grad`` at their parameters.
            scale: By which the gradients are still multiplied.
        """
        return

    def of(self, layer: PrunedLayer) -> Tensor:
        """Return a layer's score."""
        return layer.living_score()

    def state_dict(self) -> State:
        """Return what was collected."""
        return {}

    def load_state_dict(self, state: State, layers: Sequence[PrunedLayer]) -> None:
        """Take ``state_dict``'s answer."""
        return


class Saliency(Score):
    """Σ over batches of |g·w|^power.

    With power 2 it is ClickTrain's importance Σ (G⊙W)², with power 1 SNIP's connection sensitivity (arXiv 1810.02340);
    SNIP takes the absolute value of the summed gradient, we sum absolute values, which is the same for one batch.
    """

    def __init__(self, power: int = 2) -> None:
        self.power = power
        self.total: dict[str, Tensor] = {}

    @torch.no_grad()
    def collect(self, layers: Sequence[PrunedLayer], scale: float | Tensor) -> None:
        for layer in layers:
            weight, gradient = layer.parameter.detach().float(), layer.parameter.grad
            # A frozen layer has no gradient; |w| is then all there is to rank by.
            part = weight.abs() if gradient is None else (gradient.float() * weight / scale).abs_()
            if self.power == 2:
                part = part.square_()
            self.total[layer.name] = part if layer.name not in self.total else self.total[layer.name].add_(part)

    def of(self, layer: PrunedLayer) -> Tensor:
        score = self.total[layer.name].contiguous()
        return score if layer.mask is None else score.masked_fill(~layer.mask, -1.0)

    def state_dict(self) -> State:
        return dict(self.total)

    def load_state_dict(self, state: State, layers: Sequence[PrunedLayer]) -> None:
        devices = {layer.name: layer.parameter.device for layer in layers}
        self.total = {name: value.to(devices[name]) for name, value in state.items()}


class RandomScore(Score):
    """Uniform random numbers by seed and layer: the control that says what a score is worth.

    Args:
        seed: Of the draws; the same layer always draws the same.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def of(self, layer: PrunedLayer) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, 0, layer.name))
        score = torch.rand(layer.parameter.shape, generator=generator).to(layer.parameter.device)
        return score if layer.mask is None else score.masked_fill(~layer.mask, -1.0)


def seed_of(seed: int, step: int, name: str) -> int:
    """Return a generator's seed that depends on the training's seed, the step and the layer, and on nothing else."""
    value = seed * 1_000_003 + step
    for byte in name.encode():
        value = (value * 257 + byte + 1) % (2**62)
    return value
