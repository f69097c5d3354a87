"""The parts of ``gpu.py``."""

from __future__ import annotations

import math
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import row
from torch import Tensor, nn

from autoprune.core.choices import NM, Choice, Dense, Fine, Pattern
from autoprune.core.layers import LayerSpec
from autoprune.kernels.gpu_layers import Source, build_layer
from autoprune.kernels.triton.configs import Launch, all_configs
from autoprune.kernels.triton.layers import ELLConv2d, ELLOptions
from autoprune.kernels.triton.spmm_launch import forward_configs
from autoprune.lut.bench import BenchRow, append_rows
from autoprune.lut.build import Pace, build_table
from autoprune.lut.context import Context, current_context
from autoprune.lut.gpu_deploy import GpuDeployer, dense_forms, gpu_plan, network_us
from autoprune.lut.gpu_families import place_of
from autoprune.lut.gpu_rows import GpuBench, cuda_bench, kernel_settings
from autoprune.lut.gpu_timer import Backend, CudaBackend, Replay, Subject, time_subject
from autoprune.lut.table import LatencyTable
from autoprune.lut.tile_model import DEVICES
from autoprune.search.tables import Request, build_tables, plan_jobs
from autoprune.search_spaces.trace import trace
from autoprune.sparsity.masks import make_mask
from autoprune.tasks.networks import untrained

MODELS = ["resnet20@3x32x32", "resnet32@3x32x32", "vgg16@3x32x32", "torchvision:resnet18", "torchvision:resnet50",
          "resnet20"]
