"""A policy replayed in full training, from names to measured figures.

The pruned network is trained, then a dense control by the same recipe, seed and number of epochs; then the deployed
network is timed against every dense execution. Each part is kept in the run's folder and gone on from after a kill.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.core.policy import Policy
from autoprune.core.progress import Progress, Silent
from autoprune.core.rundir import RunDir, atomic_path, write_text
from autoprune.kernels.convert import convert
from autoprune.lut.bench import bench_deployed
from autoprune.search_spaces.trace import trace
from autoprune.tasks.data import DataSet, load_data
from autoprune.tasks.metrics import accuracy
from autoprune.tasks.models import build_model, load_weights
from autoprune.trainers.loop import Epoch, Pruning, Trained, train, write_metrics
from autoprune.trainers.recipe import Recipe
from autoprune.trainers.schedule import TrainerError

CONTROL_NAME = "dense"


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What to train, and what to measure at the end.

    Attributes:
        model, data: Names as on the command line.
        policy: None trains dense.
        trainer: ``clicktrain`` or ``campfire``.
        settings: Of the trainer, by field name.
        recipe: Epochs included.
        seed: Of the first weights, of order and augmentation.
        init: Safetensors weights to start from; None starts from random ones.
        data_dir: Folder of the full data set; None looks in the system's dataset folder, then downloads it.
        embedded: Train on the part of the data inside the package instead.
        control: Whether the dense control is trained.
        batch, threads: Of the deployed network when it is timed.
        bench_seconds: How long it is timed; 0 leaves timing out.
        compile: Whether ``torch.compile`` is among the dense executions.
    """

    model: str
    data: str = "fashion-mnist"
    policy: Policy | None = None
    trainer: str = "clicktrain"
    settings: Mapping[str, object] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    init: Path | None = None
    data_dir: Path | None = None
    embedded: bool = False
    control: bool = True
    batch: int = 1
    threads: int = 1
    bench_seconds: float = 10.0
    compile: bool = True

    def config(self) -> dict[str, object]:
        """Return what determines the trained weights, as JSON values: the configuration of the run's folder."""
        pruning = None if self.policy is None else Pruning(self.policy, self.trainer, self.settings).record()
        return {
            "command": "train",
            "model": self.model,
            "data": self.data,
            "embedded": self.embedded,
            "pruning": pruning,
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "init": None if self.init is None else str(self.init),
        }


class TrainedAccuracy(BaseModel):
    """Top-1 in 0..1 after the last epoch; test data serves no choice."""

    model_config = ConfigDict(extra="forbid")

    validation: float
    test: float


class Savings(BaseModel):
    """What the policy removed, on the trained weights; definitions as in ``sparsity.metrics``."""

    model_config = ConfigDict(extra="forbid")

    sparsity: dict[str, float]
    prunable_sparsity: float
    global_sparsity: float
    conv_compression: float
    all_compression: float
    storage_ratio: float
    inference_macs_saved: float | None
    training_macs_saved: float | None
    phases: list[tuple[str, int, int]]


class Deployment(BaseModel):
    """Latency of the deployed network in µs a batch (medians), beside every dense execution of the same process."""

    model_config = ConfigDict(extra="forbid")

    latency_us: float
    references: dict[str, float]
    absent_references: dict[str, str]
    fastest_reference: str
    ratio: float
    validation_accuracy: float
    layers: list[tuple[str, str, str, str]]
    batch: int
    threads: int


class TrainResult(BaseModel):
    """A finished training; ``delta`` is pruned − dense validation accuracy under one recipe."""

    model_config = ConfigDict(extra="forbid")

    model: str
    data: str
    trainer: str
    epochs: int
    seed: int
    accuracy: TrainedAccuracy
    dense: TrainedAccuracy | None = None
    delta: float | None = None
    savings: Savings | None = None
    deployment: Deployment | None = None
    seconds: dict[str, float]


