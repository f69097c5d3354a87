"""What the rules of a plan know of a recorded model: its nodes, their results, and the maps they stand for."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autoprune.kernels.plan_ops import Op, Refused, Value

_IN_PLACE: set[object] = {operator.iadd, operator.imul, torch.relu_, F.relu_, "relu_", "add_", "mul_", "sigmoid_"}


class Nodes:
    """A recorded model; ``values`` maps each node to the map it stands for."""

    def __init__(self, model: nn.Module, module: fx.GraphModule, results: dict[fx.Node, object]) -> None:
        self.model = model
        self.module = module
        self.results = results
        self.values: dict[fx.Node, Value] = {}
        # Zeros around a map that its readers must add: (left, right, top, bottom).
        self.borders: dict[fx.Node, tuple[int, int, int, int]] = {}
        self.ops: list[Op] = []
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}

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

    def _source(self, node: fx.Node) -> fx.Node:
        source = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(source, fx.Node)
        return source

    def _argument(self, node: fx.Node, position: int, name: str, default: object = None) -> object:
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        return self.results[value] if isinstance(value, fx.Node) else value

    def _flatten(self, node: fx.Node) -> None:
        value, shape = self._input(node), self._tensor(node).shape
        whole = value.channels * value.height * value.width
        if len(shape) != 2 or int(shape[1]) != whole:
            raise Refused(node.name, "a reshape other than flattening each sample")
        self.values[node] = value


def pair(value: object) -> tuple[int, int]:
    if isinstance(value, tuple | list):
        items = [int(item) for item in value]
        return (items[0], items[-1])
    assert isinstance(value, int)
    return (value, value)
