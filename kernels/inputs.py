"""Inputs of any network: a tensor, a tuple (positional arguments) or a dict (keyword arguments) of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from autoprune.core.errors import ModelError

Example: TypeAlias = Tensor | tuple[object, ...] | list[object] | Mapping[str, object]


def call(model: Callable[..., object], example: Example) -> object:
    """Return what a model returns for an example: a tensor is its one argument, several inputs are spread."""
    if isinstance(example, Tensor):
        return model(example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors inside nested tuples, lists, dicts and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from tensors_in(getattr(value, one.name))


def first_tensor(example: Example) -> Tensor:
    """Return an example's first tensor.

    Raises:
        ModelError: It has none.
    """
    found = next(tensors_in(example), None)
    if found is None:
        raise ModelError(f"the example is a {type(example).__name__} without a tensor; give what the model takes.")
    return found


def mapped(change: Callable[[Tensor], Tensor], example: Example) -> Example:
    """Return an example with every tensor changed."""
    if isinstance(example, Tensor):
        return change(example)
    if isinstance(example, Mapping):
        return {name: _mapped(change, item) for name, item in example.items()}
    return tuple(_mapped(change, item) for item in example)


def _mapped(change: Callable[[Tensor], Tensor], value: object) -> object:
    return mapped(change, value) if isinstance(value, Tensor | Mapping | tuple | list) else value


def copied(example: Example) -> Example:
    """Return an example whose tensors are copies."""
    return mapped(lambda tensor: tensor.detach().clone(), example)


def random_like(example: Example, seed: int = 0) -> Example:
    """Return an example with random numbers in its float tensors; whole numbers, which may be indices, stay."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    return mapped(drawn, example)


def shape_text(example: Example) -> str:
    """Return an example's shape in words for a message: ``(1, 3, 8, 8)``, or those of several inputs."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(example)]
    return shapes[0] if isinstance(example, Tensor) else f"{len(shapes)} tensors {' '.join(shapes)}"
