"""Layers that run on sparse kernels while they are trained, from the moment on when their masks are final.

The parameter stays the dense weight with its zeros, so optimizers, checkpoints and averages see nothing new; what a
layer computes with is its kept values, gathered from the parameter in every forward pass. Which operator does it, if
any is faster than the dense layer, is for a ``Chooser`` to say, by the table measured on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from autoprune.core.choices import Choice
from autoprune.core.layers import LayerSpec
from autoprune.trainers.method import PrunedLayer

# (input, weight with zeros, bias) → output; differentiable in all three.
SparseForward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """What a chooser decides by.

    Attributes:
        module: The convolution or linear layer; its stride and padding are read from it.
        choice: Of the policy.
        mask: Final; boolean, shape of the weight, on its device.
        spec: As traced; None where the model could not be.
    """

    module: nn.Conv2d | nn.Linear
    choice: Choice
    mask: Tensor
    spec: LayerSpec | None


# Returns the operator that is to run a layer, or None to leave it dense.
Chooser = Callable[[FrozenLayer], SparseForward | None]


class _Forward:
    """A module's ``forward`` on kept values; a copy of the model takes its own module along."""

    def __init__(self, module: nn.Conv2d | nn.Linear, run: SparseForward) -> None:
        self.module, self.run = module, run

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self.module.weight, self.module.bias)


class Execution:
    """The layers of a model that run sparse at the moment.

    Args:
        model: Without wrappers.
        choose: Asked once per layer.
    """

    def __init__(self, model: nn.Module, choose: Chooser) -> None:
        self.model, self.choose = model, choose
        self.running: dict[str, nn.Module] = {}

    def start(self, layers: Iterable[PrunedLayer], specs: Mapping[str, LayerSpec]) -> None:
        """Let every layer that the chooser has an operator for run on it.

        Args:
            layers: With final masks.
            specs: Name → layer as traced.
        """
        for layer in layers:
            module = self.model.get_submodule(layer.name)
            assert isinstance(module, nn.Conv2d | nn.Linear)
            if layer.mask is None or layer.name in self.running:
                continue
            run = self.choose(FrozenLayer(module, layer.choice, layer.mask, specs.get(layer.name)))
            if run is not None:
                module.forward = _Forward(module, run)  # type: ignore[assignment, method-assign]
                self.running[layer.name] = module

    def stop(self) -> None:
        """Let every layer run as its class says again."""
        for module in self.running.values():
            del module.forward
        self.running.clear()
