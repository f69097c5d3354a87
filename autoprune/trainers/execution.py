"""Layers that run on sparse kernels while they are trained, from the moment on when their masks are final.

The parameter stays the dense weight with its zeros, so optimizers, checkpoints and averages see nothing new; what a
layer computes with is its kept values, gathered from the parameter in every forward pass. Which operator does it, if
any is faster than the dense layer, is for a ``Chooser`` to say, by the table measured on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
        name: Of the layer in the model.
        module: The convolution or linear layer; its stride and padding are read from it.
        choice: Of the policy.
        mask: Final; boolean, shape of the weight, on its device.
        spec: As traced; None where the model could not be.
    """

    name: str
    module: nn.Conv2d | nn.Linear
    choice: Choice
    mask: Tensor
    spec: LayerSpec | None


# Returns the operator that is to run a layer, or None to leave it dense.
Chooser = Callable[[FrozenLayer], SparseForward | None]


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What a layer is trained on, and why.

    Attributes:
        layer: Its name.
        kernels: Direction of the step → kernel; all ``dense`` where it stays as it is.
        why: In words, with the figures.
        dense_us, chosen_us: A step of the layer, all directions; 0 where nothing was measured.
    """

    layer: str
    kernels: Mapping[str, str]
    why: str
    dense_us: float = 0.0
    chosen_us: float = 0.0

    @property
    def sparse(self) -> bool:
        """Whether any direction runs on a sparse kernel."""
        return any(kernel != "dense" for kernel in self.kernels.values())


@runtime_checkable
class _Explaining(Protocol):
    """A chooser that gives its reasons, and whose decisions a resumed training repeats."""

    def explain(self) -> tuple[LayerRun, ...]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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
            run = self.choose(FrozenLayer(layer.name, module, layer.choice, layer.mask, specs.get(layer.name)))
            if run is not None:
                module.forward = _Forward(module, run)  # type: ignore[assignment, method-assign]
                self.running[layer.name] = module

    def stop(self) -> None:
        """Let every layer run as its class says again."""
        for module in self.running.values():
            del module.forward
        self.running.clear()

    def explain(self) -> tuple[LayerRun, ...]:
        """Return what each layer was decided to run on, and why; nothing where the chooser gives no reasons."""
        return self.choose.explain() if isinstance(self.choose, _Explaining) else ()

    def state_dict(self) -> dict[str, Any] | None:
        """Return what the chooser decides by; None where it decides by nothing that is kept."""
        return self.choose.state_dict() if isinstance(self.choose, _Explaining) else None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take ``state_dict``'s answer."""
        if state is not None and isinstance(self.choose, _Explaining):
            self.choose.load_state_dict(state)
