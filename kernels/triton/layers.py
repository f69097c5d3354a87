"""A convolution on a Block-ELL pack, as a module: for deployment and for training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.kernels.fold import fold_norm
from autoprune.kernels.formats.ell import BlockELL, Tile
from autoprune.kernels.triton.configs import Launch, all_configs, work_per_result
from autoprune.kernels.triton.convolution import ELLLayout, ell_conv2d
from autoprune.kernels.triton.ops import ell_repack
from autoprune.kernels.triton.shapes import EllShape

Master = Literal["packed", "dense", "frozen"]
# A sparse input gradient must beat the vendor's dense one by this factor of expected work.
_DINPUT_MARGIN = 0.8


def best_transpose(packed: BlockELL) -> BlockELL | None:
    """Return the pack of the stride-1 input gradient in the tile that costs least; None where dense is expected to win.

    A tile of the transposed pack multiplies, for each 8 filters and tap, what any of its channels keeps. A mask shared
    by 64 filters × 8 channels is decided anew for every 8 of them: at kernels=0.5, 22 % of the weights, a tile of 64
    channels multiplies 78–89 % of the layer, of 128 94–96 %, of 16 54–67 % at a fifth of the rate; putting channels
    that keep the same into one tile changes that by 6 points at most. So such layers take the dense gradient. Masks
    shared by 64 × 64 (or 32 × 32 in tiles of 32) keep 22–44 %: choose those where training shall be fast too.
    """
    tiles = sorted({Tile(c.bn, c.bk) for c in all_configs(packed.weight.dtype) if c.kind == "forward"})
    channels = packed.shape[1]
    widths = [tile for tile in tiles if tile.filters < 2 * channels or tile.filters == tiles[0].filters]
    found = [packed.transpose(tile) for tile in widths]
    best = min(found, key=lambda pack: pack.density * work_per_result(pack.tile.filters))
    dense = work_per_result(min(128, max(32, channels)))
    return best if best.density * work_per_result(best.tile.filters) < _DINPUT_MARGIN * dense else None


@dataclass(frozen=True, slots=True)
class ELLOptions:
    """How a convolution becomes an ``ELLConv2d``.

    Attributes:
        tile: Of the pack; its transpose takes the one that suits it (``best_transpose``).
        master: ``frozen``: deployed, no gradients. ``packed``: the parameter is the pack, the optimizer never repacks.
            ``dense``: the parameter is the (K, C, R, S) weight, packed by one gather in each forward.
        norm: An inference BatchNorm to fold into weights and bias; with ``frozen`` only.
        relu: Rectify the result (after the residual).
        ring: Zeros to write around the output: the padding of the layer that reads it.
        prepadded: Inputs come with the layer's padding around them: the producer's ring.
        launch: Configurations; defaults by shape where None.
    """

    tile: Tile = field(default_factory=Tile)
    master: Master = "frozen"
    norm: nn.BatchNorm2d | None = None
    relu: bool = False
    ring: tuple[int, int] = (0, 0)
    prepadded: bool = False
    launch: Launch = field(default_factory=Launch)


class ELLConv2d(nn.Module):
    """``relu(conv(x) + bias + residual)`` on a pack; any batch and input size, CPU or CUDA.

    Args:
        packed: The weight.
        shape: Geometry, with the layer's padding as its halo.
        bias: (K,) or None.
        options: Tile and norm are not read here: see ``from_conv``.
    """

    weight: Tensor
    groups: Tensor
    keep: Tensor | None
    gather: Tensor | None
    scatter: Tensor | None
    transposed_groups: Tensor | None
    transposed_index: Tensor | None

    def __init__(self, packed: BlockELL, shape: EllShape, bias: Tensor | None, options: ELLOptions) -> None:
        super().__init__()
        self.shape, self.options, self.density = shape, options, packed.density
        dense = options.master == "dense"
        self._hold("weight", packed.unpack() if dense else packed.weight)
        # The kernel adds a float32 bias: kept so, it is not cast anew in every call.
        self._hold("bias", bias.float() if bias is not None and options.master == "frozen" else bias)
        self.register_buffer("groups", packed.groups)
        training = options.master != "frozen"
        self.register_buffer("keep", packed.keep if options.master == "packed" else None)
        self.register_buffer("gather", packed.gather_index() if dense else None)
        self.register_buffer("scatter", packed.scatter_index() if training else None)
        back = best_transpose(packed) if training and shape.stride == (1, 1) else None
        self.register_buffer("transposed_groups", None if back is None else back.groups)
        self.register_buffer("transposed_index", None if back is None else back.index_into(packed))

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        tensor = None if tensor is None else tensor.detach().clone()
        if self.options.master == "frozen" or tensor is None:
            self.register_buffer(name, tensor)
        else:
            self.register_parameter(name, nn.Parameter(tensor))

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, mask: Tensor | None = None, options: ELLOptions | None = None
    ) -> ELLConv2d:
        """Return the packed form of a convolution, on its device and in its dtype.

        Args:
            conv: groups = 1, dilation 1, zero padding; its weights are copied.
            mask: (K, C, R, S) boolean, any; where the weight is not 0 when None.
            options: Deployed on a 64 × 64 tile when None.
        Raises:
            ModelError: The kernel cannot do what the convolution does, or a norm is to be folded into a trained layer.
        """
        options = ELLOptions() if options is None else options
        shape = _shape(conv, options)
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        mask = weight != 0 if mask is None else mask
        if options.norm is not None:
            if options.norm.running_mean is None:
                raise ModelError(
                    "ELLConv2d: a BatchNorm without running statistics cannot be folded; keep it as a module."
                )
            if options.master != "frozen":
                raise ModelError(
                    f"ELLConv2d: a BatchNorm cannot be folded into a layer that trains (master='{options.master}'); "
                    "keep it as a module, or use master='frozen'."
                )
            dtype, (weight, bias) = weight.dtype, fold_norm(conv, options.norm)
            weight, bias = weight.to(dtype), bias.to(dtype)
        return cls(BlockELL.pack(weight, mask, options.tile), shape, bias, options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return (N, K, P + 2·ring, Q + 2·ring) in channels-last memory.

        Args:
            x: (N, C, H, W); with its padding around it if the layer was made ``prepadded``.
            residual: (N, K, P, Q), added before the rectifier.
        """
        extra: tuple[Tensor, ...] = () if self.scatter is None else (self.scatter,)
        if self.transposed_groups is not None and self.transposed_index is not None:
            extra += (self.transposed_groups, self.transposed_index)
        weight = self.packed_weight()
        layout = ELLLayout(self.groups, extra)
        bias = self.bias if isinstance(self.bias, Tensor) else None
        return ell_conv2d(
            x, weight, layout, self.shape, bias=bias, residual=residual, launch=self.options.launch
        )

    def packed_weight(self) -> Tensor:
        """Return the weight as the kernel reads it, (tiles, steps, BK, BN); gradients flow through."""
        if self.gather is not None and self.scatter is not None:
            packed: Tensor = ell_repack(self.weight, self.gather, self.scatter)
            return packed
        # Pruned places inside a shared group would get a gradient, and come to life.
        return self.weight if self.keep is None else self.weight * self.keep

    def dense_weight(self) -> Tensor:
        """Return the (K, C, R, S) weight, detached."""
        shape = (self.shape.filters, self.shape.channels, *self.shape.window)
        with torch.no_grad():
            return BlockELL(shape, self.options.tile, self.packed_weight(), self.groups).unpack()

    @property
    def nbytes(self) -> int:
        """Bytes that the forward kernel reads of the layer: packed weights, codes and bias."""
        bias = self.bias.nbytes if isinstance(self.bias, Tensor) else 0
        rows = self.groups.numel() * 8 * self.options.tile.filters
        return rows * self.weight.element_size() + self.groups.nbytes + bias

    def extra_repr(self) -> str:
        """Name shape, tile and the density the kernel executes."""
        return f"{self.shape}, tile={self.options.tile}, master={self.options.master}, density={self.density:.3f}"


def _shape(conv: nn.Conv2d, options: ELLOptions) -> EllShape:
    if conv.groups != 1 or conv.dilation != (1, 1) or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise ModelError(
            f"ELLConv2d: got groups {conv.groups}, dilation {conv.dilation}, padding {conv.padding!r} of "
            f"{conv.padding_mode}; it does groups=1, dilation=1 and a number of zeros. Keep the layer dense."
        )
    height, width = conv.kernel_size
    halo = (0, 0) if options.prepadded else (int(conv.padding[0]), int(conv.padding[1]))
    stride = (conv.stride[0], conv.stride[1])
    return EllShape(
        conv.out_channels, conv.in_channels, (height, width), stride, halo, options.ring, options.relu
    )
