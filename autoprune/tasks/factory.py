"""Data from the user's own code, named ``package.module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from autoprune.core.errors import AutopruneError, DataError
from autoprune.core.registry import unknown_name
from autoprune.tasks.dataset import DataSet
from autoprune.tasks.own_code import first_line, importing_from_here


def load_factory(text: str) -> DataSet:
    """Return what the user's function makes.

    Raises:
        DataError: It cannot be imported or called, or returns no ``DataSet``.
        UnknownName: Its module has no such name.
    """
    factory = _find(text)
    try:
        made = factory()
    except AutopruneError:
        raise
    except Exception as error:  # the user's code: whatever it raises means that there is no data
        raise DataError(f"--data {text}: the function failed: {first_line(error)}") from error
    if not isinstance(made, DataSet):
        raise DataError(
            f"--data {text}: the function returned a {type(made).__name__}; want an autoprune.tasks.data.DataSet."
        )
    return made


def _find(text: str) -> Callable[[], object]:
    module_name, _, path = text.partition(":")
    try:
        with importing_from_here():
            found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise DataError(
                f"--data {text}: no module '{error.name}' here or among the installed packages; give a known data set "
                "or package.module:function."
            ) from None
        raise DataError(f"--data {text}: importing '{module_name}' failed: {first_line(error)}") from error
    except Exception as error:
        raise DataError(f"--data {text}: importing '{module_name}' failed: {first_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise unknown_name(f"name in '{module_name}' called", part, public)
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"--data {text}: '{path}' is a {type(found).__name__}; name a function that makes the data.")
    return found
