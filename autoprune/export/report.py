"""What leaving zeros and channels out came to, in numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoprune.core.registry import unknown_name
from autoprune.export.architecture import FORMS, Form


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters and bytes of a network beside the dense one's.

    Attributes:
        dense_parameters, parameters, nonzero: Of the dense network, of the network, and those of it that are not zero.
        dense_bytes: Parameters and buffers of the dense network.
        file_bytes: Of what was written.
    """

    dense_parameters: int
    parameters: int
    nonzero: int
    dense_bytes: int
    file_bytes: int


def form_of(text: str) -> Form:
    """Return the form of that name.

    Raises:
        UnknownName: There is none.
    """
    if text not in FORMS:
        raise unknown_name("form", text, FORMS)
    return text


def size_of(dense: nn.Module, network: nn.Module, file: Path) -> Size:
    """Return how large a network is beside the dense one."""
    own = list(network.parameters())
    return Size(
        dense_parameters=sum(p.numel() for p in dense.parameters()),
        parameters=sum(p.numel() for p in own),
        nonzero=sum(int(torch.count_nonzero(p)) for p in own),
        dense_bytes=sum(t.numel() * t.element_size() for t in dense.state_dict().values()),
        file_bytes=file.stat().st_size,
    )


def size_lines(size: Size) -> list[str]:
    """Return the figures as lines of a terminal."""
    return [
        f"  parameters        {size.parameters:,} of {size.dense_parameters:,} ({size.nonzero:,} not zero)",
        f"  file              {bytes_text(size.file_bytes)} (dense weights: {bytes_text(size.dense_bytes)})",
    ]


def bytes_text(count: float) -> str:
    """Return a number of bytes with its unit, three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1e3
    return f"{count:.3g} GB"


def zeros_note(sparse: Mapping[str, str], target: str) -> str:
    """Return the sentence that says what a target makes of sparse layers; empty without any."""
    if not sparse:
        return ""
    first, choice = next(iter(sparse.items()))
    return (
        f"{len(sparse)} sparse layers (first: {first}, {choice}) are dense with zeros in {target}: it has no operator "
        "for them, so they are neither smaller nor faster there; autoprune.convert runs them sparse."
    )
