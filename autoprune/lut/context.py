"""Where and how a table's rows were measured: a table holds for exactly one context."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from autoprune.lut.measure import isa_level, machine

_CPU_VERSIONS = ("python", "torch", "numba")
_GPU_DTYPE = "bfloat16"


class Context(BaseModel):
    """Everything a row's time depends on besides layer and choice.

    Attributes:
        device: ``cpu`` or ``cuda``.
        cpu, isa, threads: Of a CPU's table; empty and 1 of a GPU's, whose rows are replayed without the host.
        gpu, driver: Of a GPU's table: the device's name, and the driver's version.
        batch: Images per call of the network.
        dtype: Of maps and weights.
        layout: Memory format of the maps.
        direction: ``forward``, or ``training``: forward and both gradients.
        cache: Whether a row finds its maps in cache (``warm``), never (``cold``), or as the layer does in a network:
            warm exactly when its maps fit the GPU's second-level cache (``network``).
        epilogue: What is part of every row, dense too.
        versions: Of the software that a row depends on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    cpu: str = ""
    isa: str = ""
    threads: int = 1
    batch: int
    dtype: str = "float32"
    layout: str = "channels_last"
    direction: Literal["forward", "training"] = "forward"
    cache: Literal["warm", "cold", "network"] = "warm"
    gpu: str = ""
    driver: str = ""
    epilogue: str = "bias+relu"
    versions: tuple[tuple[str, str], ...] = ()

    @model_serializer(mode="wrap")
    def _plain(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Fields that came later are left out where they say nothing new, so that older files keep form and hash.
        fields: dict[str, Any] = serialize(self)
        later = {"gpu": "", "driver": "", "epilogue": "bias+relu"}
        return {name: value for name, value in fields.items() if name not in later or value != later[name]}

    @property
    def place(self) -> str:
        """The machine in words: processor or GPU, with threads where they count."""
        return self.gpu if self.device == "cuda" else f"{self.cpu} ({self.threads} threads)"


def current_context(
    batch: int = 1, threads: int = 1, device: str = "cpu", direction: Literal["forward", "training"] = "forward"
) -> Context:
    """Return the context of measurements made here and now.

    Args:
        batch: Images per call.
        threads: Of a CPU; a GPU's rows do not depend on it.
        device: ``cpu`` or ``cuda``.
        direction: Forward alone, or a training step.
    """
    if device == "cuda":
        return _gpu_context(batch, direction)
    facts = machine()
    versions = tuple((name, str(facts[name])) for name in _CPU_VERSIONS)
    return Context(
        device="cpu",
        cpu=str(facts["cpu"]),
        isa=isa_level(),
        threads=threads,
        batch=batch,
        direction=direction,
        versions=versions,
    )


def _gpu_context(batch: int, direction: Literal["forward", "training"]) -> Context:
    import torch

    from autoprune.lut.gpu_facts import driver_version

    facts = {
        "torch": version("torch"),
        "triton": _installed("triton"),
        "cuda": str(torch.version.cuda or "none"),
        "cudnn": str(torch.backends.cudnn.version() or "none"),  # type: ignore[no-untyped-call]
    }
    return Context(
        device="cuda",
        gpu=torch.cuda.get_device_name(),
        driver=driver_version(),
        batch=batch,
        dtype=_GPU_DTYPE,
        direction=direction,
        cache="network",
        versions=tuple(facts.items()),
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
