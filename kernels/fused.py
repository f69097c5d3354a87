"""A planned network executed by PyTorch: each layer with bias, residual and ReLU in one module, maps channels last.

The plan is the one that a CPU's program is made of; here each of its operations is one call, so that a CUDA graph of
the whole network holds no more launches than the plan has operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense
from autoprune.kernels.gpu_layers import LayerModule, Source
from autoprune.kernels.plan import Plan
from autoprune.kernels.plan_ops import AddOp, ConvOp, NormOp, Op, PoolOp, ReluOp, Value, reads

MakeLayer = Callable[[Source], LayerModule]


class FusedNetwork(nn.Module):
    """The operations of a plan, one after another.

    Args:
        plan: Traced and fused; its weights are copied.
        make: Returns the module of one convolution or linear layer.
        choices: Layer → choice that its weights are masked by; layers not named are dense.
    """

    def __init__(self, plan: Plan, make: MakeLayer, choices: Mapping[str, Choice]) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList()
        self._numbers: dict[str, int] = {}
        for op in plan.convs:
            self._numbers[op.name] = len(self.layers)
            self.layers.append(make(source_of(op, choices.get(op.name, Dense()))))
        self._last = _last_reads(plan)

    def layer(self, name: str) -> LayerModule:
        """Return the module of one layer."""
        module = self.layers[self._numbers[name]]
        assert isinstance(module, LayerModule)
        return module

    @property
    def weight_bytes(self) -> int:
        """Bytes of all layers' weights."""
        return sum(self.layer(name).weight_bytes for name in self._numbers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output.

        Args:
            x: (N, C, H, W) or (N, I) in the layers' dtype, on their device.
        """
        batch = x.shape[0]
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        maps: dict[int, Tensor] = {self.plan.input.index: x}
        for position, op in enumerate(self.plan.ops):
            maps[op.out.index] = self._run(op, maps)
            for index in self._last.get(position, ()):
                del maps[index]
        return maps[self.plan.output.index].reshape(batch, *self.plan.output_shape)

    def _run(self, op: Op, maps: dict[int, Tensor]) -> Tensor:
        x = maps[op.x.index]
        match op:
            case ConvOp():
                residual = None if op.residual is None else maps[op.residual.index]
                return self._layer(op, x, residual)
            case AddOp():
                total = x + maps[op.y.index]
                return F.relu(total) if op.relu else total
            case ReluOp():
                return F.relu(x)
            case PoolOp(kind="global"):
                return F.adaptive_avg_pool2d(_as_map(x, op.x), 1)
            case PoolOp(kind="max"):
                return F.max_pool2d(_as_map(x, op.x), op.kernel, op.stride, op.padding)
            case PoolOp():
                return F.avg_pool2d(_as_map(x, op.x), op.kernel, op.stride, op.padding)
            case NormOp():
                raise AssertionError("a BatchNorm outlived the fusion")

    def _layer(self, op: ConvOp, x: Tensor, residual: Tensor | None) -> Tensor:
        if op.layer.op == "conv":
            return self.layer(op.name)(_as_map(x, op.x), residual)  # type: ignore[no-any-return]
        # A linear layer reads a flattened map in NCHW order; its plan's weight has been laid out for just that.
        rows = x.reshape(x.shape[0], -1)
        flat = None if residual is None else residual.reshape(x.shape[0], -1)
        return self.layer(op.name)(rows, flat)  # type: ignore[no-any-return]


def source_of(op: ConvOp, choice: Choice) -> Source:
    """Return a plan's layer as the kernels of a GPU take it."""
    bias = torch.zeros(op.layer.filters) if op.bias_K is None else op.bias_K
    return Source(op.layer, choice, op.weight_KCRS.reshape(op.layer.weight_shape), bias, op.relu)


def _as_map(x: Tensor, value: Value) -> Tensor:
    return x if x.dim() == 4 else x.reshape(x.shape[0], value.channels, value.height, value.width)


def _last_reads(plan: Plan) -> dict[int, list[int]]:
    """Return position → maps that no later operation reads; the output stays."""
    last = {value.index: at for at, op in enumerate(plan.ops) for value in (op.out, *reads(op))}
    dying: dict[int, list[int]] = {}
    for index, at in last.items():
        if index != plan.output.index:
            dying.setdefault(at, []).append(index)
    return dying


def activation_bytes(plan: Plan, batch: int, item_bytes: int) -> int:
    """Return the most bytes of maps that are alive at once while a batch passes, an output beside what it is made of.

    Every policy that keeps the layers' shapes has the same maps.
    """
    dying = _last_reads(plan)
    alive = {plan.input.index: plan.input}
    most = 0
    for position, op in enumerate(plan.ops):
        alive[op.out.index] = op.out
        most = max(most, sum(value.channels * value.height * value.width for value in alive.values()))
        for index in dying.get(position, ()):
            del alive[index]
    return batch * item_bytes * most
