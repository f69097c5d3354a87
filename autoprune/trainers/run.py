"""A policy replayed in full training, from names to measured figures.

The pruned network is trained, then a dense control by the same recipe, seed and number of epochs; then the deployed
network is timed against every dense execution. Each part is kept in the run's folder and gone on from after a kill.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.core.choices import Channels, parse_choice
from autoprune.core.errors import DataError, DeviceError
from autoprune.core.policy import Policy
from autoprune.core.progress import Progress, Silent
from autoprune.core.rundir import Cache, RunDir, atomic_path, write_text
from autoprune.kernels.convert import DeployedModel, convert
from autoprune.kernels.gpu import GpuModel, HostModel
from autoprune.lut.bench import bench_deployed
from autoprune.lut.context import current_context
from autoprune.lut.gpu_bench import bench_graphs
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.sparsity.channel_graph import channel_groups
from autoprune.tasks.data import DataSet, load_data
from autoprune.tasks.metrics import accuracy
from autoprune.tasks.networks import network_for
from autoprune.tasks.preprocessing import prepared
from autoprune.tasks.weights import load_weights
from autoprune.trainers.loop import Epoch, Pruning, Trained, train, write_metrics
from autoprune.trainers.recipe import Recipe
from autoprune.trainers.result import Deployment, TrainedAccuracy, TrainResult
from autoprune.trainers.savings import as_trained, count_savings, final_time_saved
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.steps import StepSettings, StepTable, load_steps, save_steps

__all__ = ["TrainRequest", "TrainResult", "follow_training", "make_uniform", "train_policy"]

CONTROL_NAME = "dense"


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What to train, and what to measure at the end.

    Attributes:
        model, data: Names as on the command line.
        policy: None trains dense.
        trainer: A name of ``METHODS``.
        settings: Of the trainer, by field name.
        recipe: Epochs included.
        seed: Of the first weights, of order and augmentation.
        init: File of weights to start from; None starts from those the model is built with.
        data_dir: Folder of the full data set; None looks in the system's dataset folder, then downloads it.
        embedded: Train on the part of the data inside the package instead.
        control: Whether the dense control is trained.
        batch, threads: Of the deployed network when it is timed.
        bench_seconds: How long it is timed; 0 leaves timing out.
        compile: Whether ``torch.compile`` is among the dense executions.
        device: Where training runs and the network is deployed, ``cpu`` or ``cuda``.
        sparse: Whether layers are trained on sparse kernels where these are measured to be faster.
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
    device: str = "cpu"
    sparse: bool = True

    def config(self) -> dict[str, object]:
        """Return what determines the trained weights, as JSON values: the configuration of the run's folder."""
        pruning = None if self.policy is None else Pruning(self.policy, self.trainer, self.settings).record()
        return {
            "command": "train",
            "model": self.model,
            "data": self.data,
            "embedded": self.embedded,
            "pruning": pruning,
            "recipe": self.recipe.record(),
            "seed": self.seed,
            "init": None if self.init is None else str(self.init),
        }


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
    model, control, data = _prepare(request)
    if request.policy is not None:
        request.policy.save(run.policy)
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
        savings=count_savings(trained, model),
        seconds={"train": sum(entry.seconds for entry in trained.log)},
    )
    if control is not None:
        _add_control(result, (control, trained.log), data, request, run, progress)
    if request.policy is not None and request.bench_seconds > 0:
        result.deployment = _deploy(model, control, data, request, progress)
    write_text(run.training, result.model_dump_json(indent=1) + "\n")
    progress.finish()
    return result


def follow_training(request: TrainRequest, run: RunDir) -> None:
    """Train along in every process but the leading one: the same weights, and no file.

    Args:
        request: The leader's.
        run: Names the leader's checkpoints; its folder need not exist here.
    Raises:
        AutopruneError: As ``train_policy``.
    """
    model, control, data = _prepare(request)
    steps: StepTable | None = {} if _trains_sparse(request) else None
    pruning = _pruning(request, steps)
    train(model, data, request.recipe, seed=request.seed, pruning=pruning, checkpoint=run.checkpoint)
    if control is not None:
        folder = RunDir.named(run.path, CONTROL_NAME)
        train(control, data, request.recipe, seed=request.seed, checkpoint=folder.checkpoint)


def _prepare(request: TrainRequest) -> tuple[nn.Module, nn.Module | None, DataSet]:
    """Return the model with its first weights, its dense control if one is wanted, and the data."""
    data = load_data(prepared(request.data, request.model), request.data_dir, full=not request.embedded)
    if not data.labelled:
        raise DataError(f"data '{data.name}' has no labels, which a training needs; give a folder a class.")
    model = _first_weights(request, data)
    if request.policy is None:
        return model, None, data
    example = data.normalize(data.validation.images[:1]).to(next(model.parameters()).device)
    request.policy.check_model(trace(model, example))
    if any(isinstance(choice, Channels) for choice in request.policy.choices.values()):
        # Found out now, not when the trained network is made smaller.
        channel_groups(model, example).coupling.kept(request.policy.choices)
    return model, copy.deepcopy(model) if request.control else None, data


