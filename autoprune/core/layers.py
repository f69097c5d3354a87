"""What the engine knows of a layer: its shape, and the key under which its latency is measured.

Shapes: conv weight ``KCRS`` (filters, input channels per group, window rows, window columns); linear weight ``OI``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Op = Literal["conv", "linear"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One convolution or linear layer as it runs in a network.

    Attributes:
        name: Dotted module name in the model.
        op: ``conv`` or ``linear``.
        weight_shape: ``(K, C / groups, R, S)`` of a conv, ``(out, in)`` of a linear.
        stride, padding, dilation: Of the conv, (rows, columns); ``(1, 1)``/``(0, 0)`` of a linear.
        groups: Groups of the conv.
        input_hw, output_hw: Feature-map size; ``(1, 1)`` for a linear on vectors.
        bias: Whether the module carries a bias of its own.
        calls: How often one forward pass runs the layer.
        fixed: Why the layer must stay dense, in words; empty where it need not.
    """

    name: str
    op: Op
    weight_shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    input_hw: tuple[int, int] = (1, 1)
    output_hw: tuple[int, int] = (1, 1)
    bias: bool = False
    calls: int = 1
    fixed: str = ""

    @property
    def filters(self) -> int:
        """Number of output channels K."""
        return self.weight_shape[0]

    @property
    def channels(self) -> int:
        """Number of input channels C of the whole layer (all groups)."""
        return self.weight_shape[1] * self.groups

    @property
    def window(self) -> tuple[int, int]:
        """Window size (R, S); (1, 1) for a linear layer."""
        return (self.weight_shape[2], self.weight_shape[3]) if self.op == "conv" else (1, 1)

    @property
    def weights(self) -> int:
        """Number of weights, bias not counted."""
        return math.prod(self.weight_shape)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass at batch 1, all calls together."""
        return self.weights * self.output_hw[0] * self.output_hw[1] * self.calls

    @property
    def signature(self) -> str:
        """Name-free key of the latency table: two layers with one signature take the same time."""
        k, (r, s), (h, w) = self.filters, self.window, self.input_hw
        if self.op == "linear":
            return f"linear-o{k}-i{self.weight_shape[1]}-n{h * w}"
        text = f"conv-k{k}-c{self.channels}-{r}x{s}-in{h}x{w}-s{self.stride[0]}x{self.stride[1]}"
        text += f"-p{self.padding[0]}x{self.padding[1]}"
        if self.dilation != (1, 1):
            text += f"-d{self.dilation[0]}x{self.dilation[1]}"
        if self.groups != 1:
            text += f"-g{self.groups}"
        return text
