"""What a model is first called with, for methods that must see it run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class FirstInput:
    """A forward hook that keeps one input with batch dimension; None as long as there was none."""

    def __init__(self) -> None:
        self.example: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.example is None and args and isinstance(args[0], Tensor):
            self.example = args[0].detach()[:1].clone()

    def __deepcopy__(self, memo: object) -> FirstInput:
        """A copy of the model, such as an average of weights, looks for itself and tells nobody."""
        return FirstInput()
