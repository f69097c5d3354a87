"""What a comparison of agents found, as stored in ``comparison.json`` and shown by its table and report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from autoprune.core.errors import RunError
from autoprune.core.rundir import write_text


class RankedPolicy(BaseModel):
    """One of the best policies of a cell.

    Attributes:
        choices: Layer → choice text.
        error, accuracy: As the search scored it: KL to dense in nats, top-1 on the evaluation images.
        tuned: Top-1 on the validation images after the fine-tune; None without one.
    """

    model_config = ConfigDict(extra="forbid")

    choices: dict[str, str]
    error: float
    accuracy: float
    tuned: float | None = None


class Cell(BaseModel):
    """One agent at one budget with one seed.

    Attributes:
        curve: Least error of a feasible policy after 1, 2, … evaluations; None before there is one.
        seconds: What the search takes alone: its own time, and that of scoring each of its policies once.
        scoring_seconds: The part of ``seconds`` that scoring takes.
        top: Best feasible policies, least error first.
    """

    model_config = ConfigDict(extra="forbid")

    agent: str
    budget: str
    seed: int
    curve: list[float | None]
    seconds: float
    scoring_seconds: float
    top: list[RankedPolicy]

    @staticmethod
    def empty(agent: str, budget: str, seed: int) -> Cell:
        """Return a cell of which nothing is done."""
        return Cell(agent=agent, budget=budget, seed=seed, curve=[], seconds=0.0, scoring_seconds=0.0, top=[])

    @staticmethod
    def label(agent: str, budget: str, seed: int) -> str:
        """Return the name of a cell's file."""
        return f"{budget.replace(',', '+').replace('/', '-')}-{agent}-s{seed}"

    def save(self, path: Path) -> None:
        """Write the cell atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Cell | None:
        """Read a cell; None when it is absent or damaged: it is then made again."""
        try:
            return Cell.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


class Comparison(BaseModel):
    """Cells of one problem and evaluator.

    Attributes:
        evaluations: Distinct policies granted to every agent.
        seeds: Seeds 0, 1, … of every agent.
        finetuned: Whether the best policies of every cell had the same fine-tune.
        dense_accuracy: The dense network's top-1 on the validation images.
        context: The latency table's context and the versions, flat.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    data: str
    space: str
    agents: list[str]
    budgets: list[str]
    seeds: int
    evaluations: int
    finetuned: bool
    dense_accuracy: float
    cells: list[Cell]
    context: dict[str, str | int | float]
    run: str = ""

    def at(self, budget: str, agent: str | None = None) -> list[Cell]:
        """Return the cells of a budget, or of one agent at it, by agent and seed."""
        return [cell for cell in self.cells if cell.budget == budget and agent in (None, cell.agent)]

    def save(self, path: Path) -> None:
        """Write the comparison atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Comparison:
        """Read a comparison.

        Raises:
            RunError: It is absent or damaged.
        """
        try:
            return Comparison.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"no {path}: the comparison is not finished; give its command again to go on.") from None
        except (OSError, ValueError):
            raise RunError(f"{path} is damaged; delete it and give the comparison's command again.") from None
