"""``autoprune apply``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options
from autoprune.cli.subject import subject_of

if TYPE_CHECKING:
    from torch import Tensor

    from autoprune.export.report import Size
    from autoprune.tasks.task import Task


def apply(
    out: Annotated[Path, typer.Option(help="Folder to write: weights.safetensors and architecture.json.")],
    policy: options.TakenPolicy = None,
    run: options.TakenRun = None,
    weights: options.TakenWeights = None,
    form: Annotated[
        str,
        typer.Option(
            help="masked: dense shapes with zeros; compact: channels that are all zero taken out; packed: dense "
            "shapes, only what is not zero is stored."
        ),
    ] = "masked",
    data: options.TakenData = None,
    data_dir: options.DataDir = None,
    transform: options.Transform = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a policy's network as safetensors with a JSON file that rebuilds it: autoprune.load(DIR, model=factory)."""
    from autoprune.cli.progress import working
    from autoprune.core.policy import Policy
    from autoprune.export.bundle import ARCHITECTURE, WEIGHTS, load, save
    from autoprune.export.forms import apply_policy, check_same_outputs
    from autoprune.export.report import form_of, size_of
    from autoprune.search_spaces.trace import trace
    from autoprune.tasks.networks import standalone
    from autoprune.tasks.task import load_task

    kind = form_of(form)
    subject = subject_of(policy, run, runs_dir)
    _check_out(out, force)
    record = Policy.load(subject.policy)
    names = (record.file.model, options.prepared_data(data or subject.data, transform))
    task = load_task(*names, data_dir=data_dir, weights=weights or subject.weights)
    record.check_model(trace(task.model, task.example))
    with working() as progress:
        progress.stage("apply")
        applied = apply_policy(task.model, record.choices, kind, task.example)
        texts = {name: choice.text for name, choice in record.choices.items()}
        rebuilt = standalone(names[0], task.example, task.data.classes), names[1]
        save(applied.masked, applied.network, out, form=kind, names=rebuilt, policy=texts)
        difference = check_same_outputs(load(out, task.model), applied.masked, _images(task))
    size = size_of(task.model, applied.network, out / WEIGHTS)
    if as_json:
        from autoprune.cli.record import print_record

        paths = {"weights": out / WEIGHTS, "architecture": out / ARCHITECTURE}
        print_record({"model": names[0], "data": names[1], "form": kind, "policy": subject.policy, "size": size,
                      "removed": applied.removed, "difference": difference, "paths": paths})  # fmt: skip
        return
    _show(size, applied.removed, difference, out, kind)


def _check_out(out: Path, force: bool) -> None:
    from autoprune.core.errors import RunError
    from autoprune.export.bundle import ARCHITECTURE

    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: a file stands there; give a folder.")
    known = (out / ARCHITECTURE).exists()
    if out.is_dir() and any(out.iterdir()) and not known and not force:
        raise RunError(f"--out {out}: the folder is not empty; give another one, or --force to write into it.")


def _images(task: Task) -> Tensor:
    return task.data.normalize(task.data.validation.images[:8]).contiguous()


def _show(size: Size, removed: dict[str, int], difference: float, out: Path, form: str) -> None:
    from autoprune.export.report import size_lines

    for line in size_lines(size):
        print(line)
    if removed:
        print(f"  channels removed  {sum(removed.values())} in {len(removed)} layers")
    elif form == "compact":
        print("  channels removed  none: no filter is all zero and can leave; the shapes are the dense ones")
    print(f"  outputs           within {difference:.1g} of the masked network's\n  folder            {out}")
