"""``autoprune export``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options
from autoprune.cli.subject import subject_of

if TYPE_CHECKING:
    from torch import Tensor

    from autoprune.core.policy import Policy
    from autoprune.export.architecture import Form
    from autoprune.export.compare import Comparison
    from autoprune.export.forms import Applied
    from autoprune.export.program import Exported


def export(
    onnx: Annotated[Path | None, typer.Option("--onnx", help="ONNX file to write.", show_default=False)] = None,
    torch_export: Annotated[
        Path | None, typer.Option("--torch-export", help="torch.export program (.pt2) to write.", show_default=False)
    ] = None,
    policy: options.TakenPolicy = None,
    run: options.TakenRun = None,
    weights: options.TakenWeights = None,
    form: Annotated[
        str, typer.Option(help="compact: channels that are all zero taken out; masked: the dense shapes.")
    ] = "compact",
    data: options.TakenData = None,
    data_dir: options.DataDir = None,
    transform: options.Transform = None,
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to time dense and pruned in turn.")] = 4.0,
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a policy's network as ONNX or torch.export, check its outputs, and time it beside the dense one there."""
    from autoprune.cli.progress import working
    from autoprune.core.policy import Policy
    from autoprune.export.compare import compare
    from autoprune.export.forms import apply_policy
    from autoprune.search_spaces.trace import trace
    from autoprune.tasks.task import load_task

    target = options.one_of("--onnx", onnx, "--torch-export", torch_export)
    kind = _form(form, "ONNX" if onnx is not None else "torch.export")
    subject = subject_of(policy, run, runs_dir)
    _check_folder(target)
    record = Policy.load(subject.policy)
    name = options.prepared_data(data or subject.data, transform)
    task = load_task(record.file.model, name, data_dir=data_dir, weights=weights or subject.weights)
    record.check_model(trace(task.model, task.example))
    with working() as progress:
        progress.stage("export")
        applied = apply_policy(task.model, record.choices, kind, task.example)
        images = task.data.normalize(task.data.validation.images[: max(batch, 4)]).contiguous()
        made = _write(applied, images, onnx, target)
        progress.stage("measure")
        figures = compare(task.model, applied.network, images[:batch], threads, seconds, onnx=onnx is not None)
    if csv is not None:
        _append(csv, record, figures, name)
    _tell(_Outcome(applied, made, figures), onnx is not None, as_json)


@dataclass(frozen=True, slots=True)
class _Outcome:
    applied: Applied
    made: Exported
    figures: Comparison


def _form(text: str, target: str) -> Form:
    from autoprune.core.errors import ModelError
    from autoprune.export.report import form_of

    kind = form_of(text)
    if kind == "packed":
        raise ModelError(f"{target} cannot hold --form packed: it has no sparse weights; give compact or masked.")
    return kind


def _check_folder(path: Path) -> None:
    from autoprune.core.errors import RunError

    if not path.parent.is_dir():
        raise RunError(f"{path}: the folder {path.parent} is absent; make it, or give another file.")


def _write(applied: Applied, images: Tensor, onnx: Path | None, target: Path) -> Exported:
    from autoprune.export.onnx_file import export_onnx
    from autoprune.export.program import export_program

    return (export_program if onnx is None else export_onnx)(applied.network, images, target)


def _append(csv: Path, policy: Policy, figures: Comparison, data: str) -> None:
    from datetime import UTC, datetime

    from autoprune.export.compare import rows
    from autoprune.lut.bench import Labels, append_rows

    date = datetime.now(UTC).date().isoformat()
    compression = 1.0 / policy.file.predicted.params_ratio
    command = shlex.join(["autoprune", *sys.argv[1:]])
    labels = Labels(f"{policy.file.model} {data}", policy.file.budget, compression, date, command)
    append_rows(csv, rows(figures, labels))


def _tell(outcome: _Outcome, onnx: bool, as_json: bool) -> None:
    from autoprune.export.report import bytes_text, zeros_note
    from autoprune.report.summary import time_text

    applied, made, figures = outcome.applied, outcome.made, outcome.figures
    note = zeros_note(applied.sparse, "ONNX" if onnx else "torch.export")
    if as_json:
        from autoprune.cli.record import print_record

        print_record({"file": made.path, "any_batch": made.any_batch, "difference": made.difference, "note": note,
                      "removed": applied.removed, **asdict(figures)})  # fmt: skip
        return
    where = figures.runtime
    print(f"  file      {bytes_text(made.size_bytes)} (dense: {bytes_text(figures.dense_bytes)})")
    print(
        f"  {where}  {time_text(figures.pruned.p50)} (dense: {time_text(figures.dense.p50)}), "
        f"{figures.pruned.p50 / figures.dense.p50:.2f} × dense at batch {figures.batch}, {figures.threads} threads"
    )
    print(f"  outputs   within {made.difference:.1g} of the network's in {where}")
    removed = f"{sum(applied.removed.values())} in {len(applied.removed)} layers" if applied.removed else "none"
    print(f"  channels removed: {removed}; takes {'any number of images' if made.any_batch else 'one image'} a call")
    if note:
        print(f"  {note}")
    print(f"  {made.path}")
