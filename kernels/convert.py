"""From a pruned PyTorch model to the network that is deployed.

``convert`` runs the whole model as one flat plan where it can, and otherwise replaces each sparse layer by a module of
its own. What became of every layer, and why, is in ``DeployedModel.explain``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense, Pattern, Tile
from autoprune.core.errors import MissingLatency, ModelError, PolicyError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.core.registry import unknown_name
from autoprune.kernels.deployed import Decision, DeployedModel, NestedModel, PlannedModel
from autoprune.kernels.fold import fold_batchnorm
from autoprune.kernels.modules import LayerKernel, ProgramLayer
from autoprune.kernels.plan import KernelName, build_plan, kernel_for
from autoprune.kernels.plan_ops import PlanRefusal, layer_spec, padding_of
from autoprune.kernels.plan_record import eval_view

__all__ = ["DeployedModel", "LatencyRows", "NestedModel", "PlannedModel", "convert"]

# Folding BatchNorm and another order of summation move results by about 1e-6 of their scale.
_TOLERANCE = 1e-4


class LatencyRows(Protocol):
    """What conversion needs of a latency table."""

    def layer_us(self, layer: LayerSpec, choice: Choice) -> float:
        """Return the latency of one layer in microseconds; MissingLatency where there is no row."""
        ...


def convert(
    model: nn.Module,
    policy: Policy | Mapping[str, Choice],
    example: Tensor,
    table: LatencyRows | None = None,
    threads: int = 1,
) -> DeployedModel:
    """Return the network that runs ``model`` fastest under a policy it was already masked by.

    Zeros of a layer's weights decide what its sparse kernel skips; the model is not modified.

    Args:
        model: float32, on the CPU; taken as in eval mode.
        policy: Layer → choice; layers not named are dense.
        example: (N, C, H, W) float32; its shape is planned for, batch sizes may differ later.
        table: Measured rows; a layer whose sparse kernel is not faster than its dense row then runs dense.
        threads: Threads of the kernels.
    Raises:
        PolicyError: A choice names no layer of the model, or one that cannot take it.
        ModelError: Wrong dtype or device, or weights that the policy says are pruned but are not.
    """
    choices = dict(policy.choices) if isinstance(policy, Policy) else dict(policy)
    _check_model(model, example)
    plan = build_plan(model, example, choices, threads=threads)
    request = _Request(choices, table, threads)
    if isinstance(plan, PlanRefusal):
        return _nested(model, plan, request, example)
    # The model's own weights say what is masked: folding BatchNorm can only add zeros.
    layers = {op.name: _Layer(op.layer, op.weight_KCRS) for op in plan.convs}
    decisions = _decide(layers, choices, table)
    kernels: dict[str, tuple[KernelName, int]] = {
        d.layer: (plan.kernels[d.layer][0] if d.kernel != "dense" else "dense", plan.kernels[d.layer][1])
        for d in decisions
    }
    deployed = PlannedModel(replace(plan, kernels=kernels), decisions, example)
    refusal = _disagreement(model, deployed, example)
    return deployed if refusal is None else _nested(model, refusal, request, example)


@dataclass(frozen=True, slots=True)
class _Request:
    """What a caller asked for: choices, the table to decide by, threads."""

    choices: Mapping[str, Choice]
    table: LatencyRows | None
    threads: int


def _check_model(model: nn.Module, example: Tensor) -> None:
    for name, tensor in [*model.named_parameters(), ("the example", example)]:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ModelError(
                f"conversion takes a float32 model and example on the CPU, got {name} in {tensor.dtype} on "
                f"{tensor.device}; call model.float().cpu() first."
            )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of the model: shape facts, its module, and why PyTorch must keep it (empty: it need not)."""

    spec: LayerSpec
    weight: Tensor
    torch_only: str = ""


def _decide(
    layers: Mapping[str, _Layer], choices: Mapping[str, Choice], table: LatencyRows | None
) -> tuple[Decision, ...]:
    for name, choice in choices.items():
        if name not in layers:
            raise PolicyError(f"the policy does not fit this model: {unknown_name('layer', name, layers)}")
        if not choice.fits(layers[name].spec):
            raise PolicyError(f"the policy does not fit this model: layer '{name}' cannot take {choice.text}.")
    return tuple(_decide_one(name, layer, choices.get(name, Dense()), table) for name, layer in layers.items())