def train_policy(request: TrainRequest, run: RunDir, progress: Progress | None = None) -> TrainResult:
    """Train a network under a policy, measure it, and write everything to the run's folder.

    Weights, metrics (CSV) and a checkpoint lie in the folder, those of the dense control in a folder ``dense`` inside.
    The same call after a kill goes on from the last whole epoch and ends at the same weights.

    Args:
        request: What to train.
        run: Opened with ``request.config()``.
        progress: Told of each stage.
    Raises:
        AutopruneError: Of every part: names, data, policy, trainer settings, damaged checkpoints, measurement.
    """
    progress = Silent() if progress is None else progress
    data = load_data(request.data, request.data_dir, full=not request.embedded)
    model = _first_weights(request, data)
    if request.policy is not None:
        request.policy.check_model(trace(model, data.normalize(data.validation.images[:1])))
        request.policy.save(run.policy)
    control = copy.deepcopy(model) if request.policy is not None and request.control else None
    trained = _train(model, data, request, run, progress)
    if trained.report is not None and not trained.report.finished:
        raise TrainerError(f"trainer '{request.trainer}' ended before the policy's masks were reached; train longer.")
    result = TrainResult(
        model=request.model,
        data=request.data,
        trainer=request.trainer if request.policy is not None else "dense",
        epochs=request.recipe.epochs,
        seed=request.seed,
        accuracy=_judge(model, data, trained.log),
        savings=_savings(trained),
        seconds={"train": sum(entry.seconds for entry in trained.log)},
    )
    if control is not None:
        _add_control(result, control, data, request, run, progress)
    if request.policy is not None and request.bench_seconds > 0:
        result.deployment = _deploy(model, control, data, request, progress)
    write_text(run.training, result.model_dump_json(indent=1) + "\n")
    progress.finish()
    return result


def _first_weights(request: TrainRequest, data: DataSet) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(request.seed)
        model = build_model(request.model, data.train.images.shape[1], data.classes)
    if request.init is not None:
        load_weights(model, request.init)
    return model


def _train(
    model: nn.Module, data: DataSet, request: TrainRequest, run: RunDir, progress: Progress, *, dense: bool = False
) -> Trained:
    pruning = None
    if request.policy is not None and not dense:
        pruning = Pruning(request.policy, request.trainer, request.settings)
    progress.stage("dense control" if dense else "train", request.recipe.epochs)
    log: list[Epoch] = []

    def tell(entry: Epoch) -> None:
        log.append(entry)
        write_metrics(run.metrics, log)
        progress.advance()
        progress.note(
            f"epoch {entry.epoch + 1}/{request.recipe.epochs} {entry.phase}: loss {entry.train_loss:.4f}, validation "
            f"{entry.validation_accuracy:.2%}, sparsity {entry.sparsity:.1%}, {entry.seconds:.0f} s"
        )

    trained = train(
        model, data, request.recipe, seed=request.seed, pruning=pruning, checkpoint=run.checkpoint, on_epoch=tell
    )
    with atomic_path(run.weights) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    return trained


def _add_control(
    result: TrainResult, control: nn.Module, data: DataSet, request: TrainRequest, run: RunDir, progress: Progress
) -> None:
    folder = RunDir.open(run.path, CONTROL_NAME, {**request.config(), "pruning": None})
    trained = _train(control, data, request, folder, progress, dense=True)
    result.dense = _judge(control, data, trained.log)
    result.delta = result.accuracy.validation - result.dense.validation
    result.seconds["dense control"] = sum(entry.seconds for entry in trained.log)


def _judge(model: nn.Module, data: DataSet, log: list[Epoch]) -> TrainedAccuracy:
    test = accuracy(model, data.normalize(data.test.images), data.test.labels)
    return TrainedAccuracy(validation=log[-1].validation_accuracy, test=test)


def _savings(trained: Trained) -> Savings | None:
    report = trained.report
    if report is None:
        return None
    counts = report.sparsity
    return Savings(
        sparsity={layer.name: layer.sparsity for layer in counts.layers},
        prunable_sparsity=counts.prunable_sparsity,
        global_sparsity=counts.global_sparsity,
        conv_compression=counts.conv_compression,
        all_compression=counts.all_compression,
        storage_ratio=counts.storage_ratio,
        inference_macs_saved=counts.inference_macs_saved,
        training_macs_saved=report.training_macs_saved,
        phases=[(phase.name, phase.first_epoch, phase.steps) for phase in report.phases],
    )


def _deploy(
    model: nn.Module, control: nn.Module | None, data: DataSet, request: TrainRequest, progress: Progress
) -> Deployment:
    assert request.policy is not None
    progress.stage("measure")
    images: Tensor = data.normalize(data.validation.images)
    example = images[: request.batch].contiguous()
    # The kernels read weights in row-major order; training left them channels-last.
    pruned = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
    dense = pruned if control is None else copy.deepcopy(control).to(memory_format=torch.contiguous_format).eval()
    deployed = convert(pruned, request.policy, example, threads=request.threads)
    timed = bench_deployed(
        dense, deployed, example, request.threads, request.bench_seconds, compile=request.compile
    )
    return Deployment(
        latency_us=timed.deployed.p50,
        references={name: spread.p50 for name, spread in timed.references.items()},
        absent_references=dict(timed.absent),
        fastest_reference=timed.best,
        ratio=timed.ratio,
        validation_accuracy=accuracy(deployed, images, data.validation.labels),
        layers=deployed.explain(),
        batch=request.batch,
        threads=request.threads,
    )
