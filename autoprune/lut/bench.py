"""Dense against deployed, end to end, interleaved in one process."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from torch import Tensor, nn

from autoprune.core.choices import Choice
from autoprune.core.errors import MeasurementError
from autoprune.core.policy import Policy
from autoprune.kernels.convert import convert
from autoprune.kernels.dense import dense_references, runners
from autoprune.kernels.deployed import DeployedModel
from autoprune.kernels.dispatch import Decision, LatencyRows
from autoprune.lut.context import Context
from autoprune.lut.deploy import masked_copy
from autoprune.lut.measure import Spread, machine, measure

DEPLOYED = "deployed"


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Latencies of one network on this machine, microseconds a call of the whole batch.

    Attributes:
        deployed: The pruned network.
        references: Each dense execution that runs here.
        absent: Each one that does not, and why.
        build_seconds: What each reference took to build.
        taken, dropped: Samples in all, and those left out because the machine was disturbed.
        batch, threads: What was timed.
        decisions: What runs each layer of the pruned network, and why.
        context: Of a GPU that all of them ran on; None on this machine's processor.
    """

    deployed: Spread
    references: Mapping[str, Spread]
    absent: Mapping[str, str]
    build_seconds: Mapping[str, float]
    taken: int
    dropped: int
    batch: int
    threads: int
    decisions: tuple[Decision, ...] = ()
    context: Context | None = None

    @property
    def best(self) -> str:
        """Name of the fastest dense execution, by its median."""
        return min(self.references, key=lambda name: self.references[name].p50)

    @property
    def ratio(self) -> float:
        """Median of the deployed network over that of the fastest dense execution."""
        return self.deployed.p50 / self.references[self.best].p50


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of ``benchmarks/*.csv``; the fields are its columns."""

    case: str
    choice: str
    compression: float
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    baseline_p50: float
    ratio: float
    device: str
    threads: int
    batch: int
    dtype: str
    versions: str
    date: str
    command: str


COLUMNS = tuple(f.name for f in fields(BenchRow))


def bench(
    model: nn.Module,
    policy: Policy | Mapping[str, Choice],
    example_batch: Tensor,
    threads: int = 1,
    seconds: float = 10.0,
    *,
    compile: bool = True,
    table: LatencyRows | None = None,
) -> BenchResult:
    """Time the deployed network against every dense execution, in turn.

    Args:
        model: Trained under the policy, or dense: then it is masked by magnitude, which takes the same time.
        policy: Layer → choice.
        example_batch: (N, C, H, W) float32; its batch size is what is timed.
        threads: Threads each execution may use.
        seconds: How long to measure, building not counted.
        compile: Include ``torch.compile``, which takes tens of seconds to build.
        table: Measured rows; layers that they say are faster dense run dense.
    Raises:
        PolicyError: The policy does not fit the model.
        MeasurementError: No dense execution runs on this machine.
    """
    choices = dict(policy.choices) if isinstance(policy, Policy) else dict(policy)
    deployed = convert(masked_copy(model, choices, example_batch), choices, example_batch, table, threads)
    return bench_deployed(model, deployed, example_batch, threads, seconds, compile=compile)


def bench_deployed(
    model: nn.Module,
    deployed: DeployedModel,
    example_batch: Tensor,
    threads: int = 1,
    seconds: float = 10.0,
    *,
    compile: bool = True,
) -> BenchResult:
    """Time a network that was converted before against every dense execution of ``model``; see ``bench``."""
    build_seconds: dict[str, float] = {}
    found = dense_references(model, example_batch, threads, compile=compile, built=build_seconds.__setitem__)
    cases = runners(found)
    absent = {name: why for name, why in found.items() if isinstance(why, str)}
    if not cases:
        raise MeasurementError(f"no dense execution runs on this machine: {absent}")
    result = measure({**cases, DEPLOYED: lambda: deployed(example_batch)}, seconds, threads)
    spreads = result.spreads
    return BenchResult(
        deployed=spreads.pop(DEPLOYED),
        references=spreads,
        absent=absent,
        build_seconds=build_seconds,
        taken=result.taken,
        dropped=result.dropped,
        batch=int(example_batch.shape[0]),
        threads=threads,
        decisions=deployed.decisions,
    )


@dataclass(frozen=True, slots=True)
class Labels:
    """What a benchmark's rows say of themselves: case, choice or policy, weights dense / kept, date, command."""

    case: str
    choice: str
    compression: float
    date: str
    command: str


def rows(result: BenchResult, labels: Labels) -> list[BenchRow]:
    """Return the CSV rows of a benchmark: the deployed network, then every dense execution.

    The baseline of every row is the fastest dense execution of the same run.
    """
    device, dtype, versions = _place(result.context)
    baseline = result.references[result.best].p50
    cases = [(labels.choice, labels.compression, result.deployed)]
    cases += [(f"dense:{name}", 1.0, spread) for name, spread in result.references.items()]
    return [
        BenchRow(
            case=labels.case,
            choice=choice,
            compression=compression,
            metric="latency",
            unit="us",
            p20=round(spread.p20, 3),
            p50=round(spread.p50, 3),
            p80=round(spread.p80, 3),
            baseline_p50=round(baseline, 3),
            ratio=round(spread.p50 / baseline, 4),
            device=device,
            threads=result.threads,
            batch=result.batch,
            dtype=dtype,
            versions=versions,
            date=labels.date,
            command=labels.command,
        )
        for choice, compression, spread in cases
    ]


def _place(context: Context | None) -> tuple[str, str, str]:
    """Return device, dtype and versions of a row, in words."""
    if context is not None:
        named = {"driver": context.driver, **dict(context.versions)}
        return context.place, context.dtype, " ".join(f"{name}={value}" for name, value in named.items() if value)
    facts = machine()
    versions = " ".join(f"{name}={facts[name]}" for name in ("python", "torch", "numba", "onnxruntime"))
    return f"{facts['cpu']} {facts['isa']}", "float32", versions


def append_rows(path: str | Path, rows: Sequence[BenchRow]) -> None:
    """Append rows to a CSV file; a new file gets the header first.

    Raises:
        MeasurementError: The file has other columns, or cannot be written.
    """
    path = Path(path)
    header = ",".join(COLUMNS)
    try:
        first = path.read_text(encoding="utf-8").split("\n", 1)[0].strip() if path.exists() else ""
        if first not in ("", header):
            raise MeasurementError(f"{path}: its columns are '{first}', want '{header}'; give another file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not first:
                writer.writerow(COLUMNS)
            writer.writerows(astuple(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be written ({error.strerror}); give another file.") from None
