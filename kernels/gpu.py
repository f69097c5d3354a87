"""A network deployed on a GPU: its plan as one fused network, or PyTorch's code with its sparse layers replaced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.deployed import DeployedModel
from autoprune.kernels.dispatch import Decision
from autoprune.kernels.formats.ell import Tile
from autoprune.kernels.fused import FusedNetwork
from autoprune.kernels.gpu_layers import suited_tile
from autoprune.kernels.plan_ops import padding_of
from autoprune.kernels.semi_structured import SemiStructuredLayer
from autoprune.kernels.triton.configs import Launch, all_configs
from autoprune.kernels.triton.layers import ELLConv2d, ELLOptions
from autoprune.kernels.triton.spmm_layers import SparseConv2d, SparseLinear


class GpuModel(DeployedModel):
    """A network whose layers run on the kernels that dispatch chose. Inference only.

    Args:
        network: In its device, dtype and memory format: fused, or PyTorch's with layers replaced.
        decisions: One per convolution and linear layer.
        example: (N, C, H, W) or (N, I), on the network's device in its dtype; kept for timing.
        memory_format: Of the network's maps.
    """

    def __init__(
        self,
        network: nn.Module,
        decisions: tuple[Decision, ...],
        example: Tensor,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__(decisions, example)
        self.network, self.memory_format = network, memory_format

    def layer(self, name: str) -> nn.Module:
        """Return the module that runs one convolution or linear layer."""
        return self.network.layer(name) if isinstance(self.network, FusedNetwork) else self.network.get_submodule(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output.

        Args:
            x: Of the example's device and dtype; any batch size and memory format.
        Raises:
            ModelError: Another dtype or device, or the network returns something else than one tensor.
        """
        if x.dtype != self.example.dtype or x.device.type != self.example.device.type:
            raise ModelError(
                f"this deployed model takes {self.example.dtype} inputs on {self.example.device}, got {x.dtype} on "
                f"{x.device}; call it with x.to('{self.example.device}', {self.example.dtype})."
            )
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.memory_format)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            result = self.network(x)
        if not isinstance(result, Tensor):
            raise ModelError(f"the model returns a {type(result).__name__}; a deployed model returns one tensor.")
        return result

    def time_us(self, repeats: int = 100) -> np.ndarray:
        """Return microseconds of ``repeats`` calls on the example, of the GPU's own clock; shape (repeats,) float64."""
        if not self.example.is_cuda:
            return super().time_us(repeats)
        self(self.example)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            self(self.example)
            mark.record()
        marks[-1].synchronize()
        return np.array([1e3 * before.elapsed_time(after) for before, after in itertools.pairwise(marks)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GpuModel:
        probe = fn(self.example[:0])
        if probe.dtype != self.example.dtype or probe.device.type != self.example.device.type:
            raise ModelError(
                f"a deployed model stays in {self.example.dtype} on {self.example.device}; convert the model again for "
                f"{probe.dtype} on {probe.device}."
            )
        # Nothing to do then; a compressed weight could not even be copied.
        return self


class HostModel(nn.Module):
    """A deployed network called with a CPU's float32 tensors, and answering with such: for accuracies.

    Args:
        deployed: On its device.
    """

    def __init__(self, deployed: GpuModel) -> None:
        super().__init__()
        self.deployed = deployed

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output for (N, C, H, W) float32, float32 on the CPU."""
        result: Tensor = self.deployed(x.to(self.deployed.example.device, self.deployed.example.dtype))
        return result.float().cpu()


def build_gpu(
    network: nn.Module,
    decisions: Mapping[LayerSpec, Decision],
    example: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> GpuModel:
    """Return a network that is no plan on a device, with the layers replaced that decisions give to a sparse kernel.

    Args:
        network: float32, on the CPU; changed in place.
        decisions: What shall run each convolution and linear layer.
        example: An input of the network.
        device: Where it will run; on a CPU the operators' CPU forms do.
        dtype: Of maps and weights.
    """
    network.to(device=device, dtype=dtype)
    example = example.to(device, dtype)
    memory_format = _memory_format(network, example)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for spec, decision in decisions.items():
        source = network.get_submodule(decision.layer)
        assert isinstance(source, nn.Conv2d | nn.Linear)
        if decision.kernel in _LAYERS:
            if isinstance(source, nn.Conv2d):
                source.padding = padding_of(source) or (0, 0)  # numbers for padding='same'
            layer = _LAYERS[decision.kernel](source, spec, example.shape[0], decision.config)
            layer.requires_grad_(False).eval()
            if memory_format != torch.channels_last:
                layer.register_forward_hook(_contiguous)
            network.set_submodule(decision.layer, layer)
    return GpuModel(network, tuple(decisions.values()), example, memory_format)


def _memory_format(network: nn.Module, example: Tensor) -> torch.memory_format:
    """Take a network to the memory format that it will run in, and return that.

    Channels last is what tensor cores want; code that flattens a map by ``view`` runs in the other one alone.
    """
    network.to(memory_format=torch.channels_last)
    if example.dim() != 4:
        return torch.channels_last
    try:
        with torch.no_grad():
            network(example.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        network.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _contiguous(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.contiguous()


def _spmm(source: nn.Conv2d | nn.Linear, layer: LayerSpec, batch: int, config: str) -> nn.Module:
    module = SparseConv2d(source) if isinstance(source, nn.Conv2d) else SparseLinear(source)
    module.config = config
    return module


def _semi(source: nn.Conv2d | nn.Linear, layer: LayerSpec, batch: int, config: str) -> nn.Module:
    return SemiStructuredLayer(source)


def _ell(source: nn.Conv2d | nn.Linear, layer: LayerSpec, batch: int, config: str) -> nn.Module:
    assert isinstance(source, nn.Conv2d)
    measured = next((known for known in all_configs(source.weight.dtype) if known.text == config), None)
    if measured is not None:
        tile = Tile(measured.bn, measured.bk)
        return ELLConv2d.from_conv(source, options=ELLOptions(tile=tile, launch=Launch(forward=measured)))
    return ELLConv2d.from_conv(source, options=ELLOptions(tile=suited_tile(layer, source.weight, batch)))


_LAYERS: dict[str, Callable[[nn.Conv2d | nn.Linear, LayerSpec, int, str], nn.Module]] = {
    "ell": _ell,
    "spmm": _spmm,
    "semi": _semi,
}
