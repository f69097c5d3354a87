"""A search whose networks are deployed on a GPU: table, references and verification by replayed CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.kernels.deployed import DeployedModel
from autoprune.kernels.dispatch import Decision
from autoprune.kernels.fused import FusedNetwork
from autoprune.kernels.gpu_layers import Place
from autoprune.lut.gpu_deploy import GpuDeployer, dense_forms, gpu_plan, network_us
from autoprune.lut.gpu_rows import kernel_settings
from autoprune.lut.gpu_timer import Backend, samples_us
from autoprune.lut.table import LatencyTable
from autoprune.search.deploy import Deployer, References

_LAUNCHES = 10


class OnDevice(DeployedModel):
    """A fused network on its device, called with the CPU's tensors.

    Args:
        network: Of the table's kernels.
        decisions: One per convolution and linear layer.
        example: A batch (N, C, H, W) float32 on the CPU.
        place: Device and dtype of the network.
        backend: Times single operations; None where none shall be.
    """

    def __init__(
        self,
        network: FusedNetwork,
        decisions: tuple[Decision, ...],
        example: Tensor,
        place: Place,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(decisions, example)
        self.network, self.place, self.backend = network, place, backend
        self.input = example.to(place.device, place.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output for images (N, C, H, W) float32, float32 on the CPU."""
        with kernel_settings():
            result: Tensor = self.network(x.to(self.place.device, self.place.dtype))
        return result.float().cpu()

    def run(self) -> object:
        """Run the network once on the example where it is."""
        return self.network(self.input)

    def profile_us(self, repeats: int = 5) -> dict[str, float]:
        """Return the median µs of every operation of the deployed network, by name, each replayed as a graph.

        Raises:
            ModelError: There is no backend to time them.
        """
        if self.backend is None:
            return super().profile_us(repeats)
        with kernel_settings():
            steps = self.network.steps(self.input)
            return {name: float(np.median(samples_us(run, self.backend, _LAUNCHES, repeats))) for name, run in steps}


@dataclass(frozen=True)
class DeviceDeployer(Deployer):
    """Deploys and times networks on a table's device.

    Attributes:
        layers: All layers of the network.
        backend: Times them.
    """

    layers: tuple[LayerSpec, ...] = ()
    backend: Backend | None = None

    def deploy(self, model: nn.Module, choices: Mapping[str, Choice]) -> DeployedModel:
        """Return the deployed form of a model already pruned by ``choices``."""
        maker = GpuDeployer(gpu_plan(model, self.example), self.example, self.table, masked=True)
        decisions = tuple(decide(self.table, layer, choices.get(layer.name, Dense())) for layer in self.layers)
        return OnDevice(maker.network(choices), decisions, self.example, maker.place, self.backend)

    def compare_us(self, networks: Mapping[str, DeployedModel]) -> tuple[dict[str, float], float]:
        """Time networks and the fastest dense execution, one after another.

        Returns:
            Name → median microseconds, and the fastest dense execution's median.
        """
        assert self.backend is not None
        runs: dict[str, Callable[[], object]] = {
            name: network.run for name, network in networks.items() if isinstance(network, OnDevice)
        }
        medians = network_us({**runs, "dense reference": self.references.run}, self.backend)
        return medians, medians.pop("dense reference")


def decide(table: LatencyTable, layer: LayerSpec, choice: Choice) -> Decision:
    """Return which kernel a table's rows give to a layer, and why."""
    if isinstance(choice, Dense):
        return Decision(layer.name, choice.text, "dense", "dense by policy")
    dense_us = table.layer_us(layer, Dense())
    row = table.row(layer, choice)
    figures = f"{row.p50:.1f} us against {dense_us:.1f} us dense, measured alone on {table.context.place}"
    if row.p50 >= dense_us:
        why = f"left dense because the {row.kernel} kernel is not faster: {figures}"
        return Decision(layer.name, choice.text, "dense", why)
    return Decision(layer.name, choice.text, row.kernel, f"{row.kernel} kernel: {figures}")


def device_deployer(
    model: nn.Module, example: Tensor, table: LatencyTable, layers: tuple[LayerSpec, ...], backend: Backend
) -> DeviceDeployer:
    """Return the deployer of a network whose table is of this device, its dense executions measured now.

    Args:
        model: float32, on the CPU.
        example: A batch (N, C, H, W) float32.
        table: Of the present device.
        layers: All layers of the network.
        backend: Times them.
    """
    forms = dense_forms(model, gpu_plan(model, example), table, example)
    medians = network_us(forms, backend)
    best = min(medians, key=lambda name: medians[name])
    references = References(medians, {}, best, functools.partial(_quietly, forms[best]))
    return DeviceDeployer(example, table, references, table.context.threads, layers=layers, backend=backend)


def _quietly(run: Callable[[], object]) -> object:
    with torch.no_grad():
        return run()
