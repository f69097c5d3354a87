"""Settings of a named thing (a trainer, an agent): a frozen dataclass, given as ``name=value`` texts or a mapping.

The dataclass's fields are the names that are known, their annotations say what a value must be, their defaults hold
where nothing is given; ranges are checked when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from autoprune.core.errors import AutopruneError
from autoprune.core.registry import unknown_name

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose settings they are, in the words of an error message.

    Attributes:
        kind: ``trainer`` or ``agent``.
        name: Of the trainer or agent.
        error: Class of the errors about its settings.
    """

    kind: str
    name: str
    error: type[AutopruneError]

    def unknown(self, name: str, known: Sequence[str]) -> AutopruneError:
        """Return the error for a setting that it does not have."""
        if not known:
            return self.error(f"{self.kind} '{self.name}' has no settings, so no '{name}'; leave --set out.")
        return unknown_name(f"setting of {self.kind} '{self.name}'", name, known)


def read_settings(cls: type[S], owner: Owner, settings: object | None) -> S:
    """Return settings as their dataclass ``cls``, from an instance of it, a mapping of its fields, or None.

    Raises:
        UnknownName: A setting that there is not, with the nearest known one.
        AutopruneError: Of ``owner.error``: settings of another type, or a value out of range.
    """
    if settings is None:
        return cls()
    if isinstance(settings, cls):
        return settings
    if not isinstance(settings, Mapping):
        got = type(settings).__name__
        raise owner.error(f"settings of {owner.kind} '{owner.name}': got {got}; give a {cls.__name__}.")
    known = _names(cls)
    for name in settings:
        if name not in known:
            raise owner.unknown(str(name), known)
    return cls(**settings)


def parse_settings(cls: type[Any], owner: Owner, texts: Sequence[str]) -> dict[str, object]:
    """Return settings from ``name=value`` texts, as written on a command line; ranges are not checked yet.

    Raises:
        UnknownName: A setting that there is not.
        AutopruneError: Of ``owner.error``: a text without '=', or a value that is no number where one is wanted.
    """
    types = {field.name: str(field.type) for field in fields(cls)}
    values: dict[str, object] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if name not in types:
            raise owner.unknown(name, list(types))
        if not equals or not value:
            raise owner.error(f"{owner.name} setting '{text}': write it as {name}=value.")
        values[name] = _parse_value(owner, name, types[name], value)
    return values


def check_setting(owner: Owner, name: str, value: object, allowed: bool, want: str) -> None:
    """Refuse a setting's value.

    Raises:
        AutopruneError: Of ``owner.error``: ``allowed`` is false.
    """
    if not allowed:
        raise owner.error(f"{owner.name} setting {name}={value!r}: must be {want}.")


def _names(cls: type[Any]) -> list[str]:
    return [field.name for field in fields(cls)]


def _parse_value(owner: Owner, name: str, annotation: str, value: str) -> object:
    kind = annotation.split("|")[0].strip()
    try:
        if kind == "int":
            return int(value)
        if kind == "float":
            return float(value)
        if kind == "bool":
            return {"true": True, "false": False}[value.lower()]
    except (ValueError, KeyError):
        want = {"int": "a whole number", "float": "a number"}.get(kind, "true or false")
        raise owner.error(f"{owner.name} setting {name}={value!r}: must be {want}.") from None
    return value
