"""How a network is named: ``BASE[@CxHxW][{"ARGUMENT": VALUE}]``, one text that a policy or a run can keep.

BASE is a built-in network (``resnet20``), ``torchvision:NAME``, ``timm:NAME``, or ``package.module:factory``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from autoprune.core.errors import ModelError

Source: TypeAlias = Literal["built-in", "torchvision", "timm", "factory"]

_SIZE = re.compile(r"(\d+)x(\d+)x(\d+)")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_PAIR = re.compile(r"\s*([A-Za-z_]\w*)\s*=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelName:
    """A network's name, taken apart.

    Attributes:
        base: What stands before size and arguments.
        size: (channels, height, width) of its images, where the name says it.
        args: Keyword arguments of what builds it; JSON values.
    """

    base: str
    size: tuple[int, int, int] | None = None
    args: Mapping[str, object] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """Where the network comes from."""
        prefix, colon, _ = self.base.partition(":")
        if not colon:
            return "built-in"
        return "torchvision" if prefix == "torchvision" else "timm" if prefix == "timm" else "factory"

    @property
    def own(self) -> str:
        """The name without its source's prefix; of a factory all of it."""
        return self.base if self.source in ("built-in", "factory") else self.base.partition(":")[2]

    @property
    def text(self) -> str:
        """The canonical text; ``parse_model`` reads it back."""
        size = "" if self.size is None else f"@{'x'.join(map(str, self.size))}"
        args = json.dumps(dict(self.args), sort_keys=True, separators=(",", ":")) if self.args else ""
        return f"{self.base}{size}{args}"

    @property
    def brings_weights(self) -> bool:
        """Whether what builds it also gives it trained weights, as far as the name tells; a factory is trusted to."""
        asked = self.args.get("weights") is not None if self.source == "torchvision" else self.args.get("pretrained")
        return self.source == "factory" or (self.source != "built-in" and bool(asked))


def parse_model(text: str) -> ModelName:
    """Return a network's name taken apart.

    Raises:
        ModelError: A size or arguments that cannot be read, or a factory that is not ``package.module:name``.
    """
    front, brace, rest = text.partition("{")
    args = parse_args(brace + rest) if brace else {}
    base, at, size_text = front.strip().partition("@")
    size = None
    if at:
        match = _SIZE.fullmatch(size_text)
        if match is None:
            raise ModelError(f"model '{text}': the size after @ must be CHANNELSxHEIGHTxWIDTH, such as 3x32x32.")
        channels, height, width = (int(number) for number in match.groups())
        size = (channels, height, width)
    name = ModelName(base, size, args)
    if name.source == "factory" and _FACTORY.fullmatch(base) is None:
        raise ModelError(
            f"model '{base}': must be a built-in name, torchvision:NAME, timm:NAME, or package.module:factory."
        )
    return name


def parse_args(text: str) -> dict[str, object]:
    """Return keyword arguments written as a JSON object or as ``name=value,name=value``; values are JSON or plain text.

    Raises:
        ModelError: Neither of the two.
    """
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ModelError(f"--model-args {text!r}: not JSON ({error}); write {{\"name\": value}}.") from None
        return dict(found)
    args: dict[str, object] = {}
    for part in _split(text):
        match = _PAIR.fullmatch(part)
        if match is None:
            what = f"'{part.strip()}' is no name=value"
            raise ModelError(f"--model-args {text!r}: {what}; write depth=2,width=64 or JSON.")
        if match.group(1) in args:
            raise ModelError(f"--model-args {text!r}: '{match.group(1)}' is given twice.")
        args[match.group(1)] = _value(match.group(2).strip())
    return args


def with_args(model: str, args: str | None) -> str:
    """Return a network's canonical text with the arguments of ``--model-args`` added.

    Raises:
        ModelError: Either cannot be read.
    """
    name = parse_model(model)
    if args is not None:
        name = replace(name, args={**name.args, **parse_args(args)})
    return name.text


def split_names(text: str) -> list[str]:
    """Return the names of a list joined by commas; those inside arguments do not part it."""
    return list(dict.fromkeys(part.strip() for part in _split(text) if part.strip()))


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
