"""What a search found, as stored in ``result.json`` and shown by the closing table and the report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from autoprune.core.errors import RunError
from autoprune.core.goal import GoalKind
from autoprune.core.policy import Accuracy, Cost
from autoprune.core.rundir import write_text


class Row(BaseModel):
    """One line of the closing table.

    Attributes:
        name: ``dense``, ``chosen``, or the baseline's own name.
        feasible: Whether it meets the budget as measured, or as predicted where ``measured`` is None; None for dense.
        choices: Layer → choice text.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    proposer: str
    predicted: Cost
    measured: Cost | None
    accuracy: Accuracy
    feasible: bool | None
    choices: dict[str, str]


class LayerRow(BaseModel):
    """One layer of the deployed network.

    ``predicted_us`` is the table's row times the calibration's slope, ``measured_us`` the layer's time inside the
    running network, ``floor_us`` its MACs at the machine's measured peak (of a GPU its roofline), ``model_us`` what the
    tile model predicted before anything was measured.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: str
    choice: str
    kernel: str
    density: float
    dense_us: float
    predicted_us: float
    measured_us: float | None
    floor_us: float
    why: str
    model_us: float | None = None


class TrialRow(BaseModel):
    """One evaluated policy: error is the KL divergence (nats) to the dense network, cost is predicted µs."""

    model_config = ConfigDict(extra="forbid")

    number: int
    proposer: str
    error: float
    accuracy: float
    latency_us: float
    seconds: float


class FidelityPoint(BaseModel):
    """One random policy: latency predicted by the table and measured end to end."""

    model_config = ConfigDict(extra="forbid")

    predicted_us: float
    measured_us: float


class Result(BaseModel):
    """A finished search.

    Attributes:
        met: Whether the chosen policy meets the budget as measured on the device, or as predicted (``predicted_for``).
        rows: Dense first, then the chosen policy, then the baselines.
        layers: In execution order, of the chosen policy as deployed.
        references: Name of each dense execution → its measured latency in µs.
        absent_references: Name of each dense execution that could not run → why.
        fidelity_mape: Mean absolute error of the calibrated prediction, a fraction.
        seconds: Stage → wall time.
        context: The table's context and the versions, flat.
        latency_limit_us: The latency budget in µs, if there is one.
        chosen_trial: Number of the trial that was chosen.
        run: Name of the run.
        goal: What ``budget`` says: a budget, an accuracy to keep, or the costs of a front.
        reason: Why the budget was missed, or the search ended early; empty otherwise.
        predicted_for: The machine whose table predicted the latencies, of which nothing was measured here; empty where
            networks were deployed and timed.
        left_out: Sentences on choices that the table leaves out, and why.
        metric: What the accuracies are: ``accuracy``, ``agreement`` with the dense network, or the user's ``score``.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    data: str
    budget: str
    agent: str
    seed: int
    met: bool
    rows: list[Row]
    layers: list[LayerRow]
    references: dict[str, float]
    trials: list[TrialRow]
    fidelity: list[FidelityPoint]
    fidelity_mape: float
    fidelity_kendall_tau: float
    seconds: dict[str, float]
    context: dict[str, str | int | float]
    absent_references: dict[str, str] = Field(default_factory=dict)
    latency_limit_us: float | None = None
    chosen_trial: int | None = None
    run: str = ""
    reason: str = ""
    predicted_for: str = ""
    left_out: list[str] = Field(default_factory=list)
    goal: GoalKind = "budget"
    metric: str = "accuracy"

    def row(self, name: str) -> Row | None:
        """Return the closing table's row of that name, if there is one."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def fastest_reference(self) -> tuple[str, float] | None:
        """Name and µs of the fastest dense execution: what a percentage of latency is of."""
        return min(self.references.items(), key=lambda item: item[1], default=None)

    def save(self, path: Path) -> None:
        """Write the result atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Result:
        """Read a result file.

        Raises:
            RunError: It is absent or damaged.
        """
        try:
            return Result.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"no {path}: the search is not finished; give its command again to go on.") from None
        except (OSError, ValueError):  # pydantic's and UTF-8's errors are both ValueErrors
            raise RunError(f"{path} is damaged; delete it and give the search's command again.") from None
