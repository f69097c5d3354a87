"""What may be done to one layer, and its one canonical text form.

A choice is written ``kind(field=value,…)`` with every field spelt out in a fixed order, for example
``pattern(count=8,entries=4,kernels=0.5,share=16x1)``; ``parse_choice(choice.text) == choice`` always.
Fractions say what is *kept* (density, 0 < d ≤ 1). ``share=FxC`` says how many filters × input channels use one mask.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from autoprune.core.errors import ChoiceError
from autoprune.core.layers import LayerSpec
from autoprune.core.registry import unknown_name

Kernel = Literal["dense", "block", "csr", "channels"]


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """Base of all choices; subclasses add their fields and are registered in ``CHOICE_KINDS``."""

    kind: ClassVar[str]

    @property
    def text(self) -> str:
        """Canonical text form."""
        parts = ",".join(f"{f.name}={_format(getattr(self, f.name))}" for f in fields(self))
        return f"{self.kind}({parts})" if parts else self.kind

    def __str__(self) -> str:
        return self.text

    def density(self, layer: LayerSpec) -> float:
        """Return the nominal fraction of the layer's weights that stay, 0..1."""
        raise ChoiceError(f"choice '{self.text}' has no density for layer '{layer.name}'")

    def fits(self, layer: LayerSpec) -> bool:
        """Return whether the layer can take this choice at all."""
        return layer.groups == 1

    @property
    def kernel(self) -> Kernel:
        """Which kernel family executes the choice on a CPU."""
        return "csr"


def _check_fraction(choice: Choice, field: str) -> None:
    value = getattr(choice, field)
    if not (isinstance(value, float) and math.isfinite(value) and 0.0 < value <= 1.0):
        raise ChoiceError(f"{choice.kind}({field}={value}): a kept fraction must be above 0 and at most 1.")


@dataclass(frozen=True, slots=True, order=True)
class Dense(Choice):
    """The layer as it is."""

    kind: ClassVar[str] = "dense"

    def density(self, layer: LayerSpec) -> float:
        return 1.0

    def fits(self, layer: LayerSpec) -> bool:
        return True

    @property
    def kernel(self) -> Kernel:
        return "dense"


@dataclass(frozen=True, slots=True, order=True)
class Block(Choice):
    """Blocks of ``filters`` consecutive filters × 1 weight position, kept or dropped together.

    Attributes:
        keep: Fraction of blocks kept.
        filters: 16 or 32.
    """

    kind: ClassVar[str] = "block"
    keep: float
    filters: int = 16

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")
        if self.filters not in (16, 32):
            raise ChoiceError(f"block(filters={self.filters}): allowed are 16 and 32.")

    def density(self, layer: LayerSpec) -> float:
        return self.keep

    def fits(self, layer: LayerSpec) -> bool:
        return layer.groups == 1 and layer.filters >= self.filters

    @property
    def kernel(self) -> Kernel:
        return "block"


@dataclass(frozen=True, slots=True, order=True)
class Pattern(Choice):
    """Each kept kernel uses one of ``count`` patterns with ``entries`` of its window's weights.

    Attributes:
        count: Size of the layer's pattern pool: 4, 8 or 12.
        entries: Weights kept in a window; 4 of 9 in ClickTrain and PatDNN.
        kernels: Fraction of kernels kept (connectivity); 1 keeps all.
        share: Filters × input channels that use one pattern and live or die together.
    """

    kind: ClassVar[str] = "pattern"
    count: int
    entries: int = 4
    kernels: float = 1.0
    share: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        _check_fraction(self, "kernels")
        if self.count not in (4, 8, 12):
            raise ChoiceError(f"pattern(count={self.count}): allowed are 4, 8 and 12.")
        if not 1 <= self.entries <= 9:
            raise ChoiceError(f"pattern(entries={self.entries}): allowed are 1 to 9.")
        if min(self.share) < 1:
            raise ChoiceError(f"pattern(share={_format(self.share)}): both numbers must be at least 1.")

    def density(self, layer: LayerSpec) -> float:
        return self.kernels * self.entries / math.prod(layer.window)

    def fits(self, layer: LayerSpec) -> bool:
        shared_ok = layer.filters >= self.share[0] and layer.channels >= self.share[1]
        return layer.groups == 1 and layer.window == (3, 3) and shared_ok

    @property
    def kernel(self) -> Kernel:
        return "block" if self.share[0] % 16 == 0 else "csr"


@dataclass(frozen=True, slots=True, order=True)
class Fine(Choice):
    """Single weights ranked in the layer."""

    kind: ClassVar[str] = "fine"
    keep: float

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")

    def density(self, layer: LayerSpec) -> float:
        return self.keep


@dataclass(frozen=True, slots=True, order=True)
class Tile(Choice):
    """Square tiles of a linear layer's weight, kept or dropped together; tiles at a short edge are smaller.

    Attributes:
        keep: Fraction of tiles kept.
        size: Rows and columns of a tile, 2 to 4 (Campfire's FC blocks, METHODS §1).
    """

    kind: ClassVar[str] = "tile"
    keep: float
    size: int = 4

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")
        if not 2 <= self.size <= 4:
            raise ChoiceError(f"tile(size={self.size}): allowed are 2 to 4.")

    def density(self, layer: LayerSpec) -> float:
        return self.keep

    def fits(self, layer: LayerSpec) -> bool:
        return layer.op == "linear"


