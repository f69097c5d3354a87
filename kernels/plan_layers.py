"""Rules for layers with weights: convolutions, linear layers, BatchNorms, and the zeros around their maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from autoprune.core.layers import LayerSpec
from autoprune.kernels.plan_nodes import Nodes, pair
from autoprune.kernels.plan_ops import ConvOp, NormOp, Op, Refused, layer_spec, norm_terms


class LayerRules(Nodes):
    """How layers become operations."""

    def _conv(self, name: str, node: fx.Node, module: nn.Module) -> Op:
        assert isinstance(module, nn.Conv2d)
        if module.padding_mode != "zeros":
            raise Refused(name, f"padding {module.padding!r} in mode '{module.padding_mode}'")
        x, out = self._input(node, bordered=True), self._new_value(node)
        layer = layer_spec(name, module, (1, x.channels, x.height, x.width), (1, out.channels, out.height, out.width))
        sides = tuple(int(side) for side in module._reversed_padding_repeated_twice)
        # The code of a class of its own may have padded the map, and hand zero to the convolution.
        if node.op != "call_module":
            rows, columns = pair(self._argument(node, 4, "padding", 0))
            sides = (columns, columns, rows, rows)
        border = self.borders.get(self._source(node), (0, 0, 0, 0))
        left, right, top, bottom = (own + more for own, more in zip(sides, border, strict=True))
        if right < left or bottom < top:
            raise Refused(name, f"padding of {left} left and {right} right, {top} above and {bottom} below")
        shape = replace(layer, padding=(top, left))
        extra = (bottom - top, right - left)
        return ConvOp(name, layer, shape, _weights(module.weight), _bias(module.bias), x, out, extra=extra)

    def _conv_call(self, node: fx.Node) -> Op:
        """A convolution as a function of a layer's own weight: what classes derived from ``Conv2d`` do."""
        name, module = self._owner(node, "a convolution")
        if not isinstance(module, nn.Conv2d):
            raise Refused(node.name, "a convolution by a weight that is no convolution's own")
        settings = (
            pair(self._argument(node, 3, "stride", 1)), pair(self._argument(node, 5, "dilation", 1)),
            self._argument(node, 6, "groups", 1),
        )
        padding = self._argument(node, 4, "padding", 0)
        if settings != (module.stride, module.dilation, module.groups) or isinstance(padding, str):
            raise Refused(node.name, "a convolution by other settings than its layer's")
        return self._conv(name, node, module)

    def _linear_call(self, node: fx.Node) -> Op:
        """A linear layer as a function of its own weight, as in classes derived from ``Linear``."""
        name, module = self._owner(node, "a linear layer")
        if not isinstance(module, nn.Linear):
            raise Refused(node.name, "a linear layer by a weight that is no linear layer's own")
        return self._linear(name, node, module)

    def _owner(self, node: fx.Node, what: str) -> tuple[str, nn.Module]:
        """Return name and module of the layer whose weight and bias a function is called with."""
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise Refused(node.name, f"{what} by a weight that is computed")
        name, _, last = str(weight.target).rpartition(".")
        module = self.model.get_submodule(name)
        if last != "weight":
            raise Refused(node.name, f"{what} by a weight that is no layer's own")
        if self._argument(node, 2, "bias") is not getattr(module, "bias", None):
            raise Refused(node.name, f"{what} with a bias that is not its layer's")
        return name, module

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

    def _pad(self, node: fx.Node) -> None:
        sides, mode = self._argument(node, 1, "pad"), self._argument(node, 2, "mode", "constant")
        if mode != "constant" or self._argument(node, 3, "value") not in (None, 0, 0.0):
            raise Refused(node.name, f"padding in mode '{mode}' or with other values than zero")
        assert isinstance(sides, list | tuple)
        resolved = [self.results[side] if isinstance(side, fx.Node) else side for side in sides]
        if not all(isinstance(side, int) for side in resolved):
            raise Refused(node.name, "padding by sizes that are not whole numbers")
        self._border(node, [side for side in resolved if isinstance(side, int)])


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
