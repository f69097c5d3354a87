"""Tables measured elsewhere: they predict, and nothing can be deployed to confirm it.

A percentage of latency is then of the fastest dense execution that was measured where the table comes from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense
from autoprune.core.coupling import Coupling
from autoprune.core.errors import AutopruneError, TableMismatch
from autoprune.core.layers import LayerSpec
from autoprune.kernels.deployed import DeployedModel
from autoprune.kernels.dispatch import Decision
from autoprune.lut.embedded import embedded
from autoprune.lut.table import Context, LatencyTable
from autoprune.search.deploy import Deployer, References
from autoprune.search.on_gpu import decide
from autoprune.search_spaces.grouped import split_choices

_SPACES = {"cpu": "cpu-default", "cuda": "gpu-default"}


def default_space(table: str | None, device: str) -> str:
    """Return the preset for a device, or for the device that a table was measured on."""
    if table is not None:
        path = Path(table)
        names = [file for stem, file in embedded().items() if stem == table or stem.startswith(f"{table}-")]
        with contextlib.suppress(AutopruneError):  # the search itself says what is wrong with the table
            device = LatencyTable.load(path if path.exists() or not names else names[0]).context.device
    return _SPACES.get(device, "cpu-default")


def is_elsewhere(table: LatencyTable, here: Context) -> bool:
    """Return whether a table is of another context than the one that a search could measure in.

    Raises:
        TableMismatch: It is of another batch size, which is the user's to choose, or is not calibrated.
    """
    if table.context == here:
        return False
    if table.context.batch != here.batch:
        raise TableMismatch(
            f"latency table was measured with batch {table.context.batch}, wanted {here.batch}; nothing is converted. "
            f"Give --batch {table.context.batch}, or run: autoprune lut build"
        )
    if table.calibration is None:
        raise TableMismatch(
            f"latency table was measured on {table.context.place}, so it can only predict, and it is not calibrated; "
            "build it there again: autoprune lut build"
        )
    return True


def dense_references(table: LatencyTable) -> dict[str, float]:
    """Return the dense executions that a table knows, µs; of an older table the dense network of its calibration."""
    if table.whole is not None and table.whole.dense_us:
        return dict(table.whole.dense_us)
    assert table.calibration is not None
    return {"plan": table.calibration.points[0].measured_us}


class Undeployed(DeployedModel):
    """A network that is not deployed: PyTorch's own, for its outputs alone.

    Args:
        model: Already pruned.
        decisions: Which kernel each layer would run on.
        example: (N, C, H, W) float32.
    """

    def __init__(self, model: nn.Module, decisions: tuple[Decision, ...], example: Tensor) -> None:
        super().__init__(decisions, example)
        self.network = model.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        with torch.no_grad():
            result: Tensor = self.network(x)
        return result


def predictor(
    example: Tensor, table: LatencyTable, layers: tuple[LayerSpec, ...], coupling: Coupling | None = None
) -> Predictor:
    """Return what stands in for a deployer whose device is elsewhere.

    Args:
        example: A batch (N, C, H, W) float32.
        table: Calibrated.
        layers: All layers of the network.
        coupling: Their channel groups, where channels are searched.
    """
    medians = dense_references(table)
    best = min(medians, key=lambda name: medians[name])
    references = References(medians, {}, best, lambda: None)
    own = Coupling() if coupling is None else coupling
    return Predictor(example, table, references, table.context.threads, layers=layers, coupling=own)


@dataclass(frozen=True)
class Predictor(Deployer):
    """Stands in for a deployer whose device is elsewhere.

    Attributes:
        layers: All layers of the network.
        coupling: Their channel groups.
    """

    layers: tuple[LayerSpec, ...] = ()
    coupling: Coupling = field(default_factory=Coupling)

    @property
    def measures(self) -> bool:
        """Whether networks can be timed: not here."""
        return False

    def deploy(self, model: nn.Module, choices: Mapping[str, Choice]) -> DeployedModel:
        """Return the network as PyTorch runs it, with the kernels it would run on where the table comes from."""
        own = split_choices(choices)
        smaller = self.coupling.resized(self.layers, choices)
        decisions = tuple(decide(self.table, layer, own.get(layer.name, Dense())) for layer in smaller)
        decisions = tuple(replace(d, choice=choices.get(d.layer, Dense()).text) for d in decisions)
        return Undeployed(model, decisions, self.example)
