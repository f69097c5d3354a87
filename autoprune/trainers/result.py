"""What a training came to, as the JSON that its run's folder keeps."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TrainedAccuracy(BaseModel):
    """Top-1 in 0..1 after the last epoch, and the best validation accuracy under the final masks with its epoch.

    Test data serves no choice, so the test figure is of the last epoch.
    """

    model_config = ConfigDict(extra="forbid")

    validation: float
    test: float
    best_validation: float | None = None
    best_epoch: int | None = None


class TrainedOn(BaseModel):
    """What a layer was trained on once its mask was final, and why; µs of its step, 0 where nothing was measured."""

    model_config = ConfigDict(extra="forbid")

    layer: str
    kernels: dict[str, str]
    why: str
    dense_us: float
    chosen_us: float


class Savings(BaseModel):
    """What the policy removed, on the trained weights; definitions as in ``sparsity.metrics``.

    MACs saved are counted, time saved is measured: whole epochs against those of the dense control, and of these the
    ones under final masks alone. Dead channels are those that ``dead_channels`` can take out losslessly, per layer.
    """

    model_config = ConfigDict(extra="forbid")

    nominal_sparsity: dict[str, float] = {}
    sparsity: dict[str, float]
    prunable_sparsity: float
    global_sparsity: float
    conv_compression: float
    all_compression: float
    storage_ratio: float
    inference_macs_saved: float | None
    training_macs_saved: float | None
    training_time_saved: float | None = None
    final_time_saved: float | None = None
    trained_on: list[TrainedOn] = []
    scoring_passes: float = 0.0
    dead_channels: dict[str, int] | None = None
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
