"""Dense against pruned in the runtime that an exported file is for: sizes, and latencies taken in turn."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.export.onnx_file import onnx_cases
from autoprune.export.program import program_cases
from autoprune.kernels.dense import to_onnx
from autoprune.lut.bench import BenchResult, BenchRow, Labels
from autoprune.lut.bench import rows as bench_rows
from autoprune.lut.measure import Spread, measure


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two networks in one runtime.

    Attributes:
        runtime: ``onnxruntime`` or ``torch``.
        dense_bytes, pruned_bytes: Of the exported files.
        dense, pruned: Microseconds a call.
        taken, dropped: Samples in all, and those left out because the machine was disturbed.
        batch, threads: What was timed.
    """

    runtime: str
    dense_bytes: int
    pruned_bytes: int
    dense: Spread
    pruned: Spread
    taken: int
    dropped: int
    batch: int
    threads: int


def compare(
    dense: nn.Module, pruned: nn.Module, images: Tensor, threads: int = 1, seconds: float = 4.0, *, onnx: bool = True
) -> Comparison:
    """Time two networks in turn as onnxruntime or PyTorch runs them.

    Args:
        dense, pruned: float32, on the CPU; not modified.
        images: (N, C, H, W) float32, what they are timed on.
        threads: Of either.
        seconds: How long to measure.
        onnx: In onnxruntime, each exported for this batch size; else in PyTorch.
    Raises:
        ModelError: A network cannot be exported.
        MeasurementError: A network cannot be run.
    """
    models = {"dense": dense, "pruned": pruned}
    if onnx:
        files = {name: to_onnx(model, images) for name, model in models.items()}
        cases, sizes = onnx_cases(files, images, threads), {name: len(content) for name, content in files.items()}
    else:
        cases, sizes = program_cases(models, images), {name: _program_bytes(m, images) for name, m in models.items()}
    found = measure(cases, seconds, threads)
    spreads = found.spreads
    return Comparison(
        runtime="onnxruntime" if onnx else "torch",
        dense_bytes=sizes["dense"],
        pruned_bytes=sizes["pruned"],
        dense=spreads["dense"],
        pruned=spreads["pruned"],
        taken=found.taken,
        dropped=found.dropped,
        batch=len(images),
        threads=threads,
    )


def _program_bytes(model: nn.Module, images: Tensor) -> int:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own dependencies
        try:
            torch.export.save(torch.export.export(model.eval(), (images,)), buffer)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ModelError(f"the model cannot be exported by torch.export: {reason[:160]}") from None
    return len(buffer.getvalue())


def rows(figures: Comparison, labels: Labels) -> list[BenchRow]:
    """Return the CSV rows of a comparison, the dense network as the baseline."""
    result = BenchResult(
        deployed=figures.pruned,
        references={figures.runtime: figures.dense},
        absent={},
        build_seconds={},
        taken=figures.taken,
        dropped=figures.dropped,
        batch=figures.batch,
        threads=figures.threads,
    )
    return bench_rows(result, labels)
