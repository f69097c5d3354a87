"""What ``torch.compile`` sees of a deployed module: one custom op, so that a network around it compiles in one piece.

Outside a compiler modules run their programs directly; an op costs more than a small layer's whole bookkeeping.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor


class Opaque(Protocol):
    """A module that computes one tensor from one, in compiled code that no tracer can follow."""

    def run_opaque(self, x: Tensor) -> Tensor:
        """Return the output."""
        ...

    def output_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the output for an input of ``shape``."""
        ...


_modules: weakref.WeakValueDictionary[int, Opaque] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_library = torch.library.Library("autoprune_deployed", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("run(Tensor x, int module) -> Tensor")  # type: ignore[no-untyped-call]


def enlist(module: Opaque) -> int:
    """Return the number under which the op finds a module, for as long as it lives."""
    number = next(_numbers)
    _modules[number] = module
    return number


def run(x: Tensor, number: int) -> Tensor:
    """Return a module's output through the op, as a compiler records it."""
    result: Tensor = torch.ops.autoprune_deployed.run(x, number)
    return result


def _run(x: Tensor, module: int) -> Tensor:
    return _modules[module].run_opaque(x).contiguous()


def _fake(x: Tensor, module: int) -> Tensor:
    return x.new_empty(_modules[module].output_shape(x.shape))


_library.impl("run", _run, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("autoprune_deployed::run", _fake, lib=_library)
