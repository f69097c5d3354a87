"""A model and one example in, its prunable layers out: every Conv2d and Linear in the order in which they run.

Forward hooks, not a symbolic graph, so that any model that runs can be traced.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.inputs import Example
from autoprune.kernels.survey import Survey, survey


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What one forward pass showed.

    Attributes:
        layers: Called conv and linear layers, ordered by their first call; a shared one once, with ``calls`` > 1.
            Those that cannot be pruned on their own say why in ``fixed``.
        uncalled: Names of conv and linear modules that the pass did not call.
        varying: Names of shared layers whose calls saw different map sizes; their spec is of the first call.
        tied: Layer → the one before it that has the same weight, and whose choice holds for both.
        foreign: Layers of other kinds with weights, which stay as they are → what they are.
    """

    layers: tuple[LayerSpec, ...]
    uncalled: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Return in words what is not searched, one line for each reason."""
        why: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.fixed:
                why.setdefault(layer.fixed, []).append(layer.name)
        for name, what in self.foreign.items():
            why.setdefault(what, []).append(name)
        lines = [f"not searched: {_listed(names)}: {reason}" for reason, names in why.items()]
        if self.uncalled:
            lines.append(f"not searched: {_listed(self.uncalled)}: never called in a forward pass")
        return lines


def trace(model: nn.Module, example: Example) -> tuple[LayerSpec, ...]:
    """Return the layers that a forward pass of ``example`` runs, in execution order.

    Args:
        model: Any module; it runs in eval mode without gradients and is left as it was, train or eval mode,
            buffers and random generators included.
        example: What the model takes, with batch dimension, e.g. (1, C, H, W); a tuple of tensors for several inputs,
            a dict for inputs by name.
    Raises:
        ModelError: The model fails on the example, or runs no conv and no linear layer.
    """
    return trace_report(model, example).layers


def trace_report(model: nn.Module, example: Example) -> TraceReport:
    """Return what ``trace`` returns, and what the pass showed beside it.

    Raises:
        ModelError: As ``trace``.
    """
    found = survey(model, example)
    if not found.layers:
        raise ModelError(f"model {type(model).__name__} runs no Conv2d and no Linear layer; there is nothing to prune.")
    return TraceReport(
        _merged(found), found.uncalled, tuple(sorted(found.varying)), dict(found.tied), dict(found.foreign)
    )


def _merged(found: Survey) -> tuple[LayerSpec, ...]:
    """Return one spec for each weight: layers that share one count as calls of the first, where they are alike."""
    specs = {name: replace(layer.spec, fixed=found.fixed.get(name, "")) for name, layer in found.layers.items()}
    for name, first in found.tied.items():
        own, spec = specs[first], specs[name]
        if own.signature == spec.signature:
            specs[first] = replace(own, calls=own.calls + spec.calls)
            del specs[name]
        else:
            specs[name] = replace(spec, fixed=f"its weight is that of '{first}', whose choice holds for both")
    return tuple(specs.values())


def _listed(names: list[str] | tuple[str, ...]) -> str:
    """Return the first names of a list, and how many more there are."""
    most = 4
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
