"""From a recorded PyTorch model to plan operations: one rule per operation.

Whatever has no rule here raises ``Refused`` with the operation's name; nothing is approximated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.rows import Curve
from autoprune.kernels.cpu.shapes import LANES
from autoprune.kernels.plan_ops import (
    AddOp,
    CatOp,
    ConvOp,
    CurveOp,
    MulOp,
    NormOp,
    Op,
    PoolOp,
    Refused,
    ReluOp,
    Value,
    layer_spec,
    norm_terms,
)
from autoprune.kernels.plan_record import record

_IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
_RELU_CALLS: set[object] = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
_ADD_CALLS: set[object] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MUL_CALLS: set[object] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CAT_CALLS: set[object] = {torch.cat, torch.concat}
_FLATTEN_CALLS: set[object] = {
    torch.flatten, "flatten", "view", "reshape", "squeeze", torch.squeeze, torch.reshape,
}
_IN_PLACE: set[object] = {operator.iadd, operator.imul, torch.relu_, F.relu_, "relu_", "add_", "mul_", "sigmoid_"}
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
}
_Rule = Callable[[str, fx.Node, nn.Module], Op]
# Arguments of the pooling functions that a plan has only with these values.
_PLAIN: dict[str, object] = {
    "dilation": 1,
    "return_indices": False,
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
    return _Lowering(model, *record(model, example)).lower()


@dataclass(frozen=True, slots=True)
class _PoolFacts:
    """A pooling: its kind, (window, stride, padding), whether means count padding, ceil mode, nothing else unusual."""

    kind: str
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    counted: bool
    ceil: bool
    plain: bool


class _Lowering:
    """Turns nodes into operations; ``values`` maps each node to the map it stands for."""

    def __init__(self, model: nn.Module, module: fx.GraphModule, results: dict[fx.Node, object]) -> None:
        self.model = model
        self.module = module
        self.results = results
        self.values: dict[fx.Node, Value] = {}
        # Zeros around a map that its readers must add: (left, right, top, bottom).
        self.borders: dict[fx.Node, tuple[int, int, int, int]] = {}
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
        elif node.op in ("call_function", "call_method") and isinstance(self.results.get(node), Tensor):
            self._lower_call(node)
        # Sizes and other numbers are taken from the recorded run where a rule needs them; a tensor of the model that is
        # read directly is taken only by the rules that know it as a weight.

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

    def _input(self, node: fx.Node, position: int = 0, *, bordered: bool = False) -> Value:
        source = node.args[position] if len(node.args) > position else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or source not in self.values:
            name = getattr(node.target, "__name__", node.target)
            raise Refused(node.name, f"{name} on something that is not a feature map")
        if source in self.borders and not bordered:
            raise Refused(node.name, "zeros around a map that is not read by a convolution")
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

    def _conv(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        assert isinstance(module, nn.Conv2d)
        if module.padding_mode != "zeros":
            raise Refused(name, f"padding {module.padding!r} in mode '{module.padding_mode}'")
        x, out = self._input(node, bordered=True), self._new_value(node)
        layer = layer_spec(name, module, (1, x.channels, x.height, x.width), (1, out.channels, out.height, out.width))
        sides = tuple(int(side) for side in module._reversed_padding_repeated_twice)
        # The code of a class of its own may have padded the map, and hand zero to the convolution.
        if node.op != "call_module":
            rows, columns = _pair(self._argument(node, 4, "padding", 0))
            sides = (columns, columns, rows, rows)
        border = self.borders.get(self._source(node), (0, 0, 0, 0))
        left, right, top, bottom = (own + more for own, more in zip(sides, border, strict=True))
        if right < left or bottom < top:
            raise Refused(name, f"padding of {left} left and {right} right, {top} above and {bottom} below")
        shape = replace(layer, padding=(top, left))
        extra = (bottom - top, right - left)
        return ConvOp(name, layer, shape, _weights(module.weight), _bias(module.bias), x, out, extra=extra)

    def _source(self, node: fx.Node) -> fx.Node:
        source = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(source, fx.Node)
        return source

    def _conv_call(self, node: fx.Node) -> Op:
        """A convolution as a function of a layer's own weight: what classes derived from ``Conv2d`` do."""
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise Refused(node.name, "a convolution by a weight that is computed")
        name, _, last = str(weight.target).rpartition(".")
        module = self.model.get_submodule(name)
        if last != "weight" or not isinstance(module, nn.Conv2d):
            raise Refused(node.name, "a convolution by a weight that is no layer's own")
        settings = (
            _pair(self._argument(node, 3, "stride", 1)), _pair(self._argument(node, 5, "dilation", 1)),
            self._argument(node, 6, "groups", 1), self._argument(node, 2, "bias"),
        )
        padding = self._argument(node, 4, "padding", 0)
        if settings[:3] != (module.stride, module.dilation, module.groups) or isinstance(padding, str):
            raise Refused(node.name, "a convolution by other settings than its layer's")
        if settings[3] is not module.bias:
            raise Refused(node.name, "a convolution with a bias that is not its layer's")
        return self._conv(name, node, module)

    def _norm_call(self, node: fx.Node) -> Op:
        """An inference BatchNorm as a function."""
        mean, variance, weight, bias = (
            self._argument(node, at, key) for at, key in enumerate(("running_mean", "running_var", "weight", "bias"), 1)
        )
        known = isinstance(mean, Tensor) and isinstance(variance, Tensor)
        if self._argument(node, 5, "training", False) or not known:
            raise Refused(node.name, "a BatchNorm that normalises by the batch's own statistics")
        eps = self._argument(node, 7, "eps", 1e-5)
        assert isinstance(eps, float)
        assert isinstance(mean, Tensor)
        assert isinstance(variance, Tensor)
        scale = (variance.double() + eps).rsqrt()
        scale = scale * weight.detach().double() if isinstance(weight, Tensor) else scale
        shift = -mean.double() * scale
        shift = shift + bias.detach().double() if isinstance(bias, Tensor) else shift
        return NormOp(node.name, scale, shift, self._input(node), self._new_value(node))

    def _border(self, node: fx.Node, sides: Sequence[int]) -> None:
        """Zeros around a map, added by the convolution that reads it."""
        value, whole = self._input(node, bordered=True), [int(side) for side in sides]
        if len(whole) != 4 or min(whole) < 0:
            raise Refused(node.name, f"padding by {whole}")
        before = self.borders.get(self._source(node), (0, 0, 0, 0))
        left, right, top, bottom = (a + b for a, b in zip(before, whole, strict=True))
        self.values[node] = value
        if max(left, right, top, bottom) > 0:
            self.borders[node] = (left, right, top, bottom)

    def _relu_module(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        cap = math.inf
        if isinstance(module, nn.Hardtanh):
            if module.min_val != 0:
                raise Refused(name, f"a Hardtanh from {module.min_val}")
            cap = float(module.max_val)
        return ReluOp(name, self._input(node), self._new_value(node), cap)

    def _curve_module(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        curve = next(curve for kind, curve in _CURVE_MODULES.items() if isinstance(module, kind))
        return CurveOp(name, curve, self._input(node), self._new_value(node))

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
        plain = not getattr(module, "divisor_override", None) and _pair(getattr(module, "dilation", 1)) == (1, 1)
        sizes = (_pair(module.kernel_size), _pair(module.stride), _pair(module.padding))
        counted = bool(getattr(module, "count_include_pad", True))
        return self._pool(name, node, _PoolFacts(kind, sizes, counted, bool(module.ceil_mode), plain))

    def _lower_call(self, node: fx.Node) -> None:
        target = node.target
        rules: list[tuple[Collection[object], Callable[[fx.Node], Op]]] = [
            (_RELU_CALLS, lambda node: ReluOp(node.name, self._input(node), self._new_value(node))),
            ((F.relu6,), lambda node: ReluOp(node.name, self._input(node), self._new_value(node), 6.0)),
            ((F.hardtanh,), self._hardtanh),
            (_CURVE_CALLS, lambda node: CurveOp(
                node.name, _CURVE_CALLS[node.target], self._input(node), self._new_value(node))),
            (_ADD_CALLS, self._add),
            (_MUL_CALLS, self._multiply),
            (_CAT_CALLS, self._concatenate),
            ((F.conv2d, torch.conv2d), self._conv_call),
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

    def _pad(self, node: fx.Node) -> None:
        sides, mode = self._argument(node, 1, "pad"), self._argument(node, 2, "mode", "constant")
        if mode != "constant" or self._argument(node, 3, "value") not in (None, 0, 0.0):
            raise Refused(node.name, f"padding in mode '{mode}' or with other values than zero")
        assert isinstance(sides, list | tuple)
        resolved = [self.results[side] if isinstance(side, fx.Node) else side for side in sides]
        if not all(isinstance(side, int) for side in resolved):
            raise Refused(node.name, "padding by sizes that are not whole numbers")
        self._border(node, [side for side in resolved if isinstance(side, int)])

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
        counted, ceil = bool(node.kwargs.get("count_include_pad", True)), bool(node.kwargs.get("ceil_mode", False))
        return self._pool(node.name, node, _PoolFacts(kind, (window, stride, padding), counted, ceil, plain))

    def _pool(self, name: str, node: fx.Node, facts: _PoolFacts) -> Op:
        window, stride, padding = facts.sizes
        x, out = self._input(node), self._new_value(node)
        if not facts.plain:
            raise Refused(name, "pooling with a dilation or its own divisor")
        if facts.kind == "avg" and window == (x.height, x.width) and padding == (0, 0):
            return PoolOp(name, "global", x, out)
        if any(first != second for first, second in facts.sizes):
            raise Refused(name, f"pooling windows that are not square ({window[0]}x{window[1]})")
        inside = not facts.counted or padding == (0, 0)
        if facts.ceil and facts.kind == "avg" and not inside:
            raise Refused(name, "average pooling in ceil mode that counts its padding")
        kind: Literal["avg", "max"] = "avg" if facts.kind == "avg" else "max"
        return PoolOp(name, kind, x, out, window[0], stride[0], padding[0], inside)


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