def _pruning(request: TrainRequest, steps: StepTable | None) -> Pruning | None:
    return None if request.policy is None else Pruning(request.policy, request.trainer, request.settings, steps)


def _trains_sparse(request: TrainRequest) -> bool:
    return request.sparse and request.device == "cpu" and request.policy is not None


def _first_weights(request: TrainRequest, data: DataSet) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(request.seed)
        model = network_for(request.model, data.normalize(data.validation.images[:1]), data.classes)
    if request.init is not None:
        load_weights(model, request.init)
    return model.to(_device(request.device))


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"--device '{name}': training runs on cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: this machine has no usable NVIDIA GPU; train with --device cpu.")
    return torch.device(name)


def make_uniform(model: str, data: str, texts: Sequence[str]) -> Policy:
    """Return a policy without a search; see ``search_spaces.uniform``.

    Args:
        model, data: Names as on the command line.
        texts: Choices in their text form; each layer takes the first that fits.
    """
    data_set = load_data(prepared(data, model))
    example = data_set.normalize(data_set.validation.images[:1])
    network = network_for(model, example, data_set.classes)
    channels = any(isinstance(parse_choice(text), Channels) for text in texts)
    coupling = channel_groups(network, example).coupling if channels else None
    return uniform_policy(trace(network, example), texts, model=model, coupling=coupling)


def _train(
    model: nn.Module, data: DataSet, request: TrainRequest, run: RunDir, progress: Progress, *, dense: bool = False
) -> Trained:
    steps, kept = None, None
    if _trains_sparse(request) and not dense:
        # Shared by the runs of this folder: the same seed ends at the same weights on the same machine.
        half = request.recipe.precision == "bf16"
        kept = Cache(run.path.parent).steps(StepSettings(request.recipe.batch_size, half).key)
        steps = load_steps(kept)
    pruning = None if dense else _pruning(request, steps)
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
    if kept is not None and steps:
        save_steps(kept, steps)
    with atomic_path(run.weights) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}, temporary)
    return trained


def _add_control(
    result: TrainResult,
    pair: tuple[nn.Module, list[Epoch]],
    data: DataSet,
    request: TrainRequest,
    run: RunDir,
    progress: Progress,
) -> None:
    """Train the dense network; ``pair`` is it with the log of the pruned one."""
    control, own = pair
    folder = RunDir.open(run.path, CONTROL_NAME, {**request.config(), "pruning": None})
    trained = _train(control, data, request, folder, progress, dense=True)
    result.dense = _judge(control, data, trained.log)
    result.delta = result.accuracy.validation - result.dense.validation
    result.seconds["dense control"] = sum(entry.seconds for entry in trained.log)
    if result.savings is not None and result.seconds["dense control"] > 0:
        result.savings.training_time_saved = 1.0 - result.seconds["train"] / result.seconds["dense control"]
        result.savings.final_time_saved = final_time_saved(own, trained.log)


def _judge(model: nn.Module, data: DataSet, log: list[Epoch]) -> TrainedAccuracy:
    device = next(model.parameters()).device
    test = accuracy(model, data.normalize(data.test.images).to(device), data.test.labels.to(device))
    # Before the masks were final it was another network.
    final = [entry for entry in log if entry.sparsity == log[-1].sparsity]
    best = max(final, key=lambda entry: entry.validation_accuracy)
    return TrainedAccuracy(
        validation=log[-1].validation_accuracy,
        test=test,
        best_validation=best.validation_accuracy,
        best_epoch=best.epoch,
    )


def _deploy(
    model: nn.Module, control: nn.Module | None, data: DataSet, request: TrainRequest, progress: Progress
) -> Deployment:
    assert request.policy is not None
    progress.stage("measure")
    images: Tensor = data.normalize(data.validation.images)
    example = images[: request.batch].contiguous()
    # The kernels read weights in row-major order; training left them channels-last.
    pruned = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
    dense = pruned if control is None else copy.deepcopy(control).cpu().to(memory_format=torch.contiguous_format).eval()
    choices = as_trained(pruned, request.policy)
    deployed: DeployedModel
    network: nn.Module
    if request.device == "cuda":
        on_gpu = convert(pruned, choices, example, device="cuda")
        assert isinstance(on_gpu, GpuModel)
        context = current_context(len(example), device="cuda")
        deployed, network, timed = on_gpu, HostModel(on_gpu), bench_graphs(dense, on_gpu, example, context)
    else:
        deployed = network = convert(pruned, choices, example, threads=request.threads)
        timed = bench_deployed(
            dense, deployed, example, request.threads, request.bench_seconds, compile=request.compile
        )
    return Deployment(
        latency_us=timed.deployed.p50,
        references={name: spread.p50 for name, spread in timed.references.items()},
        absent_references=dict(timed.absent),
        fastest_reference=timed.best,
        ratio=timed.ratio,
        validation_accuracy=accuracy(network, images, data.validation.labels),
        layers=deployed.explain(),
        batch=request.batch,
        threads=request.threads,
    )
