"""How data is named: ``NAME[:WHERE][#OPTION=VALUE,…]``, one text that a run or a policy can keep.

NAME is ``fashion-mnist``, ``mnist``, ``cifar10``, ``cifar100``, ``imagenet:DIR``, ``imagefolder:DIR`` or the user's own
``package.module:factory``. Options say how images are prepared and how many of them are used:
``imagefolder:photos#size=224,resize=256,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,train=2000``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from autoprune.core.errors import DataError
from autoprune.core.registry import unknown_name

Interpolation = Literal["bilinear", "bicubic", "nearest"]
IN_MEMORY = ("cifar10", "cifar100", "fashion-mnist", "mnist")
FOLDERS = ("imagefolder", "imagenet")
KNOWN = (*IN_MEMORY, *(f"{name}:DIR" for name in FOLDERS), "package.module:factory")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic", "nearest")


@dataclass(frozen=True, slots=True)
class Options:
    """How images are prepared, and how many are used; None leaves it to the data set or the network.

    Attributes:
        size: Height and width in pixels.
        resize: Of the shorter side before the middle is cut out.
        mean, std: Of the pixels in 0..1, one number or one a channel.
        interpolation: Of the resizing.
        train, validation, test: Images at most.
        classes: Of images without labels.
    """

    size: int | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    classes: int | None = None

    def over(self, others: Options) -> Options:
        """Return these options, those that are None taken from ``others``."""
        own = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        return replace(others, **own)

    @property
    def text(self) -> str:
        """``OPTION=VALUE,…`` of what is not None."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ",".join(f"{name}={_written(value)}" for name, value in given if value is not None)


@dataclass(frozen=True, slots=True)
class DataName:
    """A data set's name, taken apart.

    Attributes:
        base: ``cifar10``, ``imagefolder``, or all of ``package.module:factory``.
        where: The folder behind the colon, if the base has one.
        options: As given.
    """

    base: str
    where: str = ""
    options: Options = Options()

    @property
    def is_factory(self) -> bool:
        """Whether the user's own code makes it."""
        return ":" in self.base

    @property
    def plain(self) -> str:
        """The name without options."""
        return f"{self.base}:{self.where}" if self.where else self.base

    @property
    def text(self) -> str:
        """The canonical text; ``parse_data`` reads it back."""
        options = self.options.text
        return f"{self.plain}#{options}" if options else self.plain


def parse_data(text: str) -> DataName:
    """Return a data set's name taken apart.

    Raises:
        UnknownName: No such data set or option; the nearest one is proposed.
        DataError: An option's value cannot be read, or a folder is missing.
    """
    plain, _, options = text.partition("#")
    base, colon, where = plain.partition(":")
    found = parse_options(options.split(",") if options else ())
    if base in FOLDERS:
        if not where:
            raise DataError(f"--data {text}: which folder? Write {base}:DIR.")
        return DataName(base, where, found)
    if not colon and base in IN_MEMORY:
        return DataName(base, "", found)
    if not difflib.get_close_matches(base, FOLDERS, n=1, cutoff=0.75) and _FACTORY.fullmatch(plain):
        return DataName(plain, "", found)
    near = difflib.get_close_matches(base, (*IN_MEMORY, *FOLDERS), n=1, cutoff=0.75)
    if near and near[0] in FOLDERS:
        raise unknown_name("data set", f"{base}:DIR" if colon else base, KNOWN)
    raise unknown_name("data set", plain, KNOWN)


def parse_options(texts: Iterable[str]) -> Options:
    """Return options from ``NAME=VALUE`` texts.

    Raises:
        UnknownName: No such option.
        DataError: A value cannot be read.
    """
    known = [field.name for field in fields(Options)]
    values: dict[str, object] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if name not in known:
            raise unknown_name("data option", name, known)
        if not equals or not value:
            raise DataError(f"data option '{text}': write it as {name}=VALUE.")
        values[name] = _value(name, value)
    return Options(**values)  # type: ignore[arg-type]


def with_options(data: str, texts: Iterable[str]) -> str:
    """Return a data set's text with further options, which win over its own."""
    name = parse_data(data)
    return replace(name, options=parse_options(texts).over(name.options)).text


def _value(name: str, text: str) -> object:
    if name == "interpolation":
        if text not in _INTERPOLATIONS:
            raise unknown_name("interpolation", text, _INTERPOLATIONS)
        return text
    try:
        if name in ("mean", "std"):
            numbers = tuple(float(part) for part in text.split("/"))
            if name == "std" and min(numbers) <= 0.0:
                raise ValueError
            return numbers
        number = int(text)
    except ValueError:
        want = "numbers above 0" if name == "std" else "numbers" if name == "mean" else "a whole number"
        example = ", one a channel, such as 0.5/0.5/0.5" if name in ("mean", "std") else ""
        raise DataError(f"data option {name}={text}: must be {want}{example}.") from None
    if number < 1:
        raise DataError(f"data option {name}={text}: must be at least 1.")
    return number


def _written(value: object) -> str:
    return "/".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
