"""A pruned network in a folder: its weights as safetensors, and a JSON file by which the user's code rebuilds it.

    autoprune.save(model, smaller, "small/")                 # model: as your code builds it
    network = autoprune.load("small/", model=your_factory)   # the same outputs as ``smaller``, no pickle
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.core.errors import ModelError, RunError
from autoprune.core.rundir import atomic_path, write_text
from autoprune.export.architecture import Architecture, Form, describe, file_digest, read_architecture, rebuild
from autoprune.export.packing import pack, pays, unpack

ARCHITECTURE = "architecture.json"
WEIGHTS = "weights.safetensors"

Factory = Callable[[], nn.Module]


def save(
    model: nn.Module,
    smaller: nn.Module,
    folder: str | Path,
    *,
    form: Form = "compact",
    names: tuple[str, str] = ("", ""),
    policy: Mapping[str, str] | None = None,
) -> Architecture:
    """Write ``smaller`` so that ``load`` rebuilds it from the user's own code, and return what was written of it.

    Args:
        model: As the user's code builds it, with the weights ``smaller`` was made from.
        smaller: Pruned: zeros in its weights, or modules shrunk in place by whatever tool.
        folder: Made if absent; files of an earlier network there are replaced.
        form: ``packed`` stores nonzero values alone; the others store whole tensors.
        names: Model and data, as on the command line; what is built where ``load`` is given no factory.
        policy: Layer → choice text, for the record.
    Raises:
        ModelError: Modules were added, removed or exchanged.
        RunError: The folder cannot be written.
    """
    architecture = describe(model, smaller, form)
    architecture.model, architecture.data = names
    architecture.policy = dict(policy or {})
    tensors: dict[str, Tensor] = {}
    for name, value in smaller.state_dict().items():
        if name in architecture.aliases:
            continue
        if form == "packed" and pays(value):
            architecture.tensors[name].packed = True
            tensors |= pack(name, value)
        else:
            tensors[name] = value.detach().cpu().contiguous()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary)
    except OSError as error:
        raise RunError(f"cannot write {folder} ({error.strerror}); choose another --out.") from None
    architecture.weights_sha256 = file_digest(folder / WEIGHTS)
    write_text(folder / ARCHITECTURE, architecture.model_dump_json(indent=1, exclude_defaults=False) + "\n")
    return architecture


def load(folder: str | Path, model: nn.Module | Factory | None = None) -> nn.Module:
    """Return the network that ``save`` or ``autoprune apply`` wrote, in eval mode on the CPU.

    Args:
        folder: Of both files.
        model: The user's network or the function that builds it, untouched by pruning; None builds the network by
            the names that were recorded. Its weights do not matter.
    Raises:
        ModelError: A file is absent or damaged, or the model is another one; the first difference is named.
    """
    folder = Path(folder)
    architecture = read_architecture(folder / ARCHITECTURE)
    network = rebuild(_base(model, architecture), architecture)
    state = _read_weights(folder / WEIGHTS, architecture)
    try:
        with torch.no_grad():
            network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder / WEIGHTS} does not fit {ARCHITECTURE}: {reason}") from None
    return network.eval()


def _base(model: nn.Module | Factory | None, architecture: Architecture) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if model is not None:
        made = model()
        if not isinstance(made, nn.Module):
            raise ModelError(f"model=: the factory returned a {type(made).__name__}, want a torch.nn.Module.")
        return made
    if not architecture.model:
        raise ModelError("the stored network was saved without a name; give model=, the function that builds it.")
    from autoprune.tasks.networks import untrained

    network, _ = untrained(architecture.model, architecture.data or "fashion-mnist")
    return network


def _read_weights(path: Path, architecture: Architecture) -> dict[str, Tensor]:
    try:
        stored = load_file(path)
        digest = file_digest(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}); apply the policy again.") from None
    if architecture.weights_sha256 not in ("", digest):
        raise ModelError(f"{path} is not the file that {ARCHITECTURE} was written with; apply the policy again.")
    state: dict[str, Tensor] = {}
    for name, delta in architecture.tensors.items():
        source = architecture.aliases.get(name, name)
        if architecture.tensors[source].packed:
            state[name] = state[source] if source in state else unpack(source, delta.shape, stored)
        elif source in stored:
            state[name] = stored[source]
        else:
            raise ModelError(f"{path}: '{source}' is missing; apply the policy again.")
    return state
