"""Whole networks on a GPU, as a table's rows say they run best: for calibration, search and benchmarks.

Every layer runs on the kernel and configuration of its row; a choice that is not faster than the layer's dense row
runs dense. Layers are made once and shared by all networks that need them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense
from autoprune.core.errors import MeasurementError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.fold import fold_batchnorm
from autoprune.kernels.fused import FusedNetwork, refusal_of
from autoprune.kernels.gpu_layers import LayerModule, Place, Source, build_layer
from autoprune.kernels.gpu_plan import dense_config, ring_pays
from autoprune.kernels.plan import Plan, build_plan
from autoprune.lut.gpu_families import place_of
from autoprune.lut.gpu_rows import kernel_settings
from autoprune.lut.gpu_timer import Backend, CudaBackend, Subject, time_subject
from autoprune.lut.table import LatencyTable
from autoprune.sparsity.masks import make_mask

_LAUNCHES, _REPLAYS = 4, 5


def gpu_plan(model: nn.Module, example: Tensor) -> Plan:
    """Return the plan of a model.

    Raises:
        MeasurementError: It has none; says what is in the way.
    """
    plan = build_plan(model, example, {})
    if not isinstance(plan, Plan):
        raise MeasurementError(f"the model is not one flat plan, which a GPU's table is calibrated on: {plan}.")
    refusal = refusal_of(plan)
    if refusal is not None:
        raise MeasurementError(f"the model is not one flat plan, which a GPU's table is calibrated on: {refusal}.")
    return plan


@dataclass(slots=True)
class GpuDeployer:
    """Deploys a network under policies, on the device and in the dtype of a table.

    Attributes:
        plan: Of the model.
        example: One batch, float32.
        table: Rows of every layer and choice.
        masked: Whether the plan's weights have their zeros already; otherwise they are masked by magnitude.
    """

    plan: Plan
    example: Tensor
    table: LatencyTable
    masked: bool = False
    _layers: dict[tuple[object, ...], LayerModule] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """Device and dtype."""
        return place_of(self.table.context)

    def network(self, choices: Mapping[str, Choice]) -> FusedNetwork:
        """Return the network under a policy; layers not named are dense."""
        effective = {op.name: self._effective(op.layer, choices.get(op.name, Dense())) for op in self.plan.convs}
        return FusedNetwork(self.plan, self, effective)

    def _effective(self, layer: LayerSpec, choice: Choice) -> Choice:
        if isinstance(choice, Dense) or not self.table.measured(layer, [choice]):
            return Dense()
        return choice if self.table.layer_us(layer, choice) < self.table.layer_us(layer, Dense()) else Dense()

    def reads_halo(self, layer: LayerSpec, choice: Choice) -> bool:
        """Return whether the layer's kernel reads its padding from memory."""
        return self.table.row(layer, choice).kernel == "ell"

    def writes_ring(self, layer: LayerSpec, choice: Choice) -> bool:
        """Return whether the layer can write a border around its output, at less than a copy costs."""
        row = self.table.row(layer, choice)
        return row.kernel == "ell" or ring_pays(row)

    def make(self, source: Source) -> LayerModule:
        """Return a layer's module; made once for all networks of this deployer."""
        key = (source.layer.name, source.choice.text, source.prepadded, source.ring, source.relu)
        if key not in self._layers:
            self._layers[key] = self._layer(source)
        return self._layers[key]

    def _layer(self, source: Source) -> LayerModule:
        row = self.table.row(source.layer, source.choice)
        weight = source.weight.to(self.place.device)
        if not self.masked and not isinstance(source.choice, Dense):
            weight = weight * make_mask(weight, source.choice)
        kernel, config = row.kernel, row.config
        if kernel == "dense" and source.ring != (0, 0):
            kernel, config = "ell", row.ring_config
        return build_layer(kernel, dense_config(config), replace(source, weight=weight), self.place)

    def __call__(self, choices: Mapping[str, Choice]) -> Callable[[], object]:
        """Return a call that runs the network under a policy once on the example."""
        network = self.network(choices)
        x = self.example.to(self.place.device, self.place.dtype)
        return lambda: network(x)


def network_us(runs: Mapping[str, Callable[[], object]], backend: Backend) -> dict[str, float]:
    """Return the median time of each whole network, replayed as a graph, µs."""

    def always(run: Callable[[], object]) -> Subject:
        return Subject(lambda index: run, 1)

    with kernel_settings():
        return {
            name: time_subject(always(run), backend, launches=_LAUNCHES, replays=_REPLAYS, cold=False).warm.p50
            for name, run in runs.items()
        }


def dense_forms(model: nn.Module, plan: Plan, table: LatencyTable, example: Tensor) -> dict[str, Callable[[], object]]:
    """Return the dense executions of a network on the table's device: our plan, and PyTorch's in both layouts."""
    place = place_of(table.context)
    forms: dict[str, Callable[[], object]] = {"plan": GpuDeployer(plan, example, table)({})}
    x = example.to(place.device, place.dtype)
    for name, layout in (("torch-channels-last", torch.channels_last), ("torch-folded", torch.contiguous_format)):
        network = fold_batchnorm(model).to(device=place.device, dtype=place.dtype)
        network = network.to(memory_format=layout)
        own = x.contiguous(memory_format=layout) if x.dim() == 4 else x
        forms[name] = functools.partial(network, own)
    return forms


def cuda_network_us(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return ``network_us`` of the present CUDA device."""
    torch.cuda.synchronize()
    return network_us(runs, CudaBackend())
