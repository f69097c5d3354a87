"""Rules for pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from autoprune.kernels.plan_nodes import Nodes, pair
from autoprune.kernels.plan_ops import Op, PoolOp, Refused, Value

# Arguments of the pooling functions that a plan has only with these values.
_PLAIN: dict[str, object] = {
    "dilation": 1,
    "return_indices": False,
    "divisor_override": None,
}


@dataclass(frozen=True, slots=True)
class _PoolFacts:
    """A pooling: its kind, (window, stride, padding), whether means count padding, ceil mode, nothing else unusual."""

    kind: str
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    counted: bool
    ceil: bool
    plain: bool


class PoolRules(Nodes):
    """How pooling becomes operations."""

    def _pool_module(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        assert isinstance(module, nn.MaxPool2d | nn.AvgPool2d)
        kind = "max" if isinstance(module, nn.MaxPool2d) else "avg"
        plain = not getattr(module, "divisor_override", None) and pair(getattr(module, "dilation", 1)) == (1, 1)
        sizes = (pair(module.kernel_size), pair(module.stride), pair(module.padding))
        counted = bool(getattr(module, "count_include_pad", True))
        return self._pool(name, node, _PoolFacts(kind, sizes, counted, bool(module.ceil_mode), plain))

    def _pool_call(self, node: fx.Node) -> Op:
        kind = "avg" if node.target is F.avg_pool2d else "max"
        window = pair(self._argument(node, 1, "kernel_size"))
        stride = pair(self._argument(node, 2, "stride") or window)
        padding = pair(self._argument(node, 3, "padding", 0))
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
