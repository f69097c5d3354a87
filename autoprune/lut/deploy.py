"""Networks as they would be deployed under a policy, for timing alone: masked by magnitude, not trained.

Latency depends on where the zeros are, not on the values, so a network is traced once and masked anew per policy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.errors import PolicyError
from autoprune.core.registry import unknown_name
from autoprune.kernels.convert import convert, is_masked
from autoprune.kernels.deployed import DeployedModel, PlannedModel
from autoprune.kernels.plan import Plan, build_plan, kernel_for
from autoprune.kernels.plan_ops import ConvOp, layer_spec
from autoprune.sparsity.channels import ChannelGroups
from autoprune.sparsity.compact import mask_by_policy
from autoprune.sparsity.masks import make_mask

Deploy = Callable[[Mapping[str, Choice]], Callable[[], object]]


def masked_copy(
    model: nn.Module,
    choices: Mapping[str, Choice],
    example: Tensor | None = None,
    groups: ChannelGroups | None = None,
) -> nn.Module:
    """Return a copy of a model with every layer masked by magnitude under its choice; masked layers stay as they are.

    Args:
        model: Not modified.
        choices: Layer → choice.
        example: An input, by which groups of channels are found; needed for channel choices without ``groups``.
        groups: Of the model, where they are known.
    Raises:
        PolicyError: A choice names no convolution or linear layer of the model, or channels that cannot leave.
    """
    network = copy.deepcopy(model).eval()
    mask_by_policy(network, choices, example, groups=groups)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    with torch.no_grad():
        for name, choice in choices.items():
            if name not in layers:
                raise PolicyError(f"the policy does not fit this model: {unknown_name('layer', name, layers)}")
            weight = layers[name].weight
            # How much a choice keeps depends on the weight's shape alone, not on the map.
            spec = layer_spec(name, layers[name], (1, 1, 1, 1), (1, 1, 1, 1))
            if not isinstance(choice, Dense | Channels) and not is_masked(weight, spec, choice):
                weight.mul_(make_mask(weight, choice))
    return network


def deployer(model: nn.Module, example: Tensor, threads: int = 1, groups: ChannelGroups | None = None) -> Deploy:
    """Return a function from choices to a call that runs the network deployed under them once on ``example``.

    Args:
        model: float32, on the CPU; not modified.
        example: (N, C, H, W) float32.
        threads: Threads of the kernels.
        groups: Channel groups of the model; needed for channel choices.
    """
    plan = build_plan(model, example, {}, threads=threads)

    def deploy(choices: Mapping[str, Choice]) -> Callable[[], object]:
        network: DeployedModel
        if any(isinstance(choice, Channels) for choice in choices.values()):
            masked = masked_copy(model, choices, example, groups)
            network = convert(masked, choices, example, threads=threads, groups=groups)
        elif isinstance(plan, Plan):
            network = PlannedModel(_masked_plan(plan, choices), (), example)
        else:
            network = convert(masked_copy(model, choices), choices, example, threads=threads)
        return lambda: network(example)

    return deploy


def _masked_plan(plan: Plan, choices: Mapping[str, Choice]) -> Plan:
    ops = []
    kernels = dict(plan.kernels)
    for op in plan.ops:
        choice = choices.get(op.name, Dense())
        if isinstance(op, ConvOp) and not isinstance(choice, Dense):
            # Masks are defined on the layer's own shape; a linear layer may run as a wider convolution.
            weight = op.weight_KCRS.reshape(op.layer.weight_shape)
            masked = weight if is_masked(weight, op.layer, choice) else weight * make_mask(weight, choice)
            op = replace(op, weight_KCRS=masked.reshape(op.shape.weight_shape))
            kernels[op.name] = kernel_for(choice)
        ops.append(op)
    return replace(plan, ops=tuple(ops), kernels=kernels)
