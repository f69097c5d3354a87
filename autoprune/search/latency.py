"""The latency side of a search: dense references, table and calibration, measured once per machine and model.

What was measured is kept for the next search of the same model in the same context, so that the same seed finds the
same policy there; the closing verification times the deployed network anew every time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoprune.core.choices import Choice
from autoprune.core.layers import LayerSpec
from autoprune.core.progress import Progress
from autoprune.core.rundir import Cache, RunDir, write_text
from autoprune.lut.build import Bench, CpuBench, build_table, images_at_once
from autoprune.lut.calibrate import Coupled, calibrate
from autoprune.lut.cpu_rows import Setting
from autoprune.lut.deploy import deployer
from autoprune.lut.embedded import find_table
from autoprune.lut.gpu_rows import cuda_bench
from autoprune.lut.gpu_timer import CudaBackend
from autoprune.lut.table import Context, LatencyTable, current_context
from autoprune.search.config import SearchConfig
from autoprune.search.deploy import Deployer, References, measure_references, reopen_references
from autoprune.search.elsewhere import is_elsewhere, predictor
from autoprune.search.on_gpu import device_deployer
from autoprune.search.tables import Network, Request, finish_table
from autoprune.search_spaces.grouped import table_rows
from autoprune.search_spaces.space import SearchSpace
from autoprune.sparsity.channels import ChannelGroups
from autoprune.tasks.task import Task

CALIBRATION_NETWORKS = 30


@dataclass(frozen=True, slots=True)
class Subject:
    """What latency is measured of, and where it is kept."""

    task: Task
    layers: tuple[LayerSpec, ...]
    space: SearchSpace
    run: RunDir
    cache: Cache
    groups: ChannelGroups = field(default_factory=ChannelGroups)


def open_latency(subject: Subject, config: SearchConfig, progress: Progress) -> Deployer:
    """Return the means to predict and measure latency: kept from an earlier session, given, or measured now.

    Raises:
        TableMismatch: A given table is of another batch size, or measured elsewhere and not calibrated.
        MissingLatency: A given table lacks rows of this space.
    """
    context = current_context(config.batch, config.threads, config.device)
    example = _example(subject.task, config.batch)
    options = table_rows(subject.space)
    given = _given(subject, config)
    if given is not None:
        elsewhere = is_elsewhere(given, context)
        given.require(options)
        if elsewhere:
            return _predicted(given, subject, example, progress)
    key = _key(context, subject)
    if config.device == "cuda":
        return _on_gpu(given, subject, config, context, progress)
    progress.stage("dense references", None)
    references = _references(subject, config, example, key, progress)
    own = LatencyTable.load(subject.run.table, context) if subject.run.table.exists() else None
    table = own or given or _build(subject, context, options, config.fresh, progress)
    table.require(options)
    if table.calibration is None:
        table = _calibrated(table, subject, config, example, progress)
        if own is None and given is None:
            table.save(subject.cache.table(key))
    if table is not own:
        table.save(subject.run.table)
    return Deployer(example, table, references, config.threads, subject.groups, progress.note)


def _on_gpu(
    given: LatencyTable | None, subject: Subject, config: SearchConfig, context: Context, progress: Progress
) -> Deployer:
    """Return the deployer of the present GPU: its table given, kept or measured now."""
    example = _example(subject.task, config.batch)
    kept = subject.cache.table(_key(context, subject))
    own = LatencyTable.load(subject.run.table, context) if subject.run.table.exists() else None
    options = table_rows(subject.space)
    table = own or given or _build(subject, context, options, config.fresh, progress)
    table.require(options)
    if table.calibration is None:
        progress.stage("calibration", None)
        network = Network(subject.task.model_name, subject.task.model, example, subject.layers)
        searched = {layer.name: subject.space.choices[layer.name] for layer in subject.space.searched}
        request = Request(seed=config.seed, device=config.device, networks=CALIBRATION_NETWORKS)
        table = finish_table(table, network, searched, request)
        if own is None and given is None:
            table.save(kept)
    if table is not own:
        table.save(subject.run.table)
    progress.stage("dense references", None)
    return device_deployer(subject.task.model, example, table, subject.layers, CudaBackend())


def _given(subject: Subject, config: SearchConfig) -> LatencyTable | None:
    if config.table is None:
        return None
    return LatencyTable.load(find_table(str(config.table), subject.layers, config.batch))


def _predicted(table: LatencyTable, subject: Subject, example: Tensor, progress: Progress) -> Deployer:
    progress.note(
        f"the latency table was measured on {table.context.place}: latencies are predicted, and no network is "
        "deployed to verify them"
    )
    table.save(subject.run.table)
    return predictor(example, table, subject.layers, subject.space.coupling)


def _example(task: Task, batch: int) -> Tensor:
    """Return a batch of real images; a batch larger than the validation split repeats them."""
    images = task.data.validation.images
    return task.data.normalize(images[torch.arange(batch) % len(images)]).contiguous()


def _references(
    subject: Subject, config: SearchConfig, example: Tensor, key: str, progress: Progress
) -> References:
    """Return the dense references; the figures are kept, the fastest form is built again."""
    kept = subject.cache.references(key)
    if not subject.run.references.exists() and kept.exists() and not config.fresh:
        write_text(subject.run.references, kept.read_text(encoding="utf-8"))
    if subject.run.references.exists():
        stored = subject.run.read_json(subject.run.references)
        return reopen_references(subject.task.model, example, config.threads, stored)
    references = measure_references(subject.task.model, example, config.threads, progress.note)
    text = json.dumps({"medians_us": references.medians_us, "absent": references.absent}, indent=1) + "\n"
    write_text(kept, text)
    write_text(subject.run.references, text)
    return references


def _build(
    subject: Subject, context: Context, options: dict[LayerSpec, tuple[Choice, ...]], fresh: bool, progress: Progress
) -> LatencyTable:
    kept = subject.cache.table(_key(context, subject))
    table = LatencyTable.load(kept, context) if kept.exists() and not fresh else LatencyTable(context)
    pairs = {(layer.signature, choice.text) for layer, choices in options.items() for choice in choices}
    if pairs <= {*table.rows, *table.unmeasured}:
        return table
    progress.stage("latency table", len(pairs))
    counted = 0

    def told(done: int, total: int) -> None:
        nonlocal counted
        progress.advance(done - counted)
        counted = done

    images = images_at_once(subject.layers, context.batch, context.threads)
    bench: Bench = cuda_bench(context) if context.device == "cuda" else CpuBench(Setting(context, images))
    return build_table(
        options, context, rows=table.rows, progress=told, checkpoint=lambda part: part.save(kept), bench=bench
    )


def _calibrated(
    table: LatencyTable, subject: Subject, config: SearchConfig, example: Tensor, progress: Progress
) -> LatencyTable:
    progress.stage("calibration", CALIBRATION_NETWORKS)
    deploy = deployer(subject.task.model, example, config.threads, subject.groups)

    def counted(choices: dict[str, Choice]) -> object:
        progress.advance()
        return deploy(choices)

    searched = {layer.name: subject.space.choices[layer.name] for layer in subject.space.searched}
    network = Coupled(subject.layers, subject.space.coupling)
    return calibrate(
        table, network, counted, searched, config.seed, CALIBRATION_NETWORKS  # type: ignore[arg-type]
    )


def _key(context: Context, subject: Subject) -> str:
    text = context.model_dump_json() + subject.task.model_name + subject.space.fingerprint
    return hashlib.sha256(text.encode()).hexdigest()[:16]
