"""What ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoprune.core.result import Result

_RESULT_FIELDS = {
    "model", "data", "budget", "agent", "seed", "run", "met", "reason", "rows", "references", "absent_references",
    "context", "seconds", "metric",
}


def print_record(record: Mapping[str, object]) -> None:
    """Print one JSON object on one line of stdout; a number that is none (NaN) is written as null."""
    from pydantic_core import to_json

    print(to_json(record, inf_nan_mode="null").decode())


def print_result_record(result: Result, paths: Mapping[str, Path]) -> None:
    """Print a finished search as JSON, with the files it left."""
    print_record({**result.model_dump(include=_RESULT_FIELDS), "paths": dict(paths)})
