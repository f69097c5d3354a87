"""Latency tables of several networks and batch sizes in one go: rows, calibration, dense references.

Rows that several networks of one batch size share are measured once. With a time limit each network gets a share of
what is left by the rows it still lacks, part of it kept back for its calibration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense
from autoprune.core.coupling import Coupling
from autoprune.core.errors import MeasurementError, ModelError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import model_fingerprint
from autoprune.core.rundir import make_folder, run_name, table_path
from autoprune.kernels.dense import dense_references, runners
from autoprune.lut import build, calibrate
from autoprune.lut.build import Bench, Pace, images_at_once
from autoprune.lut.context import Context
from autoprune.lut.cpu_rows import Setting
from autoprune.lut.deploy import Deploy, deployer
from autoprune.lut.embedded import place_name
from autoprune.lut.gpu_channels import with_narrowed
from autoprune.lut.measure import interleaved_us
from autoprune.lut.memory import map_bytes
from autoprune.lut.row import Row, Whole
from autoprune.lut.table import Key, LatencyTable, current_context
from autoprune.search.channels import open_space
from autoprune.search_spaces.grouped import table_rows
from autoprune.search_spaces.space import SearchSpace
from autoprune.search_spaces.trace import trace
from autoprune.sparsity.channels import ChannelGroups
from autoprune.tasks.networks import untrained

NETWORKS = 30
# Of a network's time: what is kept back for calibration and dense references.
_KEPT_BACK = 0.25
_REFERENCES = ("plan", "torch-folded", "torch-channels-last")
_REFERENCE_SECONDS = 1.0

Stage = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, slots=True)
class Request:
    """What is measured.

    Attributes:
        data, data_dir, space, seed: As on the command line.
        device, threads: Where.
        limit_s: Seconds for all tables together.
        networks: Random networks of each calibration.
    """

    data: str = "fashion-mnist"
    data_dir: Path | None = None
    space: str = "cpu-default"
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    limit_s: float | None = None
    networks: int = NETWORKS


@dataclass(frozen=True, slots=True)
class Job:
    """One table: of a network at a batch size, in a file."""

    model: str
    batch: int
    path: Path


@dataclass(slots=True)
class _Subject:
    """A job with its network and what it wants measured."""

    job: Job
    context: Context
    model: nn.Module
    example: Tensor
    layers: tuple[LayerSpec, ...]
    space: SearchSpace
    groups: ChannelGroups
    wanted: dict[LayerSpec, tuple[Choice, ...]]
    rows: dict[Key, Row] = field(default_factory=dict)

    @property
    def pool(self) -> tuple[int, int]:
        """Networks of one pool share rows: on a CPU as many images must pass a layer together."""
        batch = self.context.batch
        return batch, 0 if self.context.device == "cuda" else images_at_once(self.layers, batch, self.context.threads)

    @property
    def keys(self) -> set[Key]:
        """Every row wanted."""
        dense = {(layer.signature, "dense") for layer in self.wanted}
        return dense | {(layer.signature, c.text) for layer, choices in self.wanted.items() for c in choices}


def plan_jobs(
    models: Sequence[str],
    batches: Sequence[int],
    request: Request,
    *,
    file: Path | None,
    folder: Path | None,
    runs_dir: Path,
) -> list[Job]:
    """Return a job for each network and batch size, with the file of its table.

    Args:
        models: Names as ``tasks.networks.untrained`` reads them.
        batches: Images per call.
        request: Settings of all of them.
        file: Of the one table there is.
        folder: Of all tables; below ``runs_dir`` where None.
        runs_dir: Folder of all runs.
    """
    gpu = request.device == "cuda"
    if gpu:
        import torch

        place = place_name(torch.cuda.get_device_name())
    jobs = []
    for batch in batches:
        for model in models:
            short = model.removeprefix("torchvision:").replace("@", "-")
            # As embedded tables are named, so that a folder of them can be taken into the package.
            name = run_name(place, short, f"b{batch}") if gpu else run_name(short, f"b{batch}", f"t{request.threads}")
            path = file or (folder / f"{name}.json" if folder is not None else table_path(runs_dir, name))
            jobs.append(Job(model, batch, path))
    return jobs


def build_tables(
    jobs: Sequence[Job],
    request: Request,
    stage: Stage,
    note: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    *,
    failed: Callable[[Job, Exception], None] | None = None,
) -> list[LatencyTable]:
    """Measure, calibrate and save every job's table; a file that exists is completed.

    Args:
        jobs: In order; each is finished before the next begins.
        request: Settings of all of them.
        stage: From a stage's name to its callback for (rows done, rows in all).
        note: Told of stages without steps.
        clock: Seconds that pass.
        failed: Told of a job whose table could not be finished; the others go on, and its table is not returned.
            Without it the first failure is raised.
    Raises:
        TableMismatch: A file that exists is of another context.
        MeasurementError: A layer does not run.
    """
    start = clock()
    subjects = [_open(job, request) for job in jobs]
    for job in jobs:  # whatever could be refused has been by now
        make_folder(job.path.parent)
    pools: dict[tuple[int, int], dict[Key, Row]] = {}
    tables = []
    for index, subject in enumerate(subjects):
        pool = pools.setdefault(subject.pool, {})
        subject.rows = {key: row for key, row in {**pool, **subject.rows}.items() if key in subject.keys}
        limit = None
        if request.limit_s is not None:
            lacking = [len(other.keys - set(other.rows) - set(pools.get(other.pool, {}))) + 1
                       for other in subjects[index:]]
            limit = max(0.0, request.limit_s - (clock() - start)) * lacking[0] / sum(lacking)
        pace = Pace(None if limit is None else (1.0 - _KEPT_BACK) * limit, clock)
        try:
            table = _one(subject, request, pace, stage, note)
        except Exception as error:
            if failed is None:
                raise
            failed(subject.job, error)
            continue
        pool.update(table.rows)
        tables.append(table)
    return tables


def _open(job: Job, request: Request) -> _Subject:
    context = current_context(job.batch, request.threads, request.device)
    model, example = untrained(job.model, request.data, request.seed, request.data_dir)
    layers = trace(model, example)
    space, groups = open_space(request.space, model, example, layers, request.device)
    wanted = table_rows(space)
    rows = dict(LatencyTable.load(job.path, context).rows) if job.path.exists() else {}
    example = example.repeat(job.batch, 1, 1, 1)
    return _Subject(job, context, model, example, layers, space, groups, wanted, rows)


def _one(
    subject: _Subject, request: Request, pace: Pace, stage: Stage, note: Callable[[str], None]
) -> LatencyTable:
    job = subject.job
    context = subject.context
    images = images_at_once(subject.layers, context.batch, context.threads)
    bench: Bench = build.CpuBench(Setting(context, images))
    if subject.context.device == "cuda":
        from autoprune.lut.gpu_rows import cuda_bench

        bench = cuda_bench(subject.context)
    table = build.build_table(
        subject.wanted,
        subject.context,
        rows=subject.rows,
        progress=stage(f"table {job.model} b{job.batch}"),
        checkpoint=lambda part: part.save(job.path),
        pace=pace,
        bench=bench,
    )
    if context.device == "cuda":
        # By falling share of the dense network's time, as choices are measured.
        ranked = [layer for layer, _ in build.by_share(subject.wanted, bench)]
        table = with_narrowed(table, ranked, bench, pace)
    if table.calibration is None:
        note(f"calibration of {job.model} at batch {job.batch}: {request.networks} networks")
        network = Network(
            job.model, subject.model, subject.example, subject.layers, subject.space.coupling, subject.groups
        )
        searched = {layer.name: subject.space.choices[layer.name] for layer in subject.space.searched}
        table = finish_table(table, network, searched, request)
    table.save(job.path)
    return table


@dataclass(frozen=True, slots=True)
class Network:
    """What a table is calibrated on: a model by name, a batch (N, C, H, W) of its images, its layers."""

    name: str
    model: nn.Module
    example: Tensor
    layers: tuple[LayerSpec, ...]
    coupling: Coupling = field(default_factory=Coupling)
    groups: ChannelGroups | None = None


def finish_table(
    table: LatencyTable, network: Network, searched: Mapping[str, Sequence[Choice]], request: Request
) -> LatencyTable:
    """Return a table with its calibration, dense executions and map bytes.

    Where no choice is faster than dense there is nothing to calibrate on: random networks would all be the dense one.
    """
    context = table.context
    timer: calibrate.Timer | None = None
    if context.device == "cuda":
        from autoprune.lut.gpu_deploy import GpuDeployer, cuda_network_us, dense_forms, gpu_plan

        plan = gpu_plan(network.model, network.example)
        deploy: Deploy = GpuDeployer(plan, network.example, table)
        dense_us = cuda_network_us(dense_forms(network.model, plan, table, network.example))
        timer = cuda_network_us
    else:
        deploy = deployer(network.model, network.example, context.threads, network.groups)
        dense_us = _host_dense_us(network, context.threads)
    try:
        maps: int | None = map_bytes(network.model, network.example, context)
    except ModelError:
        maps = None
    try:
        table = calibrate.calibrate(
            table,
            calibrate.Coupled(network.layers, network.coupling),
            deploy,
            searched,
            request.seed,
            request.networks,
            timer=timer,
        )
    except MeasurementError:
        faster = any(_faster(table, layer, searched.get(layer.name, ())) for layer in network.layers)
        if faster or network.coupling.groups:
            raise
    fingerprint = model_fingerprint(network.layers)
    whole = Whole(model=network.name, fingerprint=fingerprint, dense_us=dense_us, activation_bytes=maps)
    return replace(table, whole=whole)


def _faster(table: LatencyTable, layer: LayerSpec, choices: Sequence[Choice]) -> bool:
    dense_us = table.layer_us(layer, Dense())
    return any(table.layer_us(layer, choice) < dense_us for choice in table.measured(layer, choices))


def _host_dense_us(network: Network, threads: int) -> dict[str, float]:
    forms = dense_references(network.model, network.example, threads, compile=False, only=_REFERENCES)
    samples = interleaved_us(runners(forms), _REFERENCE_SECONDS, threads)
    return {name: float(np.median(values)) for name, values in samples.items()}