def _decide_one(name: str, layer: _Layer, choice: Choice, table: LatencyRows | None) -> Decision:
    if layer.torch_only:
        return Decision(name, choice.text, "torch", f"left to torch: {layer.torch_only}")
    kernel, _ = kernel_for(choice)
    if kernel == "dense":
        return Decision(name, choice.text, "dense", "dense by policy")
    _check_masked(name, layer, choice)
    try:
        sparse_us, dense_us = (table.layer_us(layer.spec, c) for c in (choice, Dense())) if table else (None, None)
    except MissingLatency:
        sparse_us = dense_us = None
    if sparse_us is None or dense_us is None:
        return Decision(name, choice.text, kernel, "kernel of the choice; the table has no row to compare it by")
    figures = f"{sparse_us:.1f} us against {dense_us:.1f} us dense"
    if sparse_us >= dense_us:
        return Decision(name, choice.text, "dense", f"left dense because the {kernel} kernel is not faster: {figures}")
    return Decision(name, choice.text, kernel, f"{kernel} kernel: {figures}")


def is_masked(weight: Tensor, layer: LayerSpec, choice: Choice) -> bool:
    """Return whether a layer's weights have the zeros that its choice calls for.

    Masks remove whole units and round in favour of the weights, at worst in every filter by itself.
    """
    unit = 1
    if isinstance(choice, Pattern):
        unit = choice.share[1] * choice.entries
    elif isinstance(choice, Tile):
        unit = choice.size
    elif layer.op == "conv":
        unit = math.prod(layer.window)
    kept = int(torch.count_nonzero(weight))
    return kept <= 1.01 * choice.density(layer) * layer.weights + unit * layer.filters


def _check_masked(name: str, layer: _Layer, choice: Choice) -> None:
    if not is_masked(layer.weight, layer.spec, choice):
        kept, nominal = int(torch.count_nonzero(layer.weight)), choice.density(layer.spec)
        raise ModelError(
            f"layer '{name}' has {kept / layer.spec.weights:.0%} of its weights, its choice {choice.text} keeps "
            f"{nominal:.0%}; mask or train the model by the policy before converting it."
        )


def _disagreement(model: nn.Module, deployed: nn.Module, example: Tensor) -> PlanRefusal | None:
    """Return why a plan is wrong about the model, on random inputs; hooks and in-place tricks can cause it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(example.shape, generator=generator)
    with torch.no_grad():
        want, got = eval_view(model)(x), deployed(x)
    if not isinstance(want, Tensor) or want.shape != got.shape:
        return PlanRefusal("output", "the plan's output has another shape than the model's")
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
    if not error <= _TOLERANCE:
        return PlanRefusal("output", f"the plan's outputs differ from the model's by {error:.1e} of their scale")
    return None


def _nested(model: nn.Module, refusal: PlanRefusal, request: _Request, example: Tensor) -> NestedModel:
    network = _torch_form(model, example)
    layers = _layers_by_hooks(network, example)
    decisions = _decide(layers, request.choices, request.table)
    for decision in decisions:
        # PyTorch's own dense kernels need no copy of the input; a program of one layer does.
        if decision.kernel in ("block", "csr"):
            _, block = kernel_for(request.choices[decision.layer])
            how = LayerKernel("block" if decision.kernel == "block" else "csr", block, request.threads)
            source = network.get_submodule(decision.layer)
            assert isinstance(source, nn.Conv2d | nn.Linear)
            replacement = ProgramLayer(decision.layer, source, layers[decision.layer].spec, how)
            network.set_submodule(decision.layer, replacement)
    return NestedModel(network, refusal, decisions, example)


def _torch_form(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of a model in eval mode, BatchNorms folded where that leaves its outputs as they are."""
    plain = copy.deepcopy(model).eval()
    try:
        folded = fold_batchnorm(model)
    except ModelError:
        return plain
    return folded if _disagreement(plain, folded, example) is None else plain


def _layers_by_hooks(network: nn.Module, example: Tensor) -> dict[str, _Layer]:
    """Return the layers one forward pass runs, in order of execution, with their shapes."""
    layers: dict[str, _Layer] = {}

    def record(name: str, module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        why = ""
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            why = f"a grouped convolution (groups={module.groups})"
        elif isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or padding_of(module) is None):
            why = f"padding {module.padding!r} in mode '{module.padding_mode}'"
        calls = layers[name].spec.calls + 1 if name in layers else 1
        spec = layer_spec(name, module, inputs[0].shape, output.shape)
        layers[name] = _Layer(replace(spec, calls=calls), module.weight.detach(), why)

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(
                module.register_forward_hook(lambda m, inputs, output, name=name: record(name, m, inputs, output))
            )
    try:
        with torch.no_grad():
            network(example)
    except Exception as error:  # the user's forward: anything can come out of it
        raise ModelError(
            f"the model does not run on an example of shape {tuple(example.shape)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return layers
