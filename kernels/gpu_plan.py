"""From what dispatch decided to the modules of a fused network: each layer's kernel, and who writes borders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from autoprune.core.choices import Choice, Dense
from autoprune.core.errors import MissingLatency
from autoprune.core.layers import LayerSpec
from autoprune.kernels.dispatch import Decision, LatencyRows
from autoprune.kernels.fused import FusedNetwork
from autoprune.kernels.gpu_layers import LayerModule, Place, Source, build_layer
from autoprune.kernels.plan import Plan


class RingRow(Protocol):
    """What a dense row says of the kernel that can write a border for a sparse reader."""

    @property
    def p50(self) -> float:
        """Of the layer's best dense kernel, µs."""
        ...

    @property
    def config(self) -> str:
        """Its configuration."""
        ...

    @property
    def ring_us(self) -> float | None:
        """Of the Block-ELL kernel that writes the border itself; None where it was not measured."""
        ...

    @property
    def ring_config(self) -> str:
        """Its configuration."""
        ...

    @property
    def pad_us(self) -> float | None:
        """What copying the dense kernel's output into a border takes."""
        ...


@runtime_checkable
class RingRows(Protocol):
    """A table that holds such rows."""

    def row(self, layer: LayerSpec, choice: Choice) -> RingRow:
        """Return the row of a layer and choice; MissingLatency where there is none."""
        ...


def ring_pays(row: RingRow) -> bool:
    """Return whether writing a border beats the dense kernel with a copy behind it."""
    return row.ring_us is not None and row.pad_us is not None and row.ring_us < row.p50 + row.pad_us


def dense_config(measured: str) -> str:
    """Return the dense configuration for a network of channels-last maps: another layout would cost two copies."""
    return "nhwc" if measured == "nchw" else measured


@dataclass(frozen=True, slots=True)
class DecidedLayers:
    """Makes a network's layers as dispatch decided.

    Attributes:
        decisions: By layer name.
        place: Device and dtype.
        table: Measured rows; without them dense layers write no borders.
    """

    decisions: Mapping[str, Decision]
    place: Place
    table: LatencyRows | None = None

    def reads_halo(self, layer: LayerSpec, choice: Choice) -> bool:
        """Return whether the layer's kernel reads its padding from memory."""
        return self.decisions[layer.name].kernel == "ell"

    def writes_ring(self, layer: LayerSpec, choice: Choice) -> bool:
        """Return whether the layer can write a border around its output, at less than a copy costs."""
        if self.decisions[layer.name].kernel == "ell":
            return True
        row = self._dense_row(layer) if self.decisions[layer.name].kernel == "dense" else None
        return row is not None and ring_pays(row)

    def make(self, source: Source) -> LayerModule:
        """Return a layer's module."""
        decision, row = self.decisions[source.layer.name], None
        kernel, config = decision.kernel, decision.config
        if kernel == "dense":
            row, source = self._dense_row(source.layer), replace(source, choice=Dense())
            config = "nhwc" if row is None else dense_config(row.config)
            if source.ring != (0, 0) and row is not None:
                kernel, config = "ell", row.ring_config
        return build_layer(kernel, config, source, self.place)

    def _dense_row(self, layer: LayerSpec) -> RingRow | None:
        if not isinstance(self.table, RingRows):
            return None
        try:
            row = self.table.row(layer, Dense())
        except MissingLatency:
            return None
        return row if hasattr(row, "ring_us") else None


def fused_network(
    plan: Plan, decisions: Mapping[str, Decision], choices: Mapping[str, Choice], place: Place,
    table: LatencyRows | None = None,
) -> FusedNetwork:
    """Return a plan whose weights are masked already as a network of the kernels decided on.

    Args:
        plan: Of the masked model.
        decisions: Of every convolution and linear layer, by name.
        choices: Layer → choice; layers that run dense whatever their choice need not be named.
        place: Device and dtype.
        table: Measured rows of that device.
    """
    sparse = {name: choice for name, choice in choices.items() if decisions[name].kernel != "dense"}
    network = FusedNetwork(plan, DecidedLayers(decisions, place, table), sparse)
    return network.requires_grad_(False).eval()
