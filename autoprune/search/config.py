"""What a search was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autoprune.core.goal import Goal, parse_goal
from autoprune.core.rundir import run_name

DEFAULT_EVALUATIONS = 100
BASELINE_EVALUATIONS = 30
FINALISTS = 3
DEFAULT_AGENT = "auto"
DEFAULT_FRONT_AGENT = "nsga2"
# A measured latency this far above its budget is a miss.
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """Settings of one search; everything but ``runs_dir``, ``run`` and ``fresh`` decides its result.

    Attributes:
        budget: As in ``--budget``; empty where only a constraint or objectives are given.
        model, data: Names; ``data_dir`` the folder of the full data set, None for the data inside the package.
        agent: Searcher.
        space: Preset or YAML file.
        table: Latency table to use, a file or the name of an embedded one; None measures one.
        evaluations: Policies to evaluate; None for ``DEFAULT_EVALUATIONS``.
        batch, threads: Of the deployed network.
        seed: Of every random draw.
        device: ``cpu`` or ``cuda``.
        run: Name of the run's folder; None derives it.
        runs_dir: Folder of all runs.
        fresh: Set an existing run aside.
        constraint: As in ``--constraint``: the accuracy to keep at the least latency.
        objective: As in ``--objective``: accuracy and the costs to trade it against.
        settings: Of the agent, by name.
        weights: The model's file; None for those it comes with.
        metric: ``accuracy``, or ``agreement`` with the dense network; None for the task's own.
    """

    budget: str = ""
    model: str = "resnet20"
    data: str = "fashion-mnist"
    data_dir: Path | None = None
    agent: str = DEFAULT_AGENT
    space: str = "cpu-default"
    table: str | Path | None = None
    evaluations: int | None = None
    batch: int = 1
    threads: int = 1
    seed: int = 0
    device: str = "cpu"
    run: str | None = None
    runs_dir: Path = Path("runs")
    fresh: bool = False
    constraint: str | None = None
    objective: str | None = None
    settings: Mapping[str, object] | None = None
    weights: Path | None = None
    metric: str | None = None

    @property
    def goal(self) -> Goal:
        """What is asked for.

        Raises:
            BudgetError: It cannot be read.
        """
        return parse_goal(self.budget, self.constraint, self.objective)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        asked = [part for part in (self.budget, self.constraint, self.objective) if part]
        return self.run or run_name(self.model, *asked, self.agent, f"s{self.seed}")

    def resolved(self) -> dict[str, object]:
        """Return what decides the result, as JSON values."""
        values = asdict(replace(self, evaluations=self.evaluations or DEFAULT_EVALUATIONS))
        # Runs of before there was a metric are by accuracy.
        unsaid = ("metric",) if self.metric in (None, "accuracy") else ()
        for key in ("run", "runs_dir", "fresh", *unsaid):
            del values[key]
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
