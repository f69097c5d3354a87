"""A network as a ``torch.export`` program, and what every exported file is checked by."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.errors import MeasurementError, ModelError
from autoprune.core.rundir import atomic_path
from autoprune.kernels.modules import FrozenModule

# Outputs of an exported file against the network's, relative to the largest output.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: Where.
        size_bytes: Of the file.
        any_batch: Whether it takes any number of images; else one.
        difference: Largest difference of its outputs from the network's, relative to the largest output or 1.
    """

    path: Path
    size_bytes: int
    any_batch: bool
    difference: float


def refuse_converted(model: nn.Module, target: str) -> None:
    """Refuse a network that runs on autoprune's own kernels.

    Raises:
        ModelError: It is one, or holds one.
    """
    if any(isinstance(module, FrozenModule) for module in model.modules()):
        raise ModelError(
            f"{target} cannot hold a converted network: its sparse kernels are autoprune's own; export the network it "
            "was converted from, whose sparse layers become dense ones with zeros."
        )


def check_outputs(model: nn.Module, images: Tensor, found: np.ndarray, where: str) -> float:
    """Return the largest difference of ``found`` from the network's outputs, relative to the largest output or 1.

    Raises:
        MeasurementError: It is above ``TOLERANCE`` or no number.
    """
    with torch.inference_mode():
        want = model.eval()(images).numpy()
    difference = float(np.abs(found - want).max()) / max(1.0, float(np.abs(want).max()))
    if not difference <= TOLERANCE:
        raise MeasurementError(
            f"in {where} the exported network's outputs differ from the network's by {difference:.2g} (at most "
            f"{TOLERANCE:g} is allowed); nothing was written."
        )
    return difference


def export_program(model: nn.Module, images: Tensor, path: str | Path) -> Exported:
    """Write a network as a ``torch.export`` program (``torch.export.load`` reads it), and check it.

    Args:
        model: float32, on the CPU; not modified.
        images: (N, C, H, W) float32, N ≥ 2: what its outputs are compared on.
        path: Of the file; its name must end in ``.pt2``.
    Raises:
        ModelError: The network cannot be exported, or it is a converted one; or another suffix.
        MeasurementError: The file's outputs are not the network's.
    """
    refuse_converted(model, "torch.export")
    path = Path(path)
    if path.suffix != ".pt2":
        raise ModelError(f"--torch-export {path}: torch.export writes .pt2 files; give a name that ends in .pt2.")
    network = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own dependencies
        program, any_batch = _program(network, images)
        content = io.BytesIO()
        torch.export.save(program, content)
        content.seek(0)
        loaded = torch.export.load(content).module()
    parts = torch.split(images, len(images) if any_batch else 1)
    with torch.inference_mode():
        found = torch.cat([loaded(part) for part in parts]).numpy()
    difference = check_outputs(model, images, found, "torch.export")
    write_bytes(path, content.getvalue())
    return Exported(path, path.stat().st_size, any_batch, difference)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        ModelError: The folder cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise ModelError(f"cannot write {path} ({error.strerror}); choose another file.") from None


def _program(network: nn.Module, images: Tensor) -> tuple[torch.export.ExportedProgram, bool]:
    try:
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        return torch.export.export(network, (images[:2],), dynamic_shapes=shapes), True
    except Exception:  # code that reads its batch size as a number exports for one size alone
        try:
            return torch.export.export(network, (images[:1],)), False
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ModelError(f"the model cannot be exported by torch.export: {reason[:160]}") from None


def program_cases(models: dict[str, nn.Module], images: Tensor) -> dict[str, Callable[[], object]]:
    """Return name → a call that runs that network in PyTorch on the images, to be timed in turn."""

    def call(model: nn.Module) -> Callable[[], object]:
        network = copy.deepcopy(model).eval()

        def run() -> object:
            with torch.inference_mode():
                return network(images)

        return run

    return {name: call(model) for name, model in models.items()}
