"""Which kernel runs a layer under its choice on a device, and why: the table's winner, dense included.

Kernels of a CPU: ``block``, ``csr``. Kernels of a GPU: ``ell`` (Block-ELL implicit GEMM), ``spmm`` (row-tiled, single
weights), ``semi`` (2:4 on tensor cores). ``dense`` is everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from autoprune.core.choices import Block, Choice, Dense, Pattern
from autoprune.core.errors import MissingLatency
from autoprune.core.layers import LayerSpec
from autoprune.kernels.plan import kernel_for
from autoprune.kernels.semi_structured import semi_refusal
from autoprune.kernels.triton import shapes, spmm_layers

DeviceName = Literal["cpu", "cuda"]
Kernel = Literal["dense", "block", "csr", "ell", "spmm", "semi"]

# Block-ELL skips groups of 8 channels that all of a tile's filters drop; 32 is the narrowest tile.
_ELL_GROUP = (32, 8)
# Above this share of kept groups Block-ELL does nearly the work of a dense layer and is not offered.
_ELL_OFFERED = 0.9
# Without measured rows: KERNELS' break-even points, below which a kernel is expected to beat the dense layer.
_ELL_EXPECTED = 0.6
_SPMM_EXPECTED = 0.04


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one layer.

    Attributes:
        layer, choice: Name and canonical text.
        kernel: What runs it.
        why: The reason, in words.
        config: The kernel's configuration that was measured fastest; empty leaves it to the kernel.
    """

    layer: str
    choice: str
    kernel: str
    why: str
    config: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a network runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: Of maps and weights.
    """

    device: DeviceName = "cpu"
    dtype: torch.dtype = torch.float32


CPU = Place()


class LatencyRows(Protocol):
    """What dispatch needs of a latency table."""

    def layer_us(self, layer: LayerSpec, choice: Choice) -> float:
        """Return the latency of one layer in microseconds; MissingLatency where there is no row."""
        ...


class _Row(Protocol):
    @property
    def p50(self) -> float: ...

    @property
    def kernel(self) -> str: ...

    @property
    def config(self) -> str: ...


@runtime_checkable
class _KernelRows(Protocol):
    """A table that also knows which kernel a row was measured with."""

    def row(self, layer: LayerSpec, choice: Choice) -> _Row: ...


@dataclass(frozen=True, slots=True)
class Timed:
    """A measured kernel: median microseconds, and the configuration that took them."""

    us: float
    config: str = ""


Lookup = Callable[[LayerSpec, Choice], Mapping[str, Timed]]


def no_rows(layer: LayerSpec, choice: Choice) -> Mapping[str, Timed]:
    """Know no latency of anything."""
    return {}


def lookup_of(table: LatencyRows | None, place: Place = CPU) -> Lookup:
    """Return a table's rows as kernel → its time on a layer under a choice; nothing where the table has no row."""
    if table is None:
        return no_rows

    def lookup(layer: LayerSpec, choice: Choice) -> Mapping[str, Timed]:
        try:
            if place.device == "cuda" and isinstance(table, _KernelRows):
                row = table.row(layer, choice)
                return {row.kernel: Timed(row.p50, row.config)}
            return {kernels_for(choice, layer, place)[0]: Timed(table.layer_us(layer, choice))}
        except MissingLatency:
            return {}

    return lookup


def kernels_for(choice: Choice, layer: LayerSpec, place: Place = CPU) -> tuple[Kernel, ...]:
    """Return the kernels that can execute a choice, the one expected to be fastest first and ``dense`` last."""
    if choice.kernel in ("dense", "channels"):
        return ("dense",)
    if place.device == "cpu":
        return (kernel_for(choice)[0], "dense")
    gpu: tuple[Kernel, ...] = ("semi", "ell", "spmm")
    return (*(name for name in gpu if refusal(name, choice, layer, place) is None), "dense")


