"""Which parameters of a model a policy prunes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from autoprune.core.choices import Choice, Dense
from autoprune.core.errors import PolicyError
from autoprune.core.layers import LayerSpec, Op
from autoprune.core.policy import Policy
from autoprune.trainers.method import PrunedLayer


def inner_module(model: nn.Module) -> nn.Module:
    """Return the module under torch.compile's and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel wrapper of a model, under torch.compile's if need be; None without one."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that takes the steps, under the wrappers of training libraries.

    Such a wrapper is an ``Optimizer`` by name only: it never called the base class, and has no hooks to register.
    """
    while "_optimizer_step_pre_hooks" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer


def choices_of(policy: Policy | Mapping[str, Choice]) -> Mapping[str, Choice]:
    """Return layer name → choice."""
    return policy.choices if isinstance(policy, Policy) else policy


def pruned_layers(model: nn.Module, choices: Mapping[str, Choice]) -> list[PrunedLayer]:
    """Return the layers that ``choices`` prunes, a shared weight once.

    Args:
        model: Without wrappers.
        choices: Layer name → choice; dense ones are skipped.
    Raises:
        PolicyError: A layer is absent, cannot take its choice, or is no plain parameter.
    """
    modules = dict(model.named_modules())
    layers: dict[int, PrunedLayer] = {}
    for name, choice in choices.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            raise PolicyError(
                f"policy is for another model: its layer '{name}' is no convolution or linear layer of this one; "
                "give the model it was searched for."
            )
        if isinstance(choice, Dense):
            continue
        weight = _checked_weight(name, module, choice)
        known = layers.get(id(weight))
        if known is not None and known.choice != choice:
            raise PolicyError(f"layers '{known.name}' and '{name}' share one weight but have different choices.")
        if known is None:
            layers[id(weight)] = PrunedLayer(name, weight, choice)
    return list(layers.values())


def _checked_weight(name: str, module: nn.Conv2d | nn.Linear, choice: Choice) -> nn.Parameter:
    op: Op = "conv" if isinstance(module, nn.Conv2d) else "linear"
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    weight: object = module.weight
    if not isinstance(weight, nn.Parameter):
        raise PolicyError(f"layer '{name}': its weight is computed (a parametrization); remove that before attaching.")
    if not choice.fits(LayerSpec(name, op, tuple(weight.shape), groups=groups)):
        raise PolicyError(f"policy is for another model: layer '{name}' here cannot take {choice.text}.")
    return weight
