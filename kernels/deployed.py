"""The deployed network: what ``convert`` returns.

Called like the model it came from, for inference only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.kernels.modules import FrozenModule, check_input
from autoprune.kernels.plan import Plan
from autoprune.kernels.plan_ops import PlanRefusal

# Samples a program takes at once: enough to reuse weights, few enough for its activations to stay in cache.
_TILE = 32


def tile_of(batch: int) -> int:
    """Return how many samples of a batch one program run takes; larger batches are runs one after another."""
    return min(batch, _TILE)


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one layer: its choice, the kernel that runs it, and why."""

    layer: str
    choice: str
    kernel: str
    why: str


class DeployedModel(FrozenModule):
    """A converted network, called like the model it came from: ``y = deployed(x)``. Inference only.

    Args:
        decisions: One per convolution and linear layer.
        example: (N, C, H, W) or (N, I) float32; kept for timing.
    """

    def __init__(self, decisions: tuple[Decision, ...], example: Tensor) -> None:
        super().__init__()
        self.decisions = decisions
        self.example = example.detach().clone()

    def explain(self) -> list[tuple[str, str, str, str]]:
        """Return (layer, choice, kernel, why) of every convolution and linear layer."""
        return [(d.layer, d.choice, d.kernel, d.why) for d in self.decisions]

    def time_us(self, repeats: int = 100) -> np.ndarray:
        """Return microseconds of ``repeats`` calls on the example, as a user calls it; shape (repeats,) float64."""
        self(self.example)
        samples = np.empty(repeats)
        for index in range(repeats):
            start = time.perf_counter_ns()
            self(self.example)
            samples[index] = (time.perf_counter_ns() - start) / 1e3
        return samples

    def profile_us(self, repeats: int = 100) -> dict[str, float]:
        """Return the median microseconds of every operation inside the running network, by name.

        Raises:
            ModelError: The network is not one flat plan; its layers cannot be timed apart from PyTorch.
        """
        raise ModelError("only a network that runs as one flat plan is profiled; see explain() for what is in the way.")


class PlannedModel(DeployedModel):
    """A network that runs as one flat plan; folded weights are its state."""

    def __init__(self, plan: Plan, decisions: tuple[Decision, ...], example: Tensor) -> None:
        super().__init__(decisions, example)
        self.plan = plan
        for op in plan.convs:
            self.register_buffer(_key(op.name, "weight"), op.weight_KCRS.clone())
            self.register_buffer(_key(op.name, "bias"), None if op.bias_K is None else op.bias_K.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output for any batch size.

        Args:
            x: (N, C, H, W) float32, any memory format, of the planned C, H and W.
        Raises:
            ModelError: Another shape, dtype or device.
        """
        check_input(x)
        if x.shape[1:] != self.example.shape[1:]:
            raise ModelError(
                f"this deployed model was planned for inputs (N, {', '.join(map(str, self.example.shape[1:]))}), got "
                f"{tuple(x.shape)}; convert the model again with an example of that shape."
            )
        batch, plan = int(x.shape[0]), self.plan
        x = x.detach().reshape(batch, plan.input.channels, plan.input.height, plan.input.width)
        with self.programs.lock, torch.no_grad():
            if 0 < batch <= _TILE:
                return self._run(x).reshape(batch, *plan.output_shape)
            out = torch.empty((batch, *plan.output_shape))
            for start in range(0, batch, _TILE):
                part = self._run(x[start : start + _TILE])
                out[start : start + _TILE] = part.reshape(-1, *plan.output_shape)
            return out

    def _run(self, x: Tensor) -> Tensor:
        batch = int(x.shape[0])
        return self.programs.get(batch, lambda: self.plan.program(batch, self._weights())).run(x)

    def _weights(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): tensor for name, tensor in self.named_buffers(recurse=False)}

    def profile_us(self, repeats: int = 100) -> dict[str, float]:
        """Return the median microseconds of every operation inside the running network, by name."""
        batch = int(self.example.shape[0])
        with self.programs.lock, torch.no_grad():
            tile = min(batch, _TILE)
            self(self.example)
            program = self.programs.get(tile, lambda: self.plan.program(tile, self._weights()))
            program.run(self.example[:tile].reshape(tile, *_sizes(self.plan)))
            profile = program.profile_us(repeats)
        scale = batch / tile
        return {
            name: float(np.median(samples)) * scale for name, samples in zip(self.plan.op_names, profile, strict=True)
        }


class NestedModel(DeployedModel):
    """A network in PyTorch whose sparse layers run on sparse kernels.

    Attributes:
        refusal: Why it is not one flat plan.
    """

    def __init__(
        self, network: nn.Module, refusal: PlanRefusal, decisions: tuple[Decision, ...], example: Tensor
    ) -> None:
        super().__init__(decisions, example)
        self.network = network
        self.refusal = refusal

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output; whatever inputs the original model takes, in float32 on the CPU."""
        check_input(x)
        with torch.no_grad():
            result = self.network(x)
        assert isinstance(result, Tensor)
        return result


def _sizes(plan: Plan) -> tuple[int, int, int]:
    return (plan.input.channels, plan.input.height, plan.input.width)


def _key(name: str, part: str) -> str:
    # A buffer's name must not hold dots.
    return f"{name}.{part}".replace(".", "/")
