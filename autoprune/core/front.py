"""The front of a search, as stored in ``front.json``: every policy that no other undercuts in error and cost."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from autoprune.core.choices import parse_choice
from autoprune.core.errors import RunError, UnknownName
from autoprune.core.policy import Accuracy, Cost, Policy, PolicyFile
from autoprune.core.rundir import RunDir, write_text

PREDICTED_ONLY = "predicted only: never deployed, timed or fine-tuned"


class FrontPoint(BaseModel):
    """One policy.

    Attributes:
        trial: Its number in the study.
        error: KL divergence to the dense network, nats: what "better" goes by.
        accuracy: Top-1 on the evaluation images, before any training.
        costs: Kind → cost of the searched layers, in the kind's own unit (µs, MACs, weights, bytes).
        predicted: Of the whole network.
        choices: Layer → choice text.
    """

    model_config = ConfigDict(extra="forbid")

    trial: int
    proposer: str
    error: float
    accuracy: float
    costs: dict[str, float]
    predicted: Cost
    choices: dict[str, str]


class Front(BaseModel):
    """All of them, by rising first cost.

    Attributes:
        objectives: ``accuracy`` and the kinds of cost.
    """

    model_config = ConfigDict(extra="forbid")

    objectives: list[str]
    points: list[FrontPoint]

    def save(self, path: Path) -> None:
        """Write the front atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(run: RunDir) -> Front:
        """Read a run's front.

        Raises:
            RunError: It is absent or damaged.
        """
        try:
            return Front.model_validate_json(run.front.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"no {run.front}: the search is not finished, or older than fronts; give its command again "
                "(with --fresh if it is finished)."
            ) from None
        except (OSError, ValueError):  # pydantic's and UTF-8's errors are both ValueErrors
            raise RunError(f"{run.front} is damaged; search again with --fresh.") from None

    def policy(self, number: int, chosen: PolicyFile) -> Policy:
        """Return one point as a policy, marked as predicted only.

        Args:
            number: Of the point, from 1.
            chosen: The run's own policy, whose provenance it shares.
        Raises:
            UnknownName: There is no such point.
        """
        if not 1 <= number <= len(self.points):
            raise UnknownName(f"no point {number} on this front; it has points 1 to {len(self.points)}.")
        point = self.points[number - 1]
        record = chosen.model_copy(
            update={
                "choices": point.choices,
                "predicted": point.predicted,
                "measured": None,
                "accuracy": Accuracy(dense=chosen.accuracy.dense, pruned=point.accuracy),
                "context": {**chosen.context, "status": PREDICTED_ONLY, "trial": point.trial},
            }
        )
        return Policy({name: parse_choice(text) for name, text in point.choices.items()}, record)
