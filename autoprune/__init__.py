"""autoprune: search per-layer pruning policies under a measured budget, and train them.

    result = autoprune.search(budget="latency=50%")
    session = autoprune.attach(model, optimizer, policy, steps_per_epoch=len(loader))
    deployed = autoprune.convert(model, policy, example)

Importing this package imports nothing else: the names below are fetched when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoprune.core.policy import Policy as Policy
    from autoprune.export.bundle import load as load
    from autoprune.export.bundle import save as save
    from autoprune.kernels.convert import convert as convert
    from autoprune.lut.table import LatencyTable as LatencyTable
    from autoprune.search.pipeline import search as search
    from autoprune.search_spaces.space import SearchSpace as SearchSpace
    from autoprune.sparsity.compact import compact as compact
    from autoprune.trainers.session import attach as attach

__version__ = "0.1.0"

_HOME = {
    "LatencyTable": "autoprune.lut.table",
    "Policy": "autoprune.core.policy",
    "SearchSpace": "autoprune.search_spaces.space",
    "attach": "autoprune.trainers.session",
    "compact": "autoprune.sparsity.compact",
    "convert": "autoprune.kernels.convert",
    "load": "autoprune.export.bundle",
    "save": "autoprune.export.bundle",
}

# `search` is a sub-package as well as a function: the module itself is callable, see autoprune/search/__init__.py.
__all__ = [
    "LatencyTable", "Policy", "SearchSpace", "__version__", "attach", "compact", "convert", "load", "save", "search",
]


def __getattr__(name: str) -> object:
    if name == "search":
        return import_module("autoprune.search")
    if name not in _HOME:
        raise AttributeError(f"module 'autoprune' has no attribute '{name}'")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
