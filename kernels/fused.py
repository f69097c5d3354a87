"""A planned network executed by PyTorch: each layer with bias, residual and ReLU in one module, maps channels last.

The plan is the one that a CPU's program is made of; here each of its operations is one call, so that a CUDA graph of
the whole network holds no more launches than the plan has operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.kernels.gpu_layers import LayerModule, Source
from autoprune.kernels.plan import Plan
from autoprune.kernels.plan_ops import AddOp, ConvOp, Op, PlanRefusal, PoolOp, ReluOp, Value, reads
from autoprune.kernels.triton.ops import ell_pad


class LayerFactory(Protocol):
    """Makes the modules of a network's layers, and knows which of them want borders around their maps."""

    def reads_halo(self, layer: LayerSpec, choice: Choice) -> bool:
        """Return whether the layer's kernel reads its padding from memory."""
        ...

    def writes_ring(self, layer: LayerSpec, choice: Choice) -> bool:
        """Return whether the layer can write that border around its output, at less than a copy costs."""
        ...

    def make(self, source: Source) -> LayerModule:
        """Return the module of one convolution or linear layer."""
        ...


class FusedNetwork(nn.Module):
    """The operations of a plan, one after another.

    A map that a sparse kernel reads is written with that reader's padding around it where its producer can; where it
    cannot, it is copied into its border.

    Args:
        plan: Traced and fused; its weights are copied.
        factory: Makes the layers.
        choices: Layer → choice that its weights are masked by; layers not named are dense.
    """

    def __init__(self, plan: Plan, factory: LayerFactory, choices: Mapping[str, Choice]) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList()
        self._numbers: dict[str, int] = {}
        self._rings: dict[int, tuple[int, int]] = {}
        chosen = {op.name: choices.get(op.name, Dense()) for op in plan.convs}
        wanted = _borders(plan, factory, chosen)
        for op in plan.convs:
            choice, ring = chosen[op.name], wanted.get(op.out.index, (0, 0))
            if ring != (0, 0) and factory.writes_ring(op.layer, choice):
                self._rings[op.out.index] = ring
        for op in plan.convs:
            choice = chosen[op.name]
            source = replace(
                source_of(op, choice),
                prepadded=max(op.shape.padding) > 0 and factory.reads_halo(op.layer, choice),
                ring=self._rings.get(op.out.index, (0, 0)),
            )
            self._numbers[op.name] = len(self.layers)
            self.layers.append(factory.make(source))
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
        return self._inner(maps, self.plan.output).reshape(batch, *self.plan.output_shape)

    def steps(self, x: Tensor) -> list[tuple[str, Callable[[], Tensor]]]:
        """Return each operation by name, as a call that repeats it on what it reads for an input; all maps stay alive.

        Args:
            x: As of ``forward``.
        """
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        maps: dict[int, Tensor] = {self.plan.input.index: x}
        found: list[tuple[str, Callable[[], Tensor]]] = []
        for op in self.plan.ops:
            found.append((op.name, partial(self._run, op, dict(maps))))
            maps[op.out.index] = self._run(op, maps)
        return found

    def _inner(self, maps: Mapping[int, Tensor], value: Value, halo: tuple[int, int] = (0, 0)) -> Tensor:
        """Return a map with ``halo`` of its border, which it has at least where a producer wrote one."""
        x = maps[value.index]
        rows, columns = self._rings.get(value.index, (0, 0))
        if (rows, columns) == (0, 0):
            return x if halo == (0, 0) else ell_pad(x, list(halo))
        rows, columns = rows - halo[0], columns - halo[1]
        return x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]

    def _run(self, op: Op, maps: Mapping[int, Tensor]) -> Tensor:
        if isinstance(op, ConvOp):
            return self._layer(op, maps)
        x = self._inner(maps, op.x)
        match op:
            case AddOp():
                total = x + self._inner(maps, op.y)
                return F.relu(total) if op.relu else total
            case ReluOp():
                return F.relu(x)
            case PoolOp(kind="global"):
                return F.adaptive_avg_pool2d(_as_map(x, op.x), 1)
            case PoolOp(kind="max"):
                return F.max_pool2d(_as_map(x, op.x), op.kernel, op.stride, op.padding)
            case PoolOp():
                return F.avg_pool2d(_as_map(x, op.x), op.kernel, op.stride, op.padding)
            case _:
                raise AssertionError(f"'{op.name}' has no form here: see refusal_of")

    def _layer(self, op: ConvOp, maps: Mapping[int, Tensor]) -> Tensor:
        module = self.layer(op.name)
        x = self._inner(maps, op.x, module.halo)
        residual = None if op.residual is None else self._inner(maps, op.residual)
        if op.layer.op == "conv":
            y: Tensor = module(_as_map(x, op.x) if module.halo == (0, 0) else x, residual)
            return y
        # A linear layer reads a map flattened in the order C, H, W, whatever its memory.
        y = module(x.reshape(x.shape[0], -1), None if residual is None else residual.reshape(x.shape[0], -1))
        return y


def refusal_of(plan: Plan) -> PlanRefusal | None:
    """Return the first operation of a plan that only the CPU's programs have; None where there is none."""
    for op in plan.ops:
        plain = isinstance(op, ConvOp | AddOp | ReluOp | PoolOp)
        cut = isinstance(op, ConvOp | AddOp | ReluOp) and math.isfinite(op.cap)
        if isinstance(op, ConvOp) and (op.shape.groups != 1 or max(op.extra) > 0):
            return PlanRefusal(op.name, f"groups={op.shape.groups} or unequal padding, which only a CPU's plan has")
        if not plain or cut or (isinstance(op, PoolOp) and not _same_pool(op)):
            return PlanRefusal(op.name, f"{type(op).__name__} with its settings, which only a CPU's plan has")
    return None


def _same_pool(op: PoolOp) -> bool:
    """Return whether PyTorch's pooling without further settings gives the same."""
    if op.kind == "global":
        return True
    sizes = zip((op.x.height, op.x.width), (op.out.height, op.out.width), strict=True)
    whole = all((length + 2 * op.padding - op.kernel) // op.stride + 1 == out for length, out in sizes)
    return whole and not (op.inside and op.padding > 0)


def _borders(plan: Plan, factory: LayerFactory, chosen: Mapping[str, Choice]) -> dict[int, tuple[int, int]]:
    """Return map → the widest padding that a kernel reads from memory around it."""
    wanted: dict[int, tuple[int, int]] = {}
    for op in plan.convs:
        rows, columns = op.shape.padding
        if max(rows, columns) > 0 and factory.reads_halo(op.layer, chosen[op.name]):
            before = wanted.get(op.x.index, (0, 0))
            wanted[op.x.index] = (max(before[0], rows), max(before[1], columns))
    return wanted


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
