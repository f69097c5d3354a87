"""One layer on a GPU with bias, residual and ReLU inside, by each kernel that can run it.

All are modules called as ``y = module(x)`` or ``module(x, residual)`` on (N, C, H, W) maps in channels-last memory, or
on (N, …, I) of a linear layer. On a CPU device the same modules run their kernels' CPU forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.core.registry import unknown_name
from autoprune.kernels.formats.ell import BlockELL, Tile, padded
from autoprune.kernels.semi_structured import SemiStructuredLayer
from autoprune.kernels.triton.configs import Config, Launch, all_configs, candidates
from autoprune.kernels.triton.layers import ELLConv2d, ELLOptions
from autoprune.kernels.triton.shapes import EllShape
from autoprune.kernels.triton.spmm_layers import SparseConv2d, SparseLinear

_SLACK = 1.1
_WIDTH_STEP = 32


@dataclass(frozen=True, slots=True)
class Source:
    """A layer to be run.

    Attributes:
        layer: Shape facts.
        choice: What its weights were masked by; ``Channels`` keeps the first filters.
        weight: As in ``layer.weight_shape``, float32, masked, on any device.
        bias: (K) float32.
        relu: Whether negative results become 0.
        prepadded: Whether inputs come with the layer's padding around them; for kernels that read it so.
        ring: Rows and columns of zeros to write around the output, the padding of its reader; likewise.
        trained: Whether gradients will be asked for.
    """

    layer: LayerSpec
    choice: Choice
    weight: Tensor
    bias: Tensor
    relu: bool = True
    prepadded: bool = False
    ring: tuple[int, int] = (0, 0)
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer runs: device, and dtype of its maps and weights."""

    device: torch.device
    dtype: torch.dtype


