"""From a pruned PyTorch model to the network that is deployed.

``convert`` runs the whole model as one flat plan where it can, and otherwise replaces each sparse layer by a module of
its own. What became of every layer, and why, is in ``DeployedModel.explain``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from autoprune.core.choices import Block, Channels, Choice, Dense, Pattern, Tile
from autoprune.core.errors import DeviceError, ModelError, PolicyError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.core.registry import unknown_name
from autoprune.kernels import gpu_layers
from autoprune.kernels.deployed import DeployedModel, NestedModel, PlannedModel
from autoprune.kernels.dispatch import CPU, Decision, LatencyRows, Place, decide, lookup_of
from autoprune.kernels.fused import refusal_of
from autoprune.kernels.gpu import GpuModel, build_gpu
from autoprune.kernels.gpu_plan import fused_network
from autoprune.kernels.inputs import Example, first_tensor, tensors_in
from autoprune.kernels.modules import LayerKernel, ProgramLayer
from autoprune.kernels.nested import disagreement, layers_by_hooks, torch_form
from autoprune.kernels.plan import KernelName, Plan, build_plan, kernel_for
from autoprune.kernels.plan_ops import PlanRefusal
from autoprune.kernels.survey import Layer, survey
from autoprune.sparsity.channels import ChannelGroups
from autoprune.sparsity.compact import compact

__all__ = ["DeployedModel", "GpuModel", "LatencyRows", "NestedModel", "PlannedModel", "convert"]


def convert(
    model: nn.Module,
    policy: Policy | Mapping[str, Choice],
    example: Example,
    table: LatencyRows | None = None,
    threads: int = 1,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    groups: ChannelGroups | None = None,
) -> DeployedModel:
    """Return the network that runs ``model`` fastest under a policy it was already masked by.

    Zeros of a layer's weights decide what its sparse kernel skips; the model is not modified.

    Args:
        model: float32, on the CPU, also when it is deployed on a GPU; taken as in eval mode.
        policy: Layer → choice; layers not named are dense.
        example: (N, C, H, W) float32; its shape is planned for, batch sizes may differ later. Several inputs: a tuple
            of tensors, or a dict of them by name.
        table: Measured rows; a layer whose sparse kernel is not faster than its dense row then runs dense.
        threads: Threads of a CPU's kernels.
        device: ``cpu``, or ``cuda``: the fused network on the GPU, channels last, or PyTorch's with layers replaced.
        dtype: Of a network on a GPU; one on a CPU is in float32.
        groups: Channel groups of the model, where they are known; a policy with channel choices finds them otherwise.
    Raises:
        PolicyError: A choice names no layer of the model, or one that cannot take it.
        ModelError: Wrong dtype or device, or weights that the policy says are pruned but are not.
        DeviceError: No such device on this machine.
    """
    choices = dict(policy.choices) if isinstance(policy, Policy) else dict(policy)
    _check_model(model, example)
    channels = {name: choice for name, choice in choices.items() if isinstance(choice, Channels)}
    if channels:
        smaller = compact(model, channels, example, groups)
        rest = {name: choice for name, choice in choices.items() if name not in channels}
        deployed = convert(smaller, rest, example, table, threads, device=device, dtype=dtype)
        deployed.decisions = tuple(_noted(d, channels, smaller) for d in deployed.decisions)
        return deployed
    choices = _with_ties(model, choices)
    if device != "cpu":
        check_gpu(device)
        return deploy_on(torch.device(device), model, choices, first_tensor(example), table, dtype)
    plan = _plan(model, example, choices, threads)
    request = _Request(choices, table, threads)
    if isinstance(plan, PlanRefusal):
        return _nested(model, plan, request, example)
    # The model's own weights say what is masked: folding BatchNorm can only add zeros.
    layers = {op.name: Layer(op.layer, op.weight_KCRS) for op in plan.convs}
    decisions = _decide(layers, choices, table, CPU)
    kernels: dict[str, tuple[KernelName, int]] = {
        d.layer: (plan.kernels[d.layer][0] if d.kernel != "dense" else "dense", plan.kernels[d.layer][1])
        for d in decisions
    }
    deployed = PlannedModel(replace(plan, kernels=kernels), decisions, first_tensor(example))
    refusal = disagreement(model, deployed, example)
    return deployed if refusal is None else _nested(model, refusal, request, example)


def _plan(model: nn.Module, example: Example, choices: Mapping[str, Choice], threads: int) -> Plan | PlanRefusal:
    if not isinstance(example, Tensor):
        return PlanRefusal("forward", "it takes several inputs; a plan has one")
    return build_plan(model, example, choices, threads=threads)


def _with_ties(model: nn.Module, choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Return the choices with those of layers that share another one's weight, which hold for them too."""
    found = dict(choices)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    chosen = {id(layers[name].weight): choice for name, choice in choices.items() if name in layers}
    for name, module in layers.items():
        if id(module.weight) in chosen and "weight" in module._parameters:
            found.setdefault(name, chosen[id(module.weight)])
    return found


