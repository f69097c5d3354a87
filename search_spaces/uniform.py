"""Policies without a search: one choice for every layer that can take it."""

from __future__ import annotations

from collections.abc import Sequence

from autoprune.core.choices import Choice, Dense, parse_choice
from autoprune.core.coupling import Coupling
from autoprune.core.errors import PolicyError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy


def uniform_policy(
    layers: Sequence[LayerSpec], texts: Sequence[str], *, model: str, coupling: Coupling | None = None
) -> Policy:
    """Return the policy that gives each layer the first of some choices that it can take.

    The first convolution and the last layer, the classifier, stay dense, as in the published comparisons; so does a
    layer that fits none of the choices. Layers that share channels keep all of them where one of them is to.

    Args:
        layers: As traced, in execution order.
        texts: Choices in their text form.
        model: Name of the network.
        coupling: Its channel groups; needed where channels are among the choices.
    Raises:
        ChoiceError, UnknownName: A text that spells no choice.
        PolicyError: No layer can take any of the choices.
    """
    wanted = [parse_choice(text) for text in texts]
    first = next((layer.name for layer in layers if layer.op == "conv"), None)
    last = layers[-1].name if layers and layers[-1].op == "linear" else None
    choices: dict[str, Choice] = {}
    for layer in layers:
        fitting = (choice for choice in wanted if choice.fits(layer))
        kept_dense = layer.name in (first, last) or bool(layer.fixed)
        choices[layer.name] = Dense() if kept_dense else next(fitting, Dense())
    if coupling is not None:
        choices = coupling.harmonised(choices)
    if all(choice == Dense() for choice in choices.values()):
        raise PolicyError(
            f"--uniform {' '.join(texts)}: no layer of '{model}' can take it (first convolution and classifier stay "
            "dense); give another choice."
        )
    budget = "uniform: " + " ".join(c.text for c in wanted)
    return Policy.make(choices, layers, model=model, budget=budget, coupling=coupling)
