"""Policies as deployed networks: built, timed beside the dense references, and looked into layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice
from autoprune.core.errors import ModelError
from autoprune.core.progress import Silent
from autoprune.kernels.convert import DeployedModel, convert
from autoprune.kernels.dense import dense_references, runners
from autoprune.lut.measure import interleaved_us, measure
from autoprune.lut.table import LatencyTable
from autoprune.sparsity.channels import ChannelGroups

REFERENCE_SECONDS = 4.0
SECONDS_A_NETWORK = 0.7


@dataclass(frozen=True, slots=True)
class References:
    """Dense executions of the model on this machine.

    Attributes:
        medians_us: Name → median latency in microseconds.
        absent: Name of a form that does not run here → why.
        best: Name of the fastest.
        run: Runs the fastest once.
    """

    medians_us: dict[str, float]
    absent: dict[str, str]
    best: str
    run: Callable[[], object]

    @property
    def best_us(self) -> float:
        """Latency of the fastest dense execution."""
        return self.medians_us[self.best]


def measure_references(
    model: nn.Module, example: Tensor, threads: int, built: Callable[[str], None] = lambda name: None
) -> References:
    """Time every dense execution of ``model`` on a batch ``(N, C, H, W)``, interleaved."""
    forms = dense_references(model, example, threads)
    runs = runners(forms)
    samples = interleaved_us(runs, REFERENCE_SECONDS, threads)
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    absent = {name: form for name, form in forms.items() if isinstance(form, str)}
    best = min(medians, key=lambda name: medians[name])
    return References(medians, absent, best, runs[best])


def reopen_references(model: nn.Module, example: Tensor, threads: int, stored: Mapping[str, object]) -> References:
    """Return references measured before; only the fastest form is built."""
    medians, absent = stored["medians_us"], stored["absent"]
    assert isinstance(medians, dict)
    assert isinstance(absent, dict)
    best = min(medians, key=lambda name: medians[name])
    runs = runners(dense_references(model, example, threads, only=(best,)))
    return References(medians, absent, best, runs[best])


@dataclass(frozen=True)
class Deployer:
    """Turns a policy and its weights into a network that runs, and times it.

    Attributes:
        example: A batch ``(N, C, H, W)`` float32 of the deployment's size.
        table: Decides which kernel runs a layer.
        references: What it is compared with.
        threads: Of the deployed network.
        groups: Channel groups of the model, where channels are searched.
        note: Told when times may be off because the machine was busy.
    """

    example: Tensor
    table: LatencyTable
    references: References
    threads: int
    groups: ChannelGroups | None = None
    note: Callable[[str], None] = Silent().note

    @property
    def measures(self) -> bool:
        """Whether networks can be timed."""
        return True

    def deploy(self, model: nn.Module, choices: Mapping[str, Choice]) -> DeployedModel:
        """Return the deployed form of a model already pruned by ``choices``."""
        return convert(model, choices, self.example, self.table, self.threads, groups=self.groups)

    def compare_us(self, networks: Mapping[str, DeployedModel]) -> tuple[dict[str, float], float]:
        """Time networks and the fastest dense execution in one interleaved run.

        Returns:
            Name → median microseconds, and the fastest dense execution's median in the same run.
        """
        cases: dict[str, Callable[[], object]] = {
            name: functools.partial(network, self.example) for name, network in networks.items()
        }
        cases["dense reference"] = self.references.run
        with torch.inference_mode():
            found = measure(cases, SECONDS_A_NETWORK * len(cases), self.threads)
        if found.busy:
            self.note(
                f"the machine was busy: {found.dropped} of {found.taken} samples were disturbed, times may be off; "
                "stop what else runs here"
            )
        medians = {name: float(np.median(values)) for name, values in found.samples.items()}
        return medians, medians.pop("dense reference")


def layer_times_us(network: DeployedModel) -> dict[str, float]:
    """Return the median time of every layer inside the running network; empty for one that is not a flat plan."""
    try:
        return network.profile_us()
    except ModelError:
        return {}
