"""Searchers, the study that records every evaluated policy, and the pipeline from a budget to a verified policy.

The package is callable: ``autoprune.search(budget="latency=50%")`` is ``autoprune.search.pipeline.search``. A function
of that name in ``autoprune`` would be overwritten as soon as anything imports this package, since importing a
sub-package sets it as an attribute of its parent; so the package stands for its main function.
"""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from autoprune.search.pipeline import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