@dataclass(frozen=True, slots=True, order=True)
class CK(Choice):
    """Campfire's whole kernels: the (filter, channel) slices with the largest score stay."""

    kind: ClassVar[str] = "ck"
    keep: float

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")

    def density(self, layer: LayerSpec) -> float:
        return self.keep

    def fits(self, layer: LayerSpec) -> bool:
        return layer.groups == 1 and layer.op == "conv" and math.prod(layer.window) > 1


@dataclass(frozen=True, slots=True, order=True)
class Window(Choice):
    """Campfire's window: every kernel keeps its ``entries`` largest weights."""

    kind: ClassVar[str] = "window"
    entries: int

    def __post_init__(self) -> None:
        if not 1 <= self.entries <= 49:
            raise ChoiceError(f"window(entries={self.entries}): allowed are 1 to 49.")

    def density(self, layer: LayerSpec) -> float:
        return min(1.0, self.entries / math.prod(layer.window))

    def fits(self, layer: LayerSpec) -> bool:
        return layer.groups == 1 and layer.op == "conv" and math.prod(layer.window) > self.entries


@dataclass(frozen=True, slots=True, order=True)
class Combined(Choice):
    """Campfire's combined scheme: window pruning first, then whole kernels until ``keep`` is reached.

    Attributes:
        keep: Fraction of weights kept in the end.
        fraction: Share of the sparsity that the window phase takes; .8 in the paper.
    """

    kind: ClassVar[str] = "combined"
    keep: float
    fraction: float = 0.8

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")
        _check_fraction(self, "fraction")

    def density(self, layer: LayerSpec) -> float:
        return self.keep

    def fits(self, layer: LayerSpec) -> bool:
        return layer.groups == 1 and layer.op == "conv" and math.prod(layer.window) > 1


@dataclass(frozen=True, slots=True, order=True)
class NM(Choice):
    """N of every M consecutive input channels (at one filter and window position) keep their weight; 2:4 is usual.

    Attributes:
        n: Weights kept in a group.
        m: Size of a group; divides the layer's input channels.
    """

    kind: ClassVar[str] = "nm"
    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= 32:
            raise ChoiceError(f"nm(n={self.n},m={self.m}): allowed are 1 <= n < m <= 32.")

    def density(self, layer: LayerSpec) -> float:
        return self.n / self.m

    def fits(self, layer: LayerSpec) -> bool:
        return layer.groups == 1 and layer.channels % self.m == 0


@dataclass(frozen=True, slots=True, order=True)
class Channels(Choice):
    """Whole filters: ``keep`` of the layer's output channels stay, and what reads the others is removed with them.

    The width that results is ``Channels.width``; layers that are coupled (residual adds, concatenations) must keep
    the same filters.
    """

    kind: ClassVar[str] = "channels"
    keep: float

    def __post_init__(self) -> None:
        _check_fraction(self, "keep")

    def width(self, filters: int) -> int:
        """Return how many of ``filters`` stay: what is removed is rounded down, and at least one stays."""
        return min(filters, max(1, filters - math.floor((1.0 - self.keep) * filters + 1e-6)))

    def density(self, layer: LayerSpec) -> float:
        return self.width(layer.filters) / layer.filters

    @property
    def kernel(self) -> Kernel:
        return "channels"


CHOICE_KINDS: dict[str, type[Choice]] = {
    cls.kind: cls for cls in (Dense, Block, Pattern, Fine, Tile, CK, Window, Combined, NM, Channels)
}

_CALL = re.compile(r"^\s*([a-z_]+)\s*(?:\((.*)\))?\s*$")


def _format(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def _read(kind: str, name: str, annotation: str, text: str) -> float | int | tuple[int, int]:
    try:
        if annotation == "float":
            return float(text)
        if annotation == "int":
            return int(text)
        first, second = text.split("x")
        return (int(first), int(second))
    except ValueError:
        want = {"float": "a number", "int": "a whole number"}.get(annotation, "FILTERSxCHANNELS, such as 16x1")
        raise ChoiceError(f"choice '{kind}': field {name}={text!r} must be {want}.") from None


def parse_choice(text: str) -> Choice:
    """Return the choice that ``text`` spells, for example ``block(keep=0.25,filters=16)``.

    Raises:
        UnknownName: The kind is not one of ``CHOICE_KINDS``.
        ChoiceError: A field is unknown, missing or out of range.
    """
    match = _CALL.match(text)
    if match is None:
        raise ChoiceError(f"choice {text!r}: write it as kind(field=value,…), for example block(keep=0.25,filters=16).")
    kind, inner = match.group(1), match.group(2) or ""
    if kind not in CHOICE_KINDS:
        raise unknown_name("choice", kind, CHOICE_KINDS)
    cls = CHOICE_KINDS[kind]
    known = {f.name: str(f.type) for f in fields(cls)}
    values: dict[str, float | int | tuple[int, int]] = {}
    for part in filter(None, (p.strip() for p in inner.split(","))):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals:
            raise ChoiceError(f"choice '{text}': '{part}' must be field=value; fields: {', '.join(known) or 'none'}.")
        if name not in known:
            raise unknown_name(f"field of choice '{kind}'", name, known)
        if name in values:
            raise ChoiceError(f"choice '{text}': field {name} is given twice; keep one.")
        values[name] = _read(kind, name, known[name], value.strip())
    try:
        return cls(**values)
    except TypeError:
        absent = ", ".join(n for n in known if n not in values)
        raise ChoiceError(f"choice '{text}': field missing: {absent}.") from None
