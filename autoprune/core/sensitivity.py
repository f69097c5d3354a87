"""Sensitivity curves, as stored in ``sensitivity.json``: each layer's error alone, by choice."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from autoprune.core.errors import RunError
from autoprune.core.rundir import write_text


class CurvePoint(BaseModel):
    """One choice of a layer: weights kept (0..1), and the network's error in nats with only this layer changed."""

    model_config = ConfigDict(extra="forbid")

    choice: str
    density: float
    error: float


class LayerCurve(BaseModel):
    """One layer's choices."""

    model_config = ConfigDict(extra="forbid")

    layer: str
    points: list[CurvePoint]


class Sensitivity(BaseModel):
    """All layers, in execution order.

    Attributes:
        threshold: Error up to which sensitivity analysis prunes every layer alone so that the budget is met, nats;
            None where no threshold meets it.
    """

    model_config = ConfigDict(extra="forbid")

    threshold: float | None
    layers: list[LayerCurve]

    def save(self, path: Path) -> None:
        """Write the curves atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Sensitivity | None:
        """Read the curves; None where a run has none.

        Raises:
            RunError: The file is damaged.
        """
        try:
            return Sensitivity.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise RunError(f"{path} is damaged; delete it to have the report made without it.") from None
