"""Search spaces: which choices each layer of a model may take, from rules in YAML.

A file is a list of rules; the first rule that matches a layer decides, and a layer that none matches stays dense.
A rule's choices are grids: every list is spanned against the others, and choices that a layer cannot take are dropped.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from autoprune.core.choices import CHOICE_KINDS, Choice, Dense
from autoprune.core.coupling import Coupling
from autoprune.core.errors import ChoiceError, SpaceError
from autoprune.core.layers import LayerSpec
from autoprune.core.registry import unknown_name
from autoprune.search_spaces.preset import preset_text, presets

__all__ = ["Match", "Rule", "SearchSpace", "SpaceFile", "fingerprint", "load_space", "ordered", "presets"]


def _pair(value: object) -> object:
    """Read ``16x1`` as (16, 1); anything else is left to the field's own check."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", value)):
        return (int(match.group(1)), int(match.group(2)))
    return value


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


Pair: TypeAlias = Annotated[tuple[int, int], BeforeValidator(_pair)]
Fractions: TypeAlias = Annotated[
    list[Annotated[float, Field(gt=0.0, le=1.0)]], BeforeValidator(_listed), Field(min_length=1)
]
Counts: TypeAlias = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_listed), Field(min_length=1)]
Pairs: TypeAlias = Annotated[list[Pair], BeforeValidator(_listed), Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Grid(_Strict):
    """A kind with a list of values per field; ``expand`` spans them."""

    kind: str

    def expand(self) -> list[Choice]:
        """Return every choice of the grid."""
        names = [name for name in type(self).model_fields if name != "kind"]
        values = [getattr(self, name) for name in names]
        cls = CHOICE_KINDS[self.kind]
        return [cls(**dict(zip(names, combination, strict=True))) for combination in itertools.product(*values)]


class _DenseGrid(_Grid):
    kind: Literal["dense"]


class _BlockGrid(_Grid):
    kind: Literal["block"]
    keep: Fractions
    filters: Counts = [16]


class _PatternGrid(_Grid):
    kind: Literal["pattern"]
    count: Counts
    entries: Counts = [4]
    kernels: Fractions = [1.0]
    share: Pairs = [(1, 1)]


class _FineGrid(_Grid):
    kind: Literal["fine"]
    keep: Fractions


class _TileGrid(_Grid):
    kind: Literal["tile"]
    keep: Fractions
    size: Counts = [4]


class _CKGrid(_Grid):
    kind: Literal["ck"]
    keep: Fractions


class _WindowGrid(_Grid):
    kind: Literal["window"]
    entries: Counts


class _CombinedGrid(_Grid):
    kind: Literal["combined"]
    keep: Fractions
    fraction: Fractions = [0.8]


class _NMGrid(_Grid):
    kind: Literal["nm"]
    n: Counts
    m: Counts


class _ChannelsGrid(_Grid):
    kind: Literal["channels"]
    keep: Fractions


_AnyGrid: TypeAlias = Annotated[
    _DenseGrid
    | _BlockGrid
    | _PatternGrid
    | _FineGrid
    | _TileGrid
    | _CKGrid
    | _WindowGrid
    | _CombinedGrid
    | _NMGrid
    | _ChannelsGrid,
    Field(discriminator="kind"),
]


class Match(_Strict):
    """Which layers a rule is for; every field given must hold, an empty match takes every layer.

    Attributes:
        op: ``conv`` or ``linear``.
        window: Window size such as ``3x3``.
        name: Shell pattern over the layer's dotted name, such as ``layer3.*``.
        position: ``first`` or ``last`` of all layers in execution order.
    """

    op: Literal["conv", "linear"] | None = None
    window: Pair | None = None
    name: str | None = None
    position: Literal["first", "last"] | None = None

    def takes(self, layer: LayerSpec, index: int, total: int) -> bool:
        """Return whether the rule is for this layer, the ``index``-th of ``total``."""
        return (
            (self.op is None or self.op == layer.op)
            and (self.window is None or self.window == layer.window)
            and (self.name is None or fnmatch.fnmatchcase(layer.name, self.name))
            and (self.position is None or index == (0 if self.position == "first" else total - 1))
        )


class Rule(_Strict):
    """One rule: the layers it is for, and what they may become."""

    match: Match = Match()
    choices: Annotated[list[_AnyGrid], Field(min_length=1)]


class SpaceFile(_Strict):
    """The YAML form of a search space."""

    name: str
    rules: Annotated[list[Rule], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Layers of a model, and the ordered choices of each.

    Attributes:
        layers: Every conv and linear layer, in execution order.
        choices: Layer name → its choices: ``Dense()`` first, then by falling density, then by text.
        name: Of the preset or file it came from.
        coupling: Channel groups of the model; empty where no channels are searched.
    Raises:
        SpaceError: No layer, a name twice, or a layer's choices not in that order.
        ChoiceError: A layer cannot take one of its choices.
    """

    layers: tuple[LayerSpec, ...]
    choices: Mapping[str, tuple[Choice, ...]]
    name: str = "custom"
    coupling: Coupling = field(default_factory=Coupling)

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if not names:
            raise SpaceError(f"search space '{self.name}': the model has no layer; trace a model with conv layers.")
        if len(set(names)) != len(names) or set(names) != set(self.choices):
            raise SpaceError(f"search space '{self.name}': layers and choices must name the same layers, each once.")
        for layer in self.layers:
            choices = self.choices[layer.name]
            for choice in choices:
                if not choice.fits(layer):
                    raise ChoiceError(f"layer '{layer.name}' cannot take {choice.text}; leave it out of its choices.")
            if tuple(ordered(layer, choices)) != choices:
                raise SpaceError(
                    f"search space '{self.name}': choices of '{layer.name}' must be dense, then by falling density, "
                    "each once."
                )

    @property
    def searched(self) -> tuple[LayerSpec, ...]:
        """Layers with more than one choice, in execution order."""
        return tuple(layer for layer in self.layers if len(self.choices[layer.name]) > 1)

    @property
    def fingerprint(self) -> str:
        """Short hash of the layers' names, shapes and choices; equal spaces have equal ones."""
        return fingerprint(self.layers, self.choices)


def fingerprint(layers: Iterable[LayerSpec], choices: Mapping[str, Sequence[Choice]]) -> str:
    """Return a short hash of the layers' names and signatures and of each one's choices, in order."""
    lines = [f"{layer.name} {layer.signature} {' '.join(c.text for c in choices[layer.name])}" for layer in layers]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def ordered(layer: LayerSpec, choices: Iterable[Choice]) -> list[Choice]:
    """Return the choices that the layer can take, each once: dense (always), then by falling density, then by text."""
    sparse = {choice for choice in choices if choice.fits(layer) and choice != Dense() and not layer.fixed}
    return [Dense(), *sorted(sparse, key=lambda choice: (-choice.density(layer), choice.text))]


def load_space(source: str | Path, layers: Iterable[LayerSpec]) -> SearchSpace:
    """Return the space that a preset or a YAML file spans over the layers.

    Args:
        source: Name of a preset, or path of a file (told by its ``.yaml``/``.yml`` ending or a path separator).
        layers: What ``trace`` returned.
    Raises:
        UnknownName: No such preset.
        SpaceError: The file is unreadable or a field of it is wrong; the field's path is named.
    """
    specs = tuple(layers)
    text, where = _read(source)
    file = _parse(text, where)
    choices: dict[str, tuple[Choice, ...]] = {}
    for index, layer in enumerate(specs):
        rule = next((rule for rule in file.rules if rule.match.takes(layer, index, len(specs))), None)
        grids = rule.choices if rule is not None else []
        choices[layer.name] = tuple(ordered(layer, (choice for grid in grids for choice in grid.expand())))
    return SearchSpace(specs, choices, file.name)


def _read(source: str | Path) -> tuple[str, str]:
    name = str(source)
    if isinstance(source, Path) or name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        try:
            return Path(source).read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise SpaceError(f"search space {name}: cannot be read ({reason}).") from None
    if name not in presets():
        raise unknown_name("search space", name, presets())
    return preset_text(name), name


def _parse(text: str, where: str) -> SpaceFile:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        raise SpaceError(f"search space {where}: not YAML{line}; check indentation and brackets.") from None
    try:
        file = SpaceFile.model_validate(data)
        for index, rule in enumerate(file.rules):
            for place, grid in enumerate(rule.choices):
                _check_grid(grid, f"rules.{index}.choices.{place}")
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        got = _short(first["input"])
        raise SpaceError(f"search space {where}: field '{path}': {first['msg']}; got {got}.") from None
    except _GridError as error:
        raise SpaceError(f"search space {where}: {error}") from None
    return file


class _GridError(ValueError):
    """A grid whose values no choice accepts."""


def _check_grid(grid: _Grid, path: str) -> None:
    try:
        grid.expand()
    except ChoiceError as error:
        raise _GridError(f"field '{path}': {error}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
