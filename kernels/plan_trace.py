"""From a recorded PyTorch model to plan operations: one rule per operation.

Whatever has no rule here raises ``Refused`` with the operation's name; nothing is approximated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autoprune.core.layers import LayerSpec
from autoprune.kernels.plan_ops import (
    AddOp,
    ConvOp,
    NormOp,
    Op,
    PoolOp,
    Refused,
    ReluOp,
    Value,
    layer_spec,
    norm_terms,
    padding_of,
)
from autoprune.kernels.plan_record import record

_IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
_RELU_CALLS: set[object] = {F.relu, torch.relu, torch.relu_, F.relu_}
_ADD_CALLS: set[object] = {operator.add, operator.iadd, torch.add}
_IN_PLACE: set[object] = {operator.iadd, torch.relu_, F.relu_, "relu_", "add_"}
_Rule = Callable[[str, fx.Node, nn.Module], Op]
# Arguments of the pooling functions that a plan has only with these values.
_PLAIN: dict[str, object] = {
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
    "count_include_pad": True,
    "divisor_override": None,
}


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
    return _Lowering(*record(model, example)).lower()


class _Lowering:
    """Turns nodes into operations; ``values`` maps each node to the map it stands for."""

    def __init__(self, module: fx.GraphModule, results: dict[fx.Node, object]) -> None:
        self.module = module
        self.results = results
        self.values: dict[fx.Node, Value] = {}
        self.ops: list[Op] = []
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}

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
        elif node.op in ("call_function", "call_method"):
            if isinstance(self.results.get(node), Tensor):
                self._lower_call(node)
            # Sizes and other numbers were taken from the recorded run where a rule needs them.
        elif node.op != "output":
            raise Refused(node.name, f"it reads a tensor of the model directly ({node.target})")

    def _tensor(self, node: fx.Node) -> Tensor:
        result = self.results[node]
        if not isinstance(result, Tensor):
            raise Refused(node.name, f"it returns a {type(result).__name__}, not a tensor")
        return result

    def _new_value(self, node: fx.Node) -> Value:
        shape = self._tensor(node).shape
        if len(shape) not in (2, 4):
            raise Refused(node.name, f"a tensor of {len(shape)} dimensions; a plan has maps (N, C, H, W) and vectors")
        height, width = (int(shape[2]), int(shape[3])) if len(shape) == 4 else (1, 1)
        return Value(self.order[node], int(shape[1]), height, width)

    def _input(self, node: fx.Node, position: int = 0) -> Value:
        source = node.args[position] if len(node.args) > position else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or source not in self.values:
            raise Refused(node.name, f"{node.target} on something that is not a feature map")
        in_place = node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
        if node.op == "call_module":
            in_place = bool(getattr(self.module.get_submodule(str(node.target)), "inplace", False))
        if in_place and position == 0 and any(self.order[user] > self.order[node] for user in source.users):
            raise Refused(node.name, "it changes in place a tensor that is read again later")
        return self.values[source]

    def _argument(self, node: fx.Node, position: int, name: str, default: object = None) -> object:
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        return self.results[value] if isinstance(value, fx.Node) else value

    def _lower_module(self, node: fx.Node, module: nn.Module) -> None:
        name = str(node.target)
        if isinstance(module, _IDENTITY_MODULES):
            self.values[node] = self._input(node)
            return
        if isinstance(module, nn.Flatten):
            self._flatten(node)
            return
        rules: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], _Rule]] = [
            (nn.Conv2d, self._conv),
            (nn.Linear, self._linear),
            ((nn.BatchNorm1d, nn.BatchNorm2d), self._norm),
            (nn.ReLU, lambda name, node, _: ReluOp(name, self._input(node), self._new_value(node))),
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

    def _conv(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        assert isinstance(module, nn.Conv2d)
        if module.groups != 1:
            raise Refused(name, f"a grouped convolution (groups={module.groups})")
        if padding_of(module) is None or module.padding_mode != "zeros":
            raise Refused(name, f"padding {module.padding!r} in mode '{module.padding_mode}'")
        x, out = self._input(node), self._new_value(node)
        layer = layer_spec(name, module, (1, x.channels, x.height, x.width), (1, out.channels, out.height, out.width))
        return ConvOp(name, layer, layer, _weights(module.weight), _bias(module.bias), x, out)

    def _linear(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        assert isinstance(module, nn.Linear)
        x, out = self._input(node), self._new_value(node)
        if self._tensor(node).dim() != 2:
            raise Refused(name, "a linear layer on more than vectors")
        layer = layer_spec(name, module, (1, module.in_features), (1, module.out_features))
        # A linear on a flattened C × H × W map is a convolution whose window is the whole map.
        weight = _weights(module.weight).reshape(module.out_features, x.channels, x.height, x.width)
        shape = linear_shape(layer, (x.height, x.width))
        return ConvOp(name, layer, shape, weight, _bias(module.bias), x, out)

    def _norm(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        scale, shift = norm_terms(module)
        return NormOp(name, scale, shift, self._input(node), self._new_value(node))

    def _pool_module(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        assert isinstance(module, nn.MaxPool2d | nn.AvgPool2d)
        kind = "max" if isinstance(module, nn.MaxPool2d) else "avg"
        counted = bool(getattr(module, "count_include_pad", True)) and not getattr(module, "divisor_override", None)
        odd = module.ceil_mode or _pair(getattr(module, "dilation", 1)) != (1, 1)
        sizes = (_pair(module.kernel_size), _pair(module.stride), _pair(module.padding))
        return self._pool(name, node, kind, sizes, plain=counted and not odd)

    def _lower_call(self, node: fx.Node) -> None:
        target = node.target
        if target in _RELU_CALLS or target in ("relu", "relu_"):
            self._emit(node, ReluOp(node.name, self._input(node), self._new_value(node)))
        elif target in _ADD_CALLS or target in ("add", "add_"):
            self._emit(node, self._add(node))
        elif target in (torch.flatten, "flatten", "view", "reshape", "squeeze", torch.squeeze, torch.reshape):
            self._flatten(node)
        elif target in (F.dropout, F.dropout2d) or target in ("contiguous", "clone", "detach"):
            if target in (F.dropout, F.dropout2d) and self._argument(node, 2, "training", True):
                raise Refused(node.name, "dropout that stays on in eval mode")
            self.values[node] = self._input(node)
        elif target in (F.adaptive_avg_pool2d, "mean", torch.mean):
            self._emit(node, self._adaptive(node.name, node))
        elif target in (F.avg_pool2d, F.max_pool2d, torch.max_pool2d):
            self._emit(node, self._pool_call(node))
        else:
            raise Refused(node.name, f"{getattr(target, '__name__', target)} has no rule in the plan")

    def _add(self, node: fx.Node) -> Op:
        if len(node.args) != 2 or node.kwargs:
            raise Refused(node.name, "a sum with more than its two operands")
        x, y, out = self._input(node, 0), self._input(node, 1), self._new_value(node)
        if (x.channels, x.height, x.width) != (y.channels, y.height, y.width):
            raise Refused(node.name, "a sum that broadcasts one operand")
        return AddOp(node.name, x, y, out)

    def _flatten(self, node: fx.Node) -> None:
        value, shape = self._input(node), self._tensor(node).shape
        whole = value.channels * value.height * value.width
        if len(shape) != 2 or int(shape[1]) != whole:
            raise Refused(node.name, "a reshape other than flattening each sample")
        self.values[node] = value

    def _adaptive(self, name: str, node: fx.Node) -> Op:
        """Adaptive average pooling, or a mean over rows and columns."""
        value, result = self._input(node), self._tensor(node)
        if node.target in ("mean", torch.mean):
            dims = self._argument(node, 1, "dim")
            if not isinstance(dims, list | tuple) or {int(dim) % 4 for dim in dims} != {2, 3} or result.dim() < 2:
                raise Refused(name, "a mean over other dimensions than rows and columns")
            return PoolOp(name, "global", value, Value(self.order[node], value.channels, 1, 1))
        out = self._new_value(node)
        if (out.height, out.width) == (1, 1):
            return PoolOp(name, "global", value, out)
        if value.height % out.height or value.width % out.width:
            raise Refused(name, f"adaptive pooling of {value.height}x{value.width} to {out.height}x{out.width}")
        rows, columns = value.height // out.height, value.width // out.width
        if rows != columns:
            raise Refused(name, f"pooling windows that are not square ({rows}x{columns})")
        return PoolOp(name, "avg", value, out, rows, rows)

    def _pool_call(self, node: fx.Node) -> Op:
        kind = "avg" if node.target is F.avg_pool2d else "max"
        window = _pair(self._argument(node, 1, "kernel_size"))
        stride = _pair(self._argument(node, 2, "stride") or window)
        padding = _pair(self._argument(node, 3, "padding", 0))
        plain = len(node.args) <= 4 and all(node.kwargs.get(name, value) == value for name, value in _PLAIN.items())
        return self._pool(node.name, node, kind, (window, stride, padding), plain=plain)

    def _pool(self, name: str, node: fx.Node, kind: str, sizes: tuple[tuple[int, int], ...], *, plain: bool) -> Op:
        if not plain:
            raise Refused(name, "pooling with a dilation, ceil mode or its own divisor")
        window, stride, padding = sizes
        x, out = self._input(node), self._new_value(node)
        if kind == "avg" and window == (x.height, x.width) and padding == (0, 0):
            return PoolOp(name, "global", x, out)
        if any(first != second for first, second in sizes):
            raise Refused(name, f"pooling windows that are not square ({window[0]}x{window[1]})")
        return PoolOp(name, "avg" if kind == "avg" else "max", x, out, window[0], stride[0], padding[0])


def linear_shape(layer: LayerSpec, map_hw: tuple[int, int]) -> LayerSpec:
    """Return a linear layer as the convolution that covers a whole ``map_hw`` map."""
    channels = layer.weight_shape[1] // math.prod(map_hw)
    shape = (layer.filters, channels, *map_hw)
    return replace(layer, op="conv", weight_shape=shape, input_hw=map_hw, output_hw=(1, 1))


def _weights(weight: Tensor) -> Tensor:
    # A copy: the model may train on.
    return weight.detach().to(torch.float32, copy=True).contiguous()


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _weights(bias)


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, tuple | list):
        items = [int(item) for item in value]
        return (items[0], items[-1])
    assert isinstance(value, int)
    return (value, value)
