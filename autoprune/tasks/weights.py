"""Weights from files: safetensors, or what ``torch.save`` wrote of a state dict; nothing else is unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.core.errors import ModelError

# Under these keys training scripts keep the state dict beside an optimizer's.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "module")
# What DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
# Counts steps; no output depends on it, and older files lack it.
_COUNTER = "num_batches_tracked"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file, wrappers and prefixes of training scripts taken off.

    Args:
        path: Safetensors, or a file of ``torch.save``.
    Raises:
        ModelError: The file is absent, damaged, or holds more than tensors.
    """
    state = _torch_state(path) if _is_torch_file(path) else _safetensors(path)
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a file into ``model``; every key must match.

    Raises:
        ModelError: The file cannot be read, or keys or shapes differ (the first one is named).
    """
    state = read_weights(path)
    own = model.state_dict()
    for key, tensor in own.items():
        if key not in state:
            if key.endswith(_COUNTER):
                continue
            raise ModelError(f"weights {path}: key '{key}' is missing; these weights are of another model.")
        if state[key].shape != tensor.shape:
            got, want = tuple(state[key].shape), tuple(tensor.shape)
            raise ModelError(f"weights {path}: '{key}' has shape {got}, this model wants {want}.")
    extra = sorted(set(state) - set(own))
    if extra:
        raise ModelError(f"weights {path}: key '{extra[0]}' is unknown to this model.")
    with torch.no_grad():
        model.load_state_dict(state, strict=False)


def _is_torch_file(path: Path) -> bool:
    """Tell by the first bytes: a zip archive, or a bare pickle as torch wrote it before 1.6."""
    try:
        with path.open("rb") as file:
            return file.read(2) in (b"PK", b"\x80\x02")
    except OSError as error:
        raise ModelError(f"weights {path}: cannot be read ({error.strerror}).") from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"weights {path}: cannot be read as safetensors ({error}).") from None


def _torch_state(path: Path) -> dict[str, Tensor]:
    try:
        found: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"weights {path}: holds more than tensors, which is not loaded; save model.state_dict() alone."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"weights {path}: cannot be read as a file of torch.save ({first[:120]}).") from None
    while isinstance(found, Mapping):
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not found:
        raise ModelError(f"weights {path}: holds a {type(found).__name__}, want a state dict (name → tensor).")
    other = next((key for key, value in found.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ModelError(f"weights {path}: '{other}' is a {type(found[other]).__name__}, not a tensor.")
    return {str(key): value for key, value in found.items()}
