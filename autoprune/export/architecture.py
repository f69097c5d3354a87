"""What a shrunk network differs in from the one the user's own code builds: shapes, kept indices, module attributes.

It is found by comparing the two, so it works with whatever shrinks modules in place, and it is JSON: rebuilding runs
the user's code and nothing that came out of a file.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.export.kept import Kept, agreed

SCHEMA_VERSION = 1
Form = Literal["masked", "compact", "packed"]
FORMS: tuple[Form, ...] = ("masked", "compact", "packed")
Scalar = bool | int | float | str | None
Attribute = Scalar | list[Scalar]


class TensorDelta(BaseModel):
    """One parameter or buffer.

    Attributes:
        shape: In the stored network.
        before: In the user's network; None where it is the same or ``absent``.
        absent: Whether the user's network has no such tensor (a bias that takes up what removed channels emitted).
        kept: Of each dimension the indices that stayed (None: all); None where the values do not tell.
        packed: Whether the file holds its nonzero values and a bit per place.
    """

    model_config = ConfigDict(extra="forbid")

    shape: list[int]
    before: list[int] | None = None
    absent: bool = False
    kept: list[list[int] | None] | None = None
    packed: bool = False


class Architecture(BaseModel):
    """The JSON file beside the weights.

    Attributes:
        model, data: Names, as on the command line; what is built where no factory is given.
        tensors: Every entry of the stored network's state dict.
        modules: Module → attributes that differ from the user's network.
        aliases: Tensors that are another one by a second name.
        policy: Layer → choice.
        weights_sha256: Of the weights' file.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    form: Form
    model: str = ""
    data: str = ""
    tensors: dict[str, TensorDelta]
    modules: dict[str, dict[str, Attribute]] = Field(default_factory=dict)
    aliases: dict[str, str] = Field(default_factory=dict)
    policy: dict[str, str] = Field(default_factory=dict)
    weights_sha256: str = ""

    @property
    def shrunk(self) -> dict[str, TensorDelta]:
        """The tensors that are smaller than in the user's network, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.before is not None}


def describe(model: nn.Module, smaller: nn.Module, form: Form = "compact") -> Architecture:
    """Return how ``smaller`` differs from ``model``.

    Args:
        model: As the user's code builds it, with the weights that ``smaller`` came from (they tell what stayed).
        smaller: The same modules, some of them shrunk in place.
        form: What it is called.
    Raises:
        ModelError: A module was added, removed or exchanged, or a tensor grew.
    """
    _check_modules(model, smaller)
    old, new = _tensors(model), _tensors(smaller)
    kept: dict[str, Kept | None] = {}
    for names in _by_module(new).values():
        pairs = {name: (old[name], new[name]) for name in names if name in old and old[name].shape != new[name].shape}
        kept.update(agreed(pairs))
    tensors = {name: _delta(name, old.get(name), tensor, kept.get(name)) for name, tensor in new.items()}
    lost = next((name for name in old if name not in new), None)
    if lost is not None:
        raise ModelError(f"'{lost}' is gone from the shrunk network; only modules shrunk in place can be described.")
    return Architecture(form=form, tensors=tensors, modules=_changed_attributes(model, smaller), aliases=_aliases(new))


def rebuild(model: nn.Module, architecture: Architecture) -> nn.Module:
    """Return a copy of the user's network with the shapes of the stored one; its values are still to be loaded.

    Raises:
        ModelError: The architecture is of another network; the first difference is named.
    """
    network = copy.deepcopy(model)
    _check_same(_tensors(network), architecture)
    replaced: dict[int, nn.Parameter] = {}
    for name, delta in architecture.tensors.items():
        if delta.before is not None or delta.absent:
            _reshape(network, name, delta, replaced)
    for name, attributes in architecture.modules.items():
        _set_attributes(network, name, attributes)
    return network


def read_architecture(path: Path) -> Architecture:
    """Read the JSON file.

    Raises:
        ModelError: It is absent, damaged, or of a newer schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise ModelError(f"{path}: cannot be read ({why}); give the folder that `autoprune apply` wrote.") from None
    try:
        found = Architecture.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ModelError(f"{path}: field '{where}': {first['msg']}; apply the policy again.") from None
    if found.schema_version > SCHEMA_VERSION:
        got = found.schema_version
        raise ModelError(f"{path}: schema version {got} is newer than {SCHEMA_VERSION}; upgrade autoprune.")
    return found


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))