def _noted(decision: Decision, channels: Mapping[str, Choice], smaller: nn.Module) -> Decision:
    """Return a decision of the smaller network with the choice that made the layer smaller."""
    choice = channels.get(decision.layer)
    if choice is None:
        return decision
    filters = len(smaller.get_submodule(decision.layer).weight)  # type: ignore[arg-type]
    return replace(decision, choice=choice.text, why=f"the {filters} filters left of it run dense")


def check_gpu(device: str) -> None:
    """Refuse a device that networks cannot be deployed on.

    Raises:
        DeviceError: Neither a CPU nor a GPU that PyTorch finds here.
    """
    if device.split(":")[0] != "cuda":
        raise DeviceError(f"device '{device}': networks are deployed on cpu or cuda; give one of them.")
    if not torch.cuda.is_available():
        raise DeviceError(f"device '{device}': PyTorch finds no NVIDIA GPU on this machine; use cpu.")


def deploy_on(
    device: torch.device,
    model: nn.Module,
    choices: Mapping[str, Choice],
    example: Tensor,
    table: LatencyRows | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> GpuModel:
    """Return the network as ``convert`` deploys it on a GPU; on a CPU device the same operators run their CPU forms.

    A network that is one flat plan runs fused: bias, residual and ReLU inside each layer's kernel. Any other runs as
    PyTorch's own code with its sparse layers replaced.

    Args:
        device: Where it will run.
        model, example: float32, on the CPU.
        choices: Layer → choice; layers not named are dense.
        table: Measured rows of a GPU.
        dtype: Of maps and weights.
    """
    place, plan = Place("cuda", dtype), build_plan(model, example, choices)
    if isinstance(plan, Plan) and refusal_of(plan) is None and _agrees(model, plan, example):
        layers = {op.name: Layer(op.layer, op.weight_KCRS) for op in plan.convs}
        decisions = _decide(layers, choices, table, place)
        named = {decision.layer: decision for decision in decisions}
        network = fused_network(plan, named, choices, gpu_layers.Place(device, dtype), table)
        return GpuModel(network, decisions, example.to(device, dtype))
    return _nested_on(device, model, choices, example, table, dtype)


def _agrees(model: nn.Module, plan: Plan, example: Tensor) -> bool:
    """Return whether a plan computes its model, both dense in float32 on the CPU, on two images."""
    dense = {op.name: Decision(op.name, "dense", "dense", "") for op in plan.convs}
    network = fused_network(plan, dense, {}, gpu_layers.Place(torch.device("cpu"), torch.float32))
    return disagreement(model, network, example[:2]) is None


def _nested_on(
    device: torch.device,
    model: nn.Module,
    choices: Mapping[str, Choice],
    example: Tensor,
    table: LatencyRows | None,
    dtype: torch.dtype,
) -> GpuModel:
    network = torch_form(model, example)
    layers = layers_by_hooks(network, example)
    decisions = _decide(layers, choices, table, Place("cuda", dtype))
    by_layer = {layer.spec: decision for layer, decision in zip(layers.values(), decisions, strict=True)}
    return build_gpu(network, by_layer, example, device, dtype)


@dataclass(frozen=True, slots=True)
class _Request:
    """What a caller asked for: choices, the table to decide by, threads."""

    choices: Mapping[str, Choice]
    table: LatencyRows | None
    threads: int


def _check_model(model: nn.Module, example: Example) -> None:
    inputs = [("the example", tensor) for tensor in tensors_in(example) if tensor.is_floating_point()]
    for name, tensor in [*model.named_parameters(), *inputs]:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ModelError(
                f"conversion takes a float32 model and example on the CPU, got {name} in {tensor.dtype} on "
                f"{tensor.device}; call model.float().cpu() first."
            )


def _decide(
    layers: Mapping[str, Layer],
    choices: Mapping[str, Choice],
    table: LatencyRows | None,
    place: Place,
    foreign: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Decision, ...]:
    for name, choice in choices.items():
        if name in foreign:
            raise PolicyError(f"the policy does not fit this model: layer '{name}' is {foreign[name]} and stays dense.")
        if name not in layers:
            raise PolicyError(f"the policy does not fit this model: {unknown_name('layer', name, layers)}")
        if not choice.fits(layers[name].spec):
            raise PolicyError(f"the policy does not fit this model: layer '{name}' cannot take {choice.text}.")
    lookup, decisions = lookup_of(table, place), []
    for name, layer in layers.items():
        choice = choices.get(name, Dense())
        if layer.torch_only:
            decisions.append(Decision(name, choice.text, "torch", f"left to torch: {layer.torch_only}"))
            continue
        if choice.kernel not in ("dense", "channels"):
            _check_masked(name, layer, choice)
        decisions.append(decide(layer.spec, choice, place, lookup))
    decisions += [Decision(name, Dense().text, "torch", f"left to torch: {what}") for name, what in foreign.items()]
    return tuple(decisions)


def is_masked(weight: Tensor, layer: LayerSpec, choice: Choice) -> bool:
    """Return whether a layer's weights have the zeros that its choice calls for.

    Masks remove whole units and round in favour of the weights, at worst in every filter by itself. Where filters or
    channels are no multiple of a unit's, the units that stay may all be whole and those that go all be cut.
    """
    unit, shared = 1, (1, 1)
    if isinstance(choice, Pattern):
        unit, shared = choice.share[1] * choice.entries, choice.share
    elif isinstance(choice, Block):
        unit, shared = math.prod(layer.window), (choice.filters, 1)
    elif isinstance(choice, Tile):
        unit = choice.size
    elif layer.op == "conv":
        unit = math.prod(layer.window)
    whole = math.prod(-(-size // of) * of / size for size, of in zip(layer.weight_shape, shared, strict=False))
    kept = int(torch.count_nonzero(weight))
    return kept <= 1.01 * whole * choice.density(layer) * layer.weights + unit * layer.filters


def _check_masked(name: str, layer: Layer, choice: Choice) -> None:
    if not is_masked(layer.weight, layer.spec, choice):
        kept, nominal = int(torch.count_nonzero(layer.weight)), choice.density(layer.spec)
        raise ModelError(
            f"layer '{name}' has {kept / layer.spec.weights:.0%} of its weights, its choice {choice.text} keeps "
            f"{nominal:.0%}; mask or train the model by the policy before converting it."
        )


def _nested(model: nn.Module, refusal: PlanRefusal, request: _Request, example: Example) -> NestedModel:
    network = torch_form(model, example)
    found = survey(network, example)
    layers, called = found.layers, {*found.layers, *found.foreign}
    # A choice for a layer that never runs changes nothing that could be deployed.
    choices = {name: choice for name, choice in request.choices.items() if name in called or name not in found.uncalled}
    decisions = _decide(layers, choices, request.table, CPU, found.foreign)
    for decision in decisions:
        # PyTorch's own dense kernels need no copy of the input; a program of one layer does.
        if decision.kernel in ("block", "csr"):
            _, block = kernel_for(choices[decision.layer])
            how = LayerKernel("block" if decision.kernel == "block" else "csr", block, request.threads)
            source = network.get_submodule(decision.layer)
            assert isinstance(source, nn.Conv2d | nn.Linear)
            replacement = ProgramLayer(decision.layer, source, layers[decision.layer].spec, how)
            network.set_submodule(decision.layer, replacement)
    return NestedModel(network, refusal, decisions, example)


