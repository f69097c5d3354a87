"""What a search was asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autoprune.core.rundir import run_name

DEFAULT_EVALUATIONS = 100
BASELINE_EVALUATIONS = 30
FINALISTS = 3
# A measured latency this far above its budget is a miss.
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """Settings of one search; everything but ``runs_dir``, ``run`` and ``fresh`` decides its result.

    Attributes:
        budget: As in ``--budget``.
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
    """

    budget: str
    model: str = "resnet20"
    data: str = "fashion-mnist"
    data_dir: Path | None = None
    agent: str = "auto"
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

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.run or run_name(self.model, self.budget, self.agent, f"s{self.seed}")

    def resolved(self) -> dict[str, object]:
        """Return what decides the result, as JSON values."""
        values = asdict(replace(self, evaluations=self.evaluations or DEFAULT_EVALUATIONS))
        for key in ("run", "runs_dir", "fresh"):
            del values[key]
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
