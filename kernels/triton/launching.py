"""The one place where kernels are launched, so that the call that a timer makes can also compile and stop there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_collected: ContextVar[list[Any] | None] = ContextVar("collected", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **meta: object) -> None:
    """Launch a Triton kernel; inside ``compiling`` compile exactly what that launch would need, and run nothing.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Programs in each dimension.
        arguments: Of the kernel; tensors and numbers.
        meta: Compile-time arguments and options.
    """
    collected = _collected.get()
    if collected is None:
        kernel[grid](*arguments, **meta)
    else:
        collected.append(kernel.warmup(*arguments, grid=grid, **meta))


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Let launches compile only; yields the compiled kernels, in the order of the launches."""
    compiled: list[Any] = []
    token = _collected.set(compiled)
    try:
        yield compiled
    finally:
        _collected.reset(token)