class LayerModule(nn.Module):
    """A layer on its device.

    Attributes:
        weight_bytes: Weights with their indices and bias.
        workspace_bytes: What it needs besides its maps while it runs.
        halo: Rows and columns of zeros that its input must come with.
    """

    weight_bytes: int = 0
    workspace_bytes: int = 0
    halo: tuple[int, int] = (0, 0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the layer's output on ``x``, the residual added before the ReLU."""
        raise TypeError(f"{type(self).__name__} has no forward pass")


def tensor_bytes(tensors: Sequence[Tensor | None]) -> int:
    """Return the bytes of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def narrowed(source: Source) -> Source:
    """Return the layer without the filters that its choice removes; as it is for any other choice.

    The width is padded to a multiple of 32 with filters that would have gone: dense kernels are no faster below.
    """
    layer, choice = source.layer, source.choice
    if not isinstance(choice, Channels):
        return source
    width = min(layer.filters, padded(choice.width(layer.filters), _WIDTH_STEP))
    layer = replace(layer, weight_shape=(width, *layer.weight_shape[1:]))
    return replace(source, layer=layer, choice=Dense(), weight=source.weight[:width], bias=source.bias[:width])


class DenseLayer(LayerModule):
    """A convolution or linear layer of torch.

    Args:
        source: The layer.
        config: ``nhwc``, ``nchw``, ``fused`` (channels last; cuDNN adds the bias and rectifies itself), or ``gemm``.
        place: Device and dtype.
    """

    def __init__(self, source: Source, config: str, place: Place) -> None:
        super().__init__()
        source = narrowed(source)
        self.layer, self.config, self.relu = source.layer, config, source.relu
        self.memory = torch.contiguous_format if config == "nchw" else torch.channels_last
        weight = source.weight.to(place.device, place.dtype)
        if self.layer.op == "conv":
            weight = weight.contiguous(memory_format=self.memory)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(source.bias.to(place.device, place.dtype))
        self.weight_bytes = tensor_bytes([self.weight, self.bias])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layer = self.layer
        if layer.op == "linear":
            y = F.linear(x, self.weight, self.bias)
        elif self.config == "fused" and self.relu and not torch.is_grad_enabled():
            return self._fused(x, residual)
        else:
            x = x.contiguous(memory_format=self.memory)  # no copy of maps that have this layout
            y = F.conv2d(x, self.weight, self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return finish(y, residual, self.relu)

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        layer = self.layer
        where = (self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, *where)
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, *where)


def finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return what is left of an epilogue that a kernel does not do itself."""
    in_place = not torch.is_grad_enabled()
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    return F.relu(y, inplace=in_place) if relu else y


class EllLayer(LayerModule):
    """A convolution on Block-ELL tiles.

    Args:
        source: The layer; what its weights have as zeros is skipped where whole groups of 8 channels are.
        config: Text of a forward configuration; empty takes the one expected to be fastest.
        place: Device and dtype.
    """

    def __init__(self, source: Source, config: str, place: Place) -> None:
        super().__init__()
        layer, weight = source.layer, source.weight.to(place.device, place.dtype)
        launch = None if not config else forward_config(config, place.dtype)
        tile = suited_tile(layer, weight) if launch is None else Tile(launch.bn, launch.bk)
        options = ELLOptions(
            tile=tile,
            master="packed" if source.trained else "frozen",
            relu=source.relu,
            ring=source.ring,
            prepadded=source.prepadded,
            launch=Launch(forward=launch),
        )
        packed = BlockELL.pack(weight, tile=tile)
        shape = EllShape.of(layer, ring=source.ring, relu=source.relu)
        if source.prepadded:
            self.halo = layer.padding
            shape = replace(shape, halo=(0, 0))
        else:
            self.workspace_bytes = 0 if max(layer.padding) == 0 else padded_bytes(layer, place.dtype)
        bias_dtype = place.dtype if source.trained else torch.float32  # as the kernel reads it
        self.conv = ELLConv2d(packed, shape, source.bias.to(place.device, bias_dtype), options)
        self.weight_bytes = self.conv.nbytes

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(x, residual)
        return y


def suited_tile(layer: LayerSpec, weight: Tensor, batch: int = 1) -> Tile:
    """Return the tile to pack a masked weight with when nothing was measured.

    The one that suits the size best, unless its filters share too little: it multiplies what any of them keeps.

    Args:
        layer: One that the kernel serves.
        weight: (K, C, R, S) with its zeros, in the dtype that runs.
        batch: Images per call.
    """
    tiles = dict.fromkeys(Tile(c.bn, c.bk) for c in candidates(layer, batch, weight.dtype))
    density = {tile: BlockELL.pack(weight, tile=tile).density for tile in tiles}
    return next(tile for tile in tiles if density[tile] <= _SLACK * min(density.values()))


def padded_bytes(layer: LayerSpec, dtype: torch.dtype) -> int:
    """Return the bytes of one image's input with the layer's padding around it."""
    height, width = (size + 2 * pad for size, pad in zip(layer.input_hw, layer.padding, strict=True))
    return layer.channels * height * width * dtype.itemsize


def forward_config(text: str, dtype: torch.dtype) -> Config:
    """Return the Block-ELL forward configuration of that name.

    Raises:
        UnknownName: There is none for this dtype.
    """
    known = {config.text: config for config in all_configs(dtype) if config.kind == "forward"}
    if text not in known:
        raise unknown_name("Block-ELL configuration", text, known)
    return known[text]


class SemiLayer(LayerModule):
    """A 1×1 convolution or linear layer whose weight is a 2:4 semi-structured matrix of torch."""

    def __init__(self, source: Source, config: str, place: Place) -> None:
        super().__init__()
        self.relu = source.relu
        self.module = SemiStructuredLayer(_torch_module(source, place))
        count, item = source.layer.weights, place.dtype.itemsize
        # Half of the values, and 2 bits of index for each of them.
        self.weight_bytes = count // 2 * item + count // 8 + source.layer.filters * item

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(self.module(x), residual, self.relu)


class SpmmLayer(LayerModule):
    """A convolution or linear layer on its single kept weights."""

    def __init__(self, source: Source, config: str, place: Place) -> None:
        super().__init__()
        self.relu = source.relu
        module = _torch_module(source, place)
        self.is_conv = isinstance(module, nn.Conv2d)
        self.module: SparseConv2d | SparseLinear
        if isinstance(module, nn.Conv2d):
            self.module = SparseConv2d(module, relu=source.relu)
        else:
            self.module = SparseLinear(module)
        self.module.config = config
        self.weight_bytes = self.module.weight_bytes

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.is_conv:
            return finish(self.module(x), residual, self.relu)
        y: Tensor = self.module(x.contiguous(), residual)
        return y.contiguous(memory_format=torch.channels_last)


def _torch_module(source: Source, place: Place) -> nn.Conv2d | nn.Linear:
    layer = source.layer
    module: nn.Conv2d | nn.Linear
    if layer.op == "linear":
        module = nn.Linear(layer.channels, layer.filters, device="meta")
    else:
        sizes = (layer.window, layer.stride, layer.padding, layer.dilation, layer.groups)
        module = nn.Conv2d(layer.channels, layer.filters, *sizes, device="meta")
    module.weight = nn.Parameter(source.weight.to(place.device, place.dtype))
    module.bias = nn.Parameter(source.bias.to(place.device, place.dtype))
    return module


Maker = Callable[[Source, str, Place], LayerModule]

LAYER_KERNELS: dict[str, Maker] = {"dense": DenseLayer, "ell": EllLayer, "semi": SemiLayer, "spmm": SpmmLayer}


def build_layer(kernel: str, config: str, source: Source, place: Place) -> LayerModule:
    """Return a layer as one kernel runs it.

    Args:
        kernel: As in a table's row.
        config: The kernel's configuration, as in the row; empty takes the kernel's own default.
        source: Shape, weights, epilogue.
        place: Device and dtype.
    Raises:
        UnknownName: No such kernel.
    """
    maker = LAYER_KERNELS.get(kernel)
    if maker is None:
        raise unknown_name("kernel", kernel, LAYER_KERNELS)
    return maker(source, config, place).to(place.device)