def refusal(kernel: Kernel, choice: Choice, layer: LayerSpec, place: Place = CPU) -> str | None:
    """Return why a kernel of a GPU cannot execute a choice, or has no use for it; None where it can."""
    if kernel == "semi":
        return semi_refusal(choice, layer, place.dtype)
    if kernel == "ell":
        share = ell_density(choice, layer)
        if shapes.refusal(layer) is None and share > _ELL_OFFERED:
            return f"{share:.0%} of its groups of {_ELL_GROUP[0]} filters x {_ELL_GROUP[1]} channels keep a weight"
        return shapes.refusal(layer)
    if kernel == "spmm":
        return spmm_layers.refusal(layer)
    return None


def ell_density(choice: Choice, layer: LayerSpec) -> float:
    """Return the share of a layer that Block-ELL multiplies under a choice, were its kept units spread at random.

    A group of 32 filters × 8 channels at one tap is multiplied as soon as one of its weights is kept; masks that share
    their decisions over such groups lose nothing.
    """
    shared = (1, 1)
    if isinstance(choice, Pattern):
        shared = choice.share
    elif isinstance(choice, Block):
        shared = (choice.filters, 1)
    sizes = zip(_ELL_GROUP, shared, (layer.filters, layer.channels), strict=True)
    filters, channels = (-(-min(group, size) // min(unit, group)) for group, unit, size in sizes)
    kept: float = 1.0 - (1.0 - choice.density(layer)) ** (filters * channels)
    return kept


def decide(layer: LayerSpec, choice: Choice, place: Place = CPU, lookup: Lookup = no_rows) -> Decision:
    """Return which kernel runs a layer, and why.

    Args:
        layer: Its shape facts.
        choice: One that fits it.
        place: Device and dtype.
        lookup: Measured times by kernel.
    """
    if choice.kernel in ("dense", "channels"):
        return Decision(layer.name, choice.text, "dense", "dense by policy")
    kernels = kernels_for(choice, layer, place)
    if kernels == ("dense",):
        return Decision(layer.name, choice.text, "dense", f"left dense because {_refusals(choice, layer, place)}")
    measured = {name: timed for name, timed in lookup(layer, choice).items() if name in kernels[:-1]}
    dense = lookup(layer, Dense())
    if dense and not measured and place.device == "cuda":
        # Such a table leaves out what not even its floor makes faster than dense.
        why = "left dense because the table has a dense row and none of a sparse kernel"
        return Decision(layer.name, choice.text, "dense", why)
    if not measured or not dense:
        return _expected(layer, choice, kernels, place)
    (best, timed), *others = sorted(measured.items(), key=lambda item: item[1].us)
    dense_us = min(timed.us for timed in dense.values())
    figures = f"{timed.us:.1f} us against {dense_us:.1f} us dense"
    figures += "".join(f", {name} {other.us:.1f} us" for name, other in others)
    if timed.us >= dense_us:
        why = f"left dense because the {best} kernel is not faster: {figures}"
        return Decision(layer.name, choice.text, "dense", why)
    return Decision(layer.name, choice.text, best, f"{best} kernel: {figures}", timed.config)


def _expected(layer: LayerSpec, choice: Choice, kernels: tuple[Kernel, ...], place: Place) -> Decision:
    """Decide without rows: a CPU's sparse kernels win nearly always, a GPU's only below their break-even points."""
    unknown = "the table has no row to compare it by"
    if place.device == "cpu":
        return Decision(layer.name, choice.text, kernels[0], f"kernel of the choice; {unknown}")
    bounds = {"semi": 1.0, "ell": _ELL_EXPECTED, "spmm": _SPMM_EXPECTED}
    shares = {"semi": 0.5, "ell": ell_density(choice, layer), "spmm": choice.density(layer)}
    for name in kernels[:-1]:
        if shares[name] <= bounds[name]:
            why = f"{name} kernel multiplies {shares[name]:.0%} of the layer; {unknown}"
            return Decision(layer.name, choice.text, name, why)
    why = ", ".join(f"{name} multiplies {shares[name]:.0%} and pays below {bounds[name]:.0%}" for name in kernels[:-1])
    return Decision(layer.name, choice.text, "dense", f"left dense because {why}; {unknown}")


def _refusals(choice: Choice, layer: LayerSpec, place: Place) -> str:
    names: tuple[Kernel, ...] = ("semi", "ell", "spmm")
    return "; ".join(f"no {name} kernel: {refusal(name, choice, layer, place)}" for name in names)
