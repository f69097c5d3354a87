"""From a recorded PyTorch model to plan operations: one rule per operation.

Whatever has no rule here raises ``Refused`` with the operation's name; nothing is approximated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autoprune.kernels.cpu.rows import Curve
from autoprune.kernels.cpu.shapes import LANES
from autoprune.kernels.plan_layers import LayerRules, linear_shape
from autoprune.kernels.plan_ops import (
    AddOp,
    CatOp,
    ConvOp,
    CurveOp,
    MulOp,
    Op,
    Refused,
    ReluOp,
    Value,
)
from autoprune.kernels.plan_pools import PoolRules
from autoprune.kernels.plan_record import record

__all__ = ["Traced", "linear_shape", "trace_ops"]

_IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
_RELU_CALLS: set[object] = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
_ADD_CALLS: set[object] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MUL_CALLS: set[object] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CAT_CALLS: set[object] = {torch.cat, torch.concat}
_FLATTEN_CALLS: set[object] = {
    torch.flatten, "flatten", "view", "reshape", "squeeze", torch.squeeze, torch.reshape,
}
_CURVE_CALLS: dict[object, Curve] = {
    F.hardswish: Curve.HARDSWISH,
    F.hardsigmoid: Curve.HARDSIGMOID,
    F.silu: Curve.SILU,
    F.sigmoid: Curve.SIGMOID,
    torch.sigmoid: Curve.SIGMOID,
    "sigmoid": Curve.SIGMOID,
    "sigmoid_": Curve.SIGMOID,
}
_CURVE_MODULES: dict[type[nn.Module], Curve] = {
    nn.Hardswish: Curve.HARDSWISH,
    nn.Hardsigmoid: Curve.HARDSIGMOID,
    nn.SiLU: Curve.SILU,
    nn.Sigmoid: Curve.SIGMOID,
    nn.LeakyReLU: Curve.LEAKY,
}
_Rule = Callable[[str, fx.Node, nn.Module], Op]


@dataclass(frozen=True, slots=True)
class Traced:
    """A model as unfused operations.

    Attributes:
        ops: In order of execution, each output written once.
        input, output: First and last map.
        output_shape: Shape of the model's output, batch left out.
    """

    ops: tuple[Op, ...]
    input: Value
    output: Value
    output_shape: tuple[int, ...]


def trace_ops(model: nn.Module, example: Tensor) -> Traced:
    """Return the operations of an eval-mode model.

    Args:
        model: Not modified.
        example: (N, C, H, W) float32.
    Raises:
        Refused: Naming the first operation without a rule.
    """
    return _Lowering(model, *record(model, example)).lower()


class _Lowering(LayerRules, PoolRules):
    """Turns nodes into operations, in their order."""

    def lower(self) -> Traced:
        inputs = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        outputs = [node for node in self.module.graph.nodes if node.op == "output"]
        used = [node for node in inputs if node.users]
        if len(used) != 1:
            raise Refused("forward", f"it takes {len(used)} inputs; a plan has one")
        for node in self.module.graph.nodes:
            self._lower_node(node)
        result = outputs[0].args[0]
        if not isinstance(result, fx.Node) or result not in self.values:
            raise Refused("output", "the model must return one tensor computed from its input")
        if not any(isinstance(op, ConvOp) for op in self.ops):
            raise Refused("forward", "the model has no convolution or linear layer")
        shape = tuple(int(size) for size in self._tensor(result).shape[1:])
        return Traced(tuple(self.ops), self.values[used[0]], self.values[result], shape)

    def _lower_node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.users:
                self.values[node] = self._new_value(node)
        elif node.op == "call_module":
            self._lower_module(node, self.module.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method") and isinstance(self.results.get(node), Tensor):
            self._lower_call(node)

    def _lower_module(self, node: fx.Node, module: nn.Module) -> None:
        name = str(node.target)
        if isinstance(module, _IDENTITY_MODULES):
            self.values[node] = self._input(node)
            return
        if isinstance(module, nn.Flatten):
            self._flatten(node)
            return
        if isinstance(module, nn.ZeroPad2d):
            self._border(node, module.padding)
            return
        rules: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], _Rule]] = [
            (nn.Conv2d, self._conv),
            (nn.Linear, self._linear),
            ((nn.BatchNorm1d, nn.BatchNorm2d), self._norm),
            ((nn.ReLU, nn.Hardtanh), self._relu_module),
            (tuple(_CURVE_MODULES), self._curve_module),
            ((nn.MaxPool2d, nn.AvgPool2d), self._pool_module),
            (nn.AdaptiveAvgPool2d, lambda name, node, _: self._adaptive(name, node)),
        ]
        for kinds, rule in rules:
            if isinstance(module, kinds):
                self._emit(node, rule(name, node, module))
                return
        raise Refused(name, f"{type(module).__name__} has no rule in the plan")

    def _emit(self, node: fx.Node, op: Op) -> None:
        if isinstance(op, ConvOp) and any(isinstance(other, ConvOp) and other.name == op.name for other in self.ops):
            raise Refused(op.name, "the layer runs more than once in a pass")
        self.values[node] = op.out
        self.ops.append(op)

    def _relu_module(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        cap = math.inf
        if isinstance(module, nn.Hardtanh):
            if module.min_val != 0:
                raise Refused(name, f"a Hardtanh from {module.min_val}")
            cap = float(module.max_val)
        return ReluOp(name, self._input(node), self._new_value(node), cap)

    def _curve_module(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        curve = next(curve for kind, curve in _CURVE_MODULES.items() if isinstance(module, kind))
        slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0
        return CurveOp(name, curve, self._input(node), self._new_value(node), slope)

    def _leaky(self, node: fx.Node) -> Op:
        slope = self._argument(node, 1, "negative_slope", 0.01)
        if not isinstance(slope, int | float):
            raise Refused(node.name, "a slope that is computed")
        return CurveOp(node.name, Curve.LEAKY, self._input(node), self._new_value(node), float(slope))

    def _lower_call(self, node: fx.Node) -> None:
        target = node.target
        rules: list[tuple[Collection[object], Callable[[fx.Node], Op]]] = [
            (_RELU_CALLS, lambda node: ReluOp(node.name, self._input(node), self._new_value(node))),
            ((F.relu6,), lambda node: ReluOp(node.name, self._input(node), self._new_value(node), 6.0)),
            ((F.hardtanh,), self._hardtanh),
            ((F.leaky_relu,), self._leaky),
            (_CURVE_CALLS, lambda node: CurveOp(
                node.name, _CURVE_CALLS[node.target], self._input(node), self._new_value(node))),
            (_ADD_CALLS, self._add),
            (_MUL_CALLS, self._multiply),
            (_CAT_CALLS, self._concatenate),
            ((F.conv2d, torch.conv2d), self._conv_call),
            ((F.linear,), self._linear_call),
            ((F.batch_norm, torch.batch_norm), self._norm_call),
            ((F.adaptive_avg_pool2d, "mean", torch.mean), lambda node: self._adaptive(node.name, node)),
            ((F.avg_pool2d, F.max_pool2d, torch.max_pool2d), self._pool_call),
        ]
        for targets, rule in rules:
            if target in targets:
                self._emit(node, rule(node))
                return
        self._lower_identity(node)

    def _lower_identity(self, node: fx.Node) -> None:
        """Calls that move nothing in a program's memory."""
        target = node.target
        name = str(getattr(target, "__name__", target))
        if target in _FLATTEN_CALLS:
            self._flatten(node)
        elif target is F.pad:
            self._pad(node)
        elif target in (F.dropout, F.dropout2d) or name in ("contiguous", "clone", "detach", "stochastic_depth"):
            place = {"stochastic_depth": 3}.get(name, 2)
            if name in ("dropout", "dropout2d", "stochastic_depth") and self._argument(node, place, "training", True):
                raise Refused(node.name, f"{name} that stays on in eval mode")
            self.values[node] = self._input(node)
        else:
            raise Refused(node.name, f"{name} has no rule in the plan")

    def _hardtanh(self, node: fx.Node) -> Op:
        low, high = self._argument(node, 1, "min_val", -1.0), self._argument(node, 2, "max_val", 1.0)
        if low != 0 or not isinstance(high, int | float):
            raise Refused(node.name, f"a Hardtanh from {low}")
        return ReluOp(node.name, self._input(node), self._new_value(node), float(high))

    def _multiply(self, node: fx.Node) -> Op:
        if len(node.args) != 2 or node.kwargs:
            raise Refused(node.name, "a product with more than its two operands")
        x, y, out = self._input(node, 0), self._input(node, 1), self._new_value(node)
        if (x.height, x.width) == (1, 1) and (y.height, y.width) != (1, 1):
            x, y = y, x
        if x.channels != y.channels or (y.height, y.width) not in ((1, 1), (x.height, x.width)):
            raise Refused(node.name, "a product that broadcasts over channels")
        if any(self._tensor(arg).dim() != self._tensor(node).dim() for arg in node.args if isinstance(arg, fx.Node)):
            raise Refused(node.name, "a product of maps of unlike dimensions")
        return MulOp(node.name, x, y, out)

    def _concatenate(self, node: fx.Node) -> Op:
        parts, dim = node.args[0] if node.args else node.kwargs.get("tensors"), self._argument(node, 1, "dim", 0)
        if not isinstance(parts, list | tuple) or dim not in (1, 1 - self._tensor(node).dim()):
            raise Refused(node.name, "a concatenation of something else than channels")
        if any(part not in self.values or part in self.borders for part in parts):
            raise Refused(node.name, "a concatenation of something that is not a feature map")
        values = tuple(self.values[part] for part in parts if isinstance(part, fx.Node))
        odd = next((value.channels for value in values[:-1] if value.channels % LANES), None)
        if odd is not None:
            raise Refused(node.name, f"a concatenation behind {odd} channels, not a multiple of {LANES}")
        return CatOp(node.name, values, self._new_value(node))

    def _add(self, node: fx.Node) -> Op:
        if len(node.args) != 2 or node.kwargs:
            raise Refused(node.name, "a sum with more than its two operands")
        x, y, out = self._input(node, 0), self._input(node, 1), self._new_value(node)
        if (x.channels, x.height, x.width) != (y.channels, y.height, y.width):
            raise Refused(node.name, "a sum that broadcasts one operand")
        return AddOp(node.name, x, y, out)
