"""A model and one example in, its prunable layers out: every Conv2d and Linear in the order in which they run.

Forward hooks, not a symbolic graph, so that any model that runs can be traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec

_Layer: TypeAlias = nn.Conv2d | nn.Linear


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What one forward pass showed.

    Attributes:
        layers: Called conv and linear layers, ordered by their first call; a shared one once, with ``calls`` > 1.
        uncalled: Names of conv and linear modules that the pass did not call.
        varying: Names of shared layers whose calls saw different map sizes; their spec is of the first call.
    """

    layers: tuple[LayerSpec, ...]
    uncalled: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()


def trace(model: nn.Module, example: Tensor) -> tuple[LayerSpec, ...]:
    """Return the layers that a forward pass of ``example`` runs, in execution order.

    Args:
        model: Any module; it runs in eval mode without gradients and is left as it was, train or eval mode,
            buffers and random generators included.
        example: What the model takes, with batch dimension, e.g. (1, C, H, W).
    Raises:
        ModelError: The model fails on the example, or runs no conv and no linear layer.
    """
    return trace_report(model, example).layers


def trace_report(model: nn.Module, example: Tensor) -> TraceReport:
    """Return what ``trace`` returns, and the layers that were never called or were called at several sizes.

    Raises:
        ModelError: As ``trace``.
    """
    recorder = _Recorder()
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_eval_mode(model))
        stack.enter_context(_same_rng(model))
        for name, module in candidates.items():
            handle = module.register_forward_hook(recorder.hook(name))
            stack.callback(handle.remove)
        try:
            with torch.no_grad():
                model(example)
        except ModelError:
            raise
        except Exception as error:  # a model is foreign code: whatever it raises means that it cannot be traced
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ModelError(
                f"model {type(model).__name__} failed on an example of shape {tuple(example.shape)}: {reason}; "
                "give an example of the size, type and device it takes."
            ) from error
    if not recorder.specs:
        raise ModelError(f"model {type(model).__name__} runs no Conv2d and no Linear layer; there is nothing to prune.")
    uncalled = tuple(name for name in candidates if name not in recorder.specs)
    return TraceReport(tuple(recorder.specs.values()), uncalled, tuple(sorted(recorder.varying)))


class _Recorder:
    """Collects one spec per layer while the hooks fire; a dict keeps the order of first calls."""

    def __init__(self) -> None:
        self.specs: dict[str, LayerSpec] = {}
        self.varying: set[str] = set()

    def hook(self, name: str) -> _Hook:
        return _Hook(self, name)

    def add(self, spec: LayerSpec) -> None:
        seen = self.specs.get(spec.name)
        if seen is None:
            self.specs[spec.name] = spec
            return
        if (seen.input_hw, seen.output_hw) != (spec.input_hw, spec.output_hw):
            self.varying.add(spec.name)
        self.specs[spec.name] = replace(seen, calls=seen.calls + 1)


class _Hook:
    """One layer's forward hook."""

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self.recorder = recorder
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not (inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)):
            raise ModelError(f"layer '{self.name}' is called without a positional tensor; autoprune cannot trace it.")
        make = _conv_spec if isinstance(module, nn.Conv2d) else _linear_spec
        self.recorder.add(make(self.name, module, inputs[0], output))  # type: ignore[arg-type]


def _conv_spec(name: str, module: nn.Conv2d, x: Tensor, y: Tensor) -> LayerSpec:
    dilation = (module.dilation[0], module.dilation[1])
    if isinstance(module.padding, str):
        # 'same' pads dilation * (window - 1) in all; its smaller half is what a symmetric padding can state.
        same = module.padding == "same"
        padding = (dilation[0] * (module.kernel_size[0] - 1) // 2, dilation[1] * (module.kernel_size[1] - 1) // 2)
        padding = padding if same else (0, 0)
    else:
        padding = (int(module.padding[0]), int(module.padding[1]))
    return LayerSpec(
        name=name,
        op="conv",
        weight_shape=tuple(module.weight.shape),
        stride=(module.stride[0], module.stride[1]),
        padding=padding,
        dilation=dilation,
        groups=module.groups,
        input_hw=(x.shape[-2], x.shape[-1]),
        output_hw=(y.shape[-2], y.shape[-1]),
        bias=module.bias is not None,
    )


def _linear_spec(name: str, module: nn.Linear, x: Tensor, y: Tensor) -> LayerSpec:
    # (N, in) is a vector; (N, tokens…, in) runs once per token.
    tokens = x.shape[1:-1].numel() if x.dim() > 2 else 1
    return LayerSpec(
        name=name,
        op="linear",
        weight_shape=tuple(module.weight.shape),
        input_hw=(tokens, 1),
        output_hw=(tokens, 1),
        bias=module.bias is not None,
    )


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and give each back its own flag (train() may be overridden, the flag is not)."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def _same_rng(model: nn.Module) -> Iterator[None]:
    """Restore torch's generators of the CPU and of every CUDA device that the model's weights live on."""
    devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield
