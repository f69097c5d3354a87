"""The parts of ``gpu.py``: what is compiled, tables, layers; the others are in files of their own."""

from __future__ import annotations

import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import replace

from common import row
from gpu_bench import COMPRESSIONS, Bench, conv
from gpu_check import correctness
from gpu_networks import networks, training

from autoprune.core.choices import Choice, Dense
from autoprune.lut.bench import BenchRow
from autoprune.lut.build import Pace, build_table
from autoprune.lut.context import Context
from autoprune.lut.row import Row
from autoprune.lut.table import LatencyTable
from autoprune.search.tables import Job, Request, build_tables, plan_jobs

MODELS = ["resnet20@3x32x32", "resnet32@3x32x32", "vgg16@3x32x32", "torchvision:resnet18", "torchvision:resnet50",
          "resnet20"]
BATCHES = [128, 1, 32]


def compiled(bench: Bench) -> None:
    """Compile everything that the other parts launch, in worker processes."""
    from autoprune.kernels.triton.units import units
    from autoprune.lut.gpu_compile import precompile

    started = time.monotonic()
    if not bench.dry:
        import torch

        for dtype in (torch.bfloat16, torch.float16):
            precompile(dtype)
    context = bench.context(1)
    seconds = [time.monotonic() - started]
    count = f"{len(units(torch.bfloat16))} kernels a dtype" if not bench.dry else "nothing"
    bench.write([row("compile", count, "seconds", seconds, baseline=0.0, unit="s", context=context)])


def tables(bench: Bench) -> None:
    """Build the tables of all networks and batch sizes within the part's time, and zip them."""
    models, batches = (["resnet20@1x12x12"], [2]) if bench.dry else (MODELS, BATCHES)
    request = Request(
        space="cpu-default" if bench.dry else "gpu-default", device="cpu" if bench.dry else "cuda",
        limit_s=2.0 if bench.dry else bench.left_s - 25.0, networks=4 if bench.dry else 30,
    )
    folder = bench.work / ("dry" if bench.dry else "tables")
    jobs = plan_jobs(models, batches, request, file=None, folder=folder, runs_dir=bench.work)
    # A killed run leaves finished tables behind; zipping is what may still be missing then.
    started = time.monotonic()
    lost: list[Job] = []

    def failed(job: Job, error: Exception) -> None:
        lost.append(job)
        bench.note(f"table of {job.model} at batch {job.batch}:\n{''.join(traceback.format_exception(error))}")

    try:
        built = build_tables(
            jobs, request, lambda name: lambda done, total: None, lambda text: print(text, flush=True), failed=failed
        )
    finally:
        with zipfile.ZipFile(bench.out / "gpu-tables.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.glob("*.json")):
                file.write(path, path.name)
    seconds = time.monotonic() - started
    found = [row("tables", "all", "seconds", [seconds], baseline=0.0, unit="s", context=bench.context(1))]
    for job, table in zip([job for job in jobs if job not in lost], built, strict=True):
        found += _fidelity(f"table {job.model} batch {job.batch}", table)
    bench.write(found)


def _fidelity(case: str, table: LatencyTable) -> list[BenchRow]:
    fit, context = table.calibration, table.context
    figures = {"rows": float(len(table.rows)), "left out": float(len(table.unmeasured))}
    if fit is not None:
        figures |= {"networks": float(len(fit.points)), "MAPE": fit.mape, "Kendall tau": fit.kendall_tau}
    return [
        row(case, "all", metric, [value], baseline=0.0, unit="1", batch=context.batch, context=context)
        for metric, value in figures.items()
    ]


def layers(bench: Bench) -> None:
    """Write the rows of ResNet-50's 3×3 layers at batch 128, from its table or measured now."""
    context = bench.context(128)
    sizes = [(32, 8)] if bench.dry else [(64, 56), (128, 28), (256, 14), (512, 7)]
    wanted = {conv(width, width, size, 3): tuple(COMPRESSIONS.values()) for width, size in sizes}
    wanted = {replace(layer, name=f"conv{index}"): choices for index, (layer, choices) in enumerate(wanted.items())}
    table = build_table(wanted, context, pace=Pace(bench.left_s - 5.0), bench=bench.layers(context))
    table.save(bench.out / "gpu-layers.json")
    found: list[BenchRow] = []
    for layer in wanted:
        dense = table.row(layer, Dense())
        case = f"ResNet-50 3x3 {layer.channels}@{layer.input_hw[0]}"
        for compression, choice in {1.0: Dense(), **COMPRESSIONS}.items():
            if not table.measured(layer, [choice]):
                why = table.unmeasured[layer.signature, choice.text]
                print(f"{case} {choice.text}: not measured ({why.reason} {why.note})", flush=True)
                continue
            found += _layer_rows(case, compression, choice, table.row(layer, choice), dense.p50, context)
    bench.write(found)


def _layer_rows(
    case: str, compression: float, choice: Choice, measured: Row, dense_us: float, context: Context
) -> list[BenchRow]:
    figures = {
        "latency": (measured.p50, dense_us, "us"),
        "roofline floor": (measured.floor_us or 0.0, dense_us, "us"),
        "tile model": (measured.model_us or 0.0, dense_us, "us"),
        "speed-up over best cuDNN": (dense_us / measured.p50, 1.0, "x"),
    }
    return [
        row(case, choice.text, metric, [value], baseline=baseline, compression=compression, unit=unit,
            batch=context.batch, context=context)
        for metric, (value, baseline, unit) in figures.items()
    ]


PARTS: dict[str, Callable[[Bench], None]] = {
    "compile": compiled, "correctness": correctness, "layers": layers, "networks": networks, "training": training,
    "tables": tables,
}
