"""The layer database on disk: a folder of safetensors, one file of input moments per layer, one per layer and scheme.

The folder belongs to one model and its data; a file is named after everything else its contents depend on. So a build
that was killed goes on where it was, and a later run reuses what it shares with earlier ones, whatever its space.
Tensors are mapped into memory, not read: a database larger than memory can be used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoprune.core.choices import Choice
from autoprune.core.layers import LayerSpec
from autoprune.core.rundir import atomic_path, make_folder, run_name


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of a layer's inputs: mean (D,), ``E[x xᵀ]`` (D, D), both float32, D = C·R·S."""

    mean_D: Tensor
    second_DD: Tensor


class DatabaseStore:
    """Files of one model's layer database.

    Args:
        folder: Made if absent.
    Raises:
        RunError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self._folder = folder

    def moments(self, layer: LayerSpec) -> Moments | None:
        """Return a layer's moments, or None when there are none that can be read."""
        tensors = _read(self._path("moments", layer, ()))
        return None if tensors is None else Moments(tensors["mean"], tensors["second"])

    def save_moments(self, layer: LayerSpec, moments: Moments) -> None:
        """Keep a layer's moments."""
        _write(self._path("moments", layer, ()), {"mean": moments.mean_D, "second": moments.second_DD})

    def weights(self, layer: LayerSpec, family: Sequence[Choice]) -> dict[Choice, Tensor] | None:
        """Return the weights of one scheme's choices, or None when they are not all there.

        They depend on each other, since sparser ones are made from denser ones: only the same set of choices is theirs.
        """
        tensors = _read(self._path("weights", layer, family))
        return None if tensors is None else {choice: tensors[choice.text] for choice in family}

    def save_weights(self, layer: LayerSpec, made: Mapping[Choice, Tensor]) -> None:
        """Keep the weights of one scheme's choices."""
        _write(self._path("weights", layer, list(made)), {choice.text: tensor for choice, tensor in made.items()})

    def _path(self, part: str, layer: LayerSpec, family: Sequence[Choice]) -> Path:
        text = "\n".join([layer.name, layer.signature, *sorted(choice.text for choice in family)])
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._folder / f"{run_name(part, layer.name)[:80]}-{digest}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None  # absent, or damaged: it is made again


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