BATCHES = [128, 1, 32]
# Entries kept of nine, and kernels: 2.25×, 4.5× and 9× fewer weights, shared as tensor cores want it.
COMPRESSIONS: dict[float, Choice] = {
    9.0 / 4.0 / kernels: Pattern(count=8, entries=4, kernels=kernels, share=(64, 8)) for kernels in (1.0, 0.5, 0.25)
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class NoClock:
    """Runs every call and takes no time: for a dry run."""

    cache_bytes = 1 << 16

    def warm_up(self, calls: Sequence[Callable[[], object]]) -> None:
        for call in calls:
            call()

    def capture(self, calls: Sequence[Callable[[], object]]) -> Replay:
        return lambda: float(len(calls))

    launch = capture

    def flush(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a part runs and writes.

    Attributes:
        out, work: Folders of results and of unfinished tables.
        dry: Tiny sizes on a CPU, no timing.
        seconds: What the part may take.
    """

    out: Path
    work: Path
    dry: bool
    seconds: float
    started: float

    @staticmethod
    def make(out: Path, work: Path, *, dry: bool, seconds: float) -> Bench:
        """Return a bench; a dry one writes below ``out/dry``."""
        out = out / "dry" if dry else out
        out.mkdir(exist_ok=True)
        return Bench(out, work, dry, seconds, time.monotonic())

    @property
    def left_s(self) -> float:
        """Seconds of the part's budget that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def context(self, batch: int, direction: str = "forward") -> Context:
        """Return the context of rows measured here."""
        if self.dry:
            return Context(device="cpu", cpu="dry run", batch=2, cache="network", direction=direction)  # type: ignore[arg-type]
        return current_context(batch, device="cuda", direction=direction)  # type: ignore[arg-type]

    def backend(self) -> Backend:
        """Return what times the calls."""
        return NoClock() if self.dry else CudaBackend()

    def layers(self, context: Context) -> GpuBench:
        """Return what measures rows."""
        return GpuBench(context, DEVICES[0], NoClock()) if self.dry else cuda_bench(context)

    def write(self, rows: Sequence[BenchRow]) -> None:
        """Append rows to the results, and print them."""
        append_rows(self.out / "gpu.csv", rows)
        for r in rows:
            print(f"{r.case} | {r.choice} | {r.metric}: {r.p50:g} {r.unit} (baseline {r.baseline_p50:g})", flush=True)


def correctness(bench: Bench) -> None:
    """Compare every kernel and configuration with float64 on the CPU, on odd and usual shapes."""
    shapes = [(32, 40, 9, 3, 1), (64, 64, 14, 3, 1), (64, 128, 14, 3, 2), (128, 64, 7, 1, 1)]
    context = bench.context(2)
    dtypes = [torch.float32] if bench.dry else [torch.bfloat16, torch.float16]
    worst: dict[tuple[str, str], float] = {}
    for channels, filters, size, window, stride in shapes[:2] if bench.dry else shapes:
        layer = _conv(channels, filters, size, window, stride)
        for dtype in dtypes:
            for kernel, config, choice in _cases(layer, dtype, dry=bench.dry):
                error = _error(layer, choice, kernel, config, replace(place_of(context), dtype=dtype))
                key = (kernel, f"{config} {dtype}".strip())
                worst[key] = max(worst.get(key, 0.0), error / TOLERANCE[dtype])
    bench.write([
        row("correctness", f"{kernel} {config}", "largest error over tolerance", [value], baseline=1.0,
            batch=context.batch, context=context)
        for (kernel, config), value in worst.items()
    ])
    wrong = {key: value for key, value in worst.items() if not value <= 1.0}
    if wrong:
        raise AssertionError(f"outputs differ from the reference (error over tolerance): {wrong}")


def _conv(channels: int, filters: int, size: int, window: int, stride: int = 1) -> LayerSpec:
    pad = window // 2
    out = (size + 2 * pad - window) // stride + 1
    return LayerSpec(
        "x", "conv", (filters, channels, window, window), (stride, stride), (pad, pad), input_hw=(size, size),
        output_hw=(out, out),
    )


def _cases(layer: LayerSpec, dtype: torch.dtype, *, dry: bool) -> list[tuple[str, str, Choice]]:
    block: Choice = Pattern(count=8, kernels=0.5, share=(32, 8)) if layer.window == (3, 3) else Fine(keep=0.5)
    found: list[tuple[str, str, Choice]] = [("dense", config, Dense()) for config in ("nhwc", "nchw")]
    found += [("ell", c.text, block) for c in all_configs(dtype) if c.kind == "forward"]
    found += [("spmm", c.text, Fine(keep=0.2)) for c in forward_configs(dtype)]
    if not dry:
        found.append(("dense", "fused", Dense()))
        if layer.window == (1, 1):
            found.append(("semi", "", NM(2, 4)))
    return found


def _error(layer: LayerSpec, choice: Choice, kernel: str, config: str, place: object) -> float:
    """Return the largest error of one layer's output over the output's scale."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.weight_shape, generator=generator) / math.sqrt(layer.weights / layer.filters)
    weight = weight if isinstance(choice, Dense) else weight * make_mask(weight, choice)
    x = torch.randn(2, layer.channels, *layer.input_hw, generator=generator)
    bias, residual = torch.linspace(-1, 1, layer.filters), torch.randn(
        2, layer.filters, *layer.output_hw, generator=generator
    )
    device, dtype = place.device, place.dtype  # type: ignore[attr-defined]
    rounded = [tensor.to(dtype).double() for tensor in (x, weight, bias, residual)]
    want = nn.functional.conv2d(rounded[0], rounded[1], rounded[2], layer.stride, layer.padding) + rounded[3]
    want = want.relu()
    module = build_layer(kernel, config, Source(layer, choice, weight, bias), place)  # type: ignore[arg-type]
    maps = [t.to(device, dtype).contiguous(memory_format=torch.channels_last) for t in (x, residual)]
    with kernel_settings():
        got = module(*maps).double().cpu()
    return float((got - want).abs().max() / want.abs().max())


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
    try:
        built = build_tables(jobs, request, lambda name: lambda done, total: None, lambda text: print(text, flush=True))
    finally:
        with zipfile.ZipFile(bench.out / "gpu-tables.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.glob("*.json")):
                file.write(path, path.name)
    seconds = time.monotonic() - started
    found = [row("tables", "all", "seconds", [seconds], baseline=0.0, unit="s", context=built[0].context)]
    for job, table in zip(jobs, built, strict=True):
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
    wanted = {_conv(width, width, size, 3): tuple(COMPRESSIONS.values()) for width, size in sizes}
    wanted = {replace(layer, name=f"conv{index}"): choices for index, (layer, choices) in enumerate(wanted.items())}
    table = build_table(wanted, context, pace=Pace(bench.left_s - 5.0), bench=bench.layers(context))
    table.save(bench.out / "gpu-layers.json")
    found = []
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
    case: str, compression: float, choice: Choice, measured: object, dense_us: float, context: Context
) -> list[BenchRow]:
    figures = {
        "latency": (measured.p50, dense_us, "us"),  # type: ignore[attr-defined]
        "roofline floor": (measured.floor_us, dense_us, "us"),  # type: ignore[attr-defined]
        "tile model": (measured.model_us, dense_us, "us"),  # type: ignore[attr-defined]
        "speed-up over best cuDNN": (dense_us / measured.p50, 1.0, "x"),  # type: ignore[attr-defined]
    }
    return [
        row(case, choice.text, metric, [value], baseline=baseline, compression=compression, unit=unit,
            batch=context.batch, context=context)
        for metric, (value, baseline, unit) in figures.items()
    ]


def cifar_networks(*, dry: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return ResNet-18 with the stem that 32×32 images ask for, and VGG-16; a small network for a dry run."""
    if dry:
        return {"ResNet-20": untrained("resnet20@1x12x12", "fashion-mnist")}
    resnet, example = untrained("torchvision:resnet18@3x32x32", "fashion-mnist")
    resnet.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    resnet.maxpool = nn.Identity()
    return {"ResNet-18 CIFAR": (resnet, example), "VGG-16 CIFAR": untrained("vgg16@3x32x32", "fashion-mnist")}


def _policy(layers_: Sequence[LayerSpec], choice: Choice) -> dict[str, Choice]:
    """Return the choice for every 3×3 layer but the first that can take it."""
    return {layer.name: choice for layer in layers_[1:] if choice.fits(layer)}


def networks(bench: Bench) -> None:
    """Time whole networks forward against their fastest dense execution."""
    context = bench.context(128)
    choices = list(COMPRESSIONS.items())[:2]
    for name, (model, image) in cifar_networks(dry=bench.dry).items():
        example = image.repeat(context.batch, 1, 1, 1)
        found = trace(model, image)
        if bench.dry:
            choices = [(4.5, Pattern(count=8, entries=4, kernels=0.5, share=(16, 8)))]
        wanted = {layer: tuple(c for _, c in choices if layer.name in _policy(found, c)) for layer in found}
        table = build_table(wanted, context, bench=bench.layers(context))
        plan = gpu_plan(model, example)
        runs = {f"dense:{key}": run for key, run in dense_forms(model, plan, table, example).items()}
        deployer = GpuDeployer(plan, example, table)
        runs |= {choice.text: deployer(_policy(found, choice)) for _, choice in choices}
        runs |= _compiled(model, example, context, dry=bench.dry or bench.left_s < 45.0)
        times = network_us(runs, bench.backend())
        _write_network(bench, f"{name} forward", times, dict(choices), context)


def _compiled(model: nn.Module, example: Tensor, context: Context, *, dry: bool) -> dict[str, Callable[[], object]]:
    if dry:
        return {}
    place = place_of(context)
    network = torch.compile(model.to(place.device, place.dtype).to(memory_format=torch.channels_last).eval())  # type: ignore[call-overload]
    x = example.to(place.device, place.dtype).contiguous(memory_format=torch.channels_last)
    return {"dense:torch-compile": lambda: network(x)}


def _write_network(
    bench: Bench, case: str, times: Mapping[str, float], choices: Mapping[float, Choice], context: Context
) -> None:
    dense_us = min(us for name, us in times.items() if name.startswith("dense:"))
    compressions = {choice.text: compression for compression, choice in choices.items()}
    bench.write([
        row(case, name, metric, [value], baseline=baseline, compression=compressions.get(name, 1.0), unit=unit,
            batch=context.batch, context=context)
        for name, us in times.items()
        for metric, value, baseline, unit in (
            ("latency", us, dense_us, "us"), ("speed-up over fastest dense", dense_us / us, 1.0, "x")
        )
    ])


def training(bench: Bench) -> None:
    """Time the training step of whole networks: forward and backward, BatchNorm in training mode."""
    context = bench.context(128, "training")
    choice: Choice = Pattern(count=8, entries=4, kernels=0.5, share=(16, 8) if bench.dry else (64, 8))
    for name, (model, image) in cifar_networks(dry=bench.dry).items():
        found = trace(model, image)
        policy = _policy(found, choice)
        wanted = {layer: (policy[layer.name],) if layer.name in policy else () for layer in found}
        table = build_table(wanted, context, bench=bench.layers(context))
        place = place_of(context)
        x = image.repeat(context.batch, 1, 1, 1).to(place.device, place.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        dense = model.to(place.device, place.dtype).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        # Timed before the layers are replaced in place.
        times = {"dense:torch-channels-last": _step_us(dense, x, bench.backend())}
        replaced = 0
        for layer in found:
            if layer.name in policy and (bench.dry or _wins(table, layer, choice)):
                source = dense.get_submodule(layer.name)
                dense.set_submodule(layer.name, _trained(source, table, layer, choice, place.dtype))
                replaced += 1
        times[choice.text] = _step_us(dense, x, bench.backend())
        print(f"{name}: {replaced} of {len(policy)} layers on sparse kernels", flush=True)
        _write_network(bench, f"{name} training step", times, {4.5: choice}, context)


def _wins(table: LatencyTable, layer: LayerSpec, choice: Choice) -> bool:
    return bool(table.measured(layer, [choice])) and table.layer_us(layer, choice) < table.layer_us(layer, Dense())


def _trained(
    source: nn.Module, table: LatencyTable, layer: LayerSpec, choice: Choice, dtype: torch.dtype
) -> ELLConv2d:
    """Return a convolution as its packed, trainable form, in the configuration of its row."""
    assert isinstance(source, nn.Conv2d)
    text = table.row(layer, choice).config if table.measured(layer, [choice]) else ""
    config = next((c for c in all_configs(dtype) if c.text == text), None)
    mask = make_mask(source.weight.detach(), choice)
    options = ELLOptions(master="packed")
    if config is not None:
        options = replace(options, tile=replace(options.tile, filters=config.bn, depth=config.bk),
                          launch=Launch(forward=config))
    elif dtype == torch.float32:
        options = replace(options, tile=replace(options.tile, filters=32, depth=32))
    return ELLConv2d.from_conv(source, mask, options)


def _step_us(model: nn.Module, x: Tensor, backend: Backend) -> float:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> object:
        return torch.autograd.grad(model(x).float().square().mean(), wanted)

    with kernel_settings(training=True):
        return time_subject(Subject(lambda index: step, 1), backend, launches=2, cold=False).warm.p50


PARTS: dict[str, Callable[[Bench], None]] = {
    "correctness": correctness, "tables": tables, "layers": layers, "networks": networks, "training": training
}