def _by_module(tensors: dict[str, Tensor]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in tensors:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def _delta(name: str, old: Tensor | None, new: Tensor, kept: Kept | None) -> TensorDelta:
    shape = list(new.shape)
    if old is None:
        return TensorDelta(shape=shape, absent=True)
    if old.shape == new.shape:
        return TensorDelta(shape=shape)
    if old.dim() != new.dim() or any(after > before for before, after in zip(old.shape, new.shape, strict=True)):
        shapes = f"{tuple(old.shape)} to {tuple(new.shape)}"
        raise ModelError(f"'{name}' went from {shapes}; a shrunk network only loses parts.")
    indices = None if kept is None else [None if index is None else list(index) for index in kept]
    return TensorDelta(shape=shape, before=list(old.shape), kept=indices)


def _check_modules(model: nn.Module, smaller: nn.Module) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    after = {name: type(module) for name, module in smaller.named_modules()}
    for name in {**before, **after}:
        if before.get(name) is not after.get(name):
            kinds = [kind.__name__ if kind is not None else "nothing" for kind in (before.get(name), after.get(name))]
            raise ModelError(
                f"module '{name}' is {kinds[0]} in the network and {kinds[1]} in the shrunk one; only modules shrunk "
                "in place can be described."
            )


def _aliases(tensors: dict[str, Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first[id(tensor)] for name, tensor in tensors.items() if first.setdefault(id(tensor), name) != name}


def _attributes(module: nn.Module) -> dict[str, Attribute]:
    """Return a module's own numbers and words, those that JSON can hold."""
    found: dict[str, Attribute] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if _is_scalar(value):
            found[name] = value
        elif isinstance(value, list | tuple) and all(_is_scalar(part) for part in value):
            found[name] = list(value)
    return found


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _changed_attributes(model: nn.Module, smaller: nn.Module) -> dict[str, dict[str, Attribute]]:
    changed: dict[str, dict[str, Attribute]] = {}
    modules = dict(model.named_modules())
    for name, module in smaller.named_modules():
        before = _attributes(modules[name])
        own = {key: value for key, value in _attributes(module).items() if key in before and before[key] != value}
        if own:
            changed[name] = own
    return changed


def _check_same(own: dict[str, Tensor], architecture: Architecture) -> None:
    for name, delta in architecture.tensors.items():
        if name not in own:
            if delta.absent:
                continue
            raise ModelError(f"the stored network has '{name}', this model has not; give the factory it was made from.")
        want = delta.before if delta.before is not None else delta.shape
        if list(own[name].shape) != want:
            got = tuple(own[name].shape)
            raise ModelError(f"'{name}' is {got} in this model, {tuple(want)} in the one stored; give its own factory.")
    extra = next((name for name in own if name not in architecture.tensors), None)
    if extra is not None:
        raise ModelError(f"this model has '{extra}', the stored network has not; give the factory it was made from.")


def _reshape(network: nn.Module, name: str, delta: TensorDelta, replaced: dict[int, nn.Parameter]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = network.get_submodule(path)
    old = getattr(owner, leaf, None)
    if delta.absent:
        if leaf not in owner._parameters or old is not None:
            kind = type(owner).__name__
            raise ModelError(f"the stored network has '{name}', which a {kind} of this model cannot take.")
        like = next(iter(owner.parameters(recurse=False)))
        setattr(owner, leaf, nn.Parameter(like.new_zeros(delta.shape), requires_grad=like.requires_grad))
        return
    assert isinstance(old, Tensor)
    if isinstance(old, nn.Parameter):
        # A weight that two modules share stays shared.
        fresh = nn.Parameter(old.detach().new_zeros(delta.shape), requires_grad=old.requires_grad)
        setattr(owner, leaf, replaced.setdefault(id(old), fresh))
    else:
        setattr(owner, leaf, old.new_zeros(delta.shape))


def _set_attributes(network: nn.Module, name: str, attributes: dict[str, Attribute]) -> None:
    try:
        module = network.get_submodule(name)
    except AttributeError:
        raise ModelError(f"the stored network has a module '{name}', this model has not; give its factory.") from None
    own = _attributes(module)
    for key, value in attributes.items():
        if key not in own:
            raise ModelError(f"module '{name}' of this model has no attribute '{key}' to set; give its own factory.")
        kind = type(vars(module)[key])
        setattr(module, key, kind(value) if isinstance(value, list) and kind in (list, tuple, torch.Size) else value)
