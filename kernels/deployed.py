"""The deployed network: what ``convert`` returns.

Called like the model it came from, for inference only.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.kernels import opaque
from autoprune.kernels.cpu.program import Program
from autoprune.kernels.dispatch import Decision
from autoprune.kernels.inputs import Example, call, copied, first_tensor, tensors_in
from autoprune.kernels.modules import FrozenModule, check_input
from autoprune.kernels.plan import Plan
from autoprune.kernels.plan_ops import PlanRefusal, Value

# Maps of the images that run together; measured flat around 2 MiB, near a core's second-level cache.
_TILE_BYTES = 2 << 20


def tile_of(batch: int, image_bytes: int, threads: int = 1) -> int:
    """Return how many images of a batch run together; the batch is run in such parts, one after another.

    Every part uses the same memory again, which therefore stays in cache. Equal parts are preferred.

    Args:
        batch: Images in all.
        image_bytes: What one image's maps take.
        threads: Threads share the images of a part, and each brings a cache of its own.
    """
    most = max(1, min(batch, threads * max(2 if threads > 1 else 1, _TILE_BYTES // max(image_bytes, 1))))
    return next((size for size in range(most, most // 2, -1) if batch % size == 0), most)


class DeployedModel(FrozenModule):
    """A converted network, called like the model it came from: ``y = deployed(x)``. Inference only.

    Args:
        decisions: One per convolution and linear layer.
        example: What the model takes, such as (N, C, H, W) float32; kept for timing.

    Attributes:
        inputs: The whole example.
        example: Its first tensor.
    """

    def __init__(self, decisions: tuple[Decision, ...], example: Example) -> None:
        super().__init__()
        self.decisions = decisions
        self.inputs = copied(example)
        self.example = first_tensor(self.inputs)

    def explain(self) -> list[tuple[str, str, str, str]]:
        """Return (layer, choice, kernel, why) of every convolution and linear layer."""
        return [(d.layer, d.choice, d.kernel, d.why) for d in self.decisions]

    def time_us(self, repeats: int = 100) -> np.ndarray:
        """Return microseconds of ``repeats`` calls on the example, as a user calls it; shape (repeats,) float64."""
        call(self, self.inputs)
        samples = np.empty(repeats)
        for index in range(repeats):
            start = time.perf_counter_ns()
            call(self, self.inputs)
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
        self._image_bytes = plan.image_bytes
        flat = (plan.output.channels,)
        whole = flat if (plan.output.height, plan.output.width) == (1, 1) else _shape(plan.output)
        self._is_shaped = plan.output_shape == whole
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
        if torch.compiler.is_compiling():
            return opaque.run(x, self._number)
        return self.run_opaque(x)

    def output_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the output for an input of ``shape``."""
        return (int(shape[0]), *self.plan.output_shape)

    def run_opaque(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        last = self.programs.last
        if last is not None and x.shape == last[0] and x.is_cpu:
            # The same shape as before, as in serving: straight to the program, which checks the dtype itself.
            result = last[1].run(x)
            return result if self._is_shaped else result.reshape(-1, *self.plan.output_shape)
        return self._run_any(x)

    def _run_any(self, x: Tensor) -> Tensor:
        check_input(x)
        if x.shape[1:] != self.example.shape[1:]:
            raise ModelError(
                f"this deployed model was planned for inputs (N, {', '.join(map(str, self.example.shape[1:]))}), got "
                f"{tuple(x.shape)}; convert the model again with an example of that shape."
            )
        batch, plan = int(x.shape[0]), self.plan
        x = x.detach().reshape(batch, *_shape(plan.input))
        out = torch.empty((batch, *plan.output_shape))
        tile = tile_of(batch, self._image_bytes, plan.threads)
        for start in range(0, batch, tile):
            part = x[start : start + tile]
            out[start : start + tile] = self._program(part).run(part).reshape(-1, *plan.output_shape)
        return out

    def _program(self, x: Tensor) -> Program:
        return self.programs.get(x.shape, lambda: self.plan.program(int(x.shape[0]), self._weights()))

    def _weights(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): tensor for name, tensor in self.named_buffers(recurse=False)}

    def profile_us(self, repeats: int = 100) -> dict[str, float]:
        """Return the median microseconds of every operation inside the running network, by name."""
        batch = int(self.example.shape[0])
        tile = tile_of(batch, self._image_bytes, self.plan.threads)
        x = self.example[:tile].reshape(-1, *_shape(self.plan.input))
        program = self._program(x)
        program.run(x)
        scale = batch / tile
        profile = zip(self.plan.op_names, program.profile_us(repeats), strict=True)
        return {name: float(np.median(samples)) * scale for name, samples in profile}


class NestedModel(DeployedModel):
    """A network in PyTorch whose sparse layers run on sparse kernels.

    Attributes:
        refusal: Why it is not one flat plan.
    """

    def __init__(
        self, network: nn.Module, refusal: PlanRefusal, decisions: tuple[Decision, ...], example: Example
    ) -> None:
        super().__init__(decisions, example)
        self.network = network
        self.refusal = refusal

    def forward(self, *inputs: object, **named: object) -> Any:
        """Return what the original model returns; whatever inputs it takes, float ones in float32 on the CPU."""
        for x in tensors_in((inputs, named)):
            if x.is_floating_point():
                check_input(x)
        with torch.no_grad():
            return self.network(*inputs, **named)


def _shape(value: Value) -> tuple[int, int, int]:
    return (value.channels, value.height, value.width)


def _key(name: str, part: str) -> str:
    # A buffer's name must not hold dots.
    return f"{name}.{part}".replace(".", "/")
