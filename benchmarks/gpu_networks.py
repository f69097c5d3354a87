"""The parts ``networks`` and ``training`` of ``gpu.py``: whole networks, forward and their training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from common import row
from gpu_bench import COMPRESSIONS, Bench
from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense, Pattern
from autoprune.core.layers import LayerSpec
from autoprune.kernels.triton.configs import Launch, all_configs
from autoprune.kernels.triton.layers import ELLConv2d, ELLOptions
from autoprune.lut.build import Pace, build_table
from autoprune.lut.context import Context
from autoprune.lut.gpu_deploy import GpuDeployer, dense_forms, gpu_plan, network_us
from autoprune.lut.gpu_families import place_of
from autoprune.lut.gpu_rows import kernel_settings
from autoprune.lut.gpu_timer import Backend, Subject, time_subject
from autoprune.lut.table import LatencyTable
from autoprune.search_spaces.trace import trace
from autoprune.sparsity.masks import make_mask
from autoprune.tasks.networks import untrained

# Seconds that building torch.compile's form of a network may take; without them it is left out.
_COMPILE_S = 25.0


def cifar_networks(*, dry: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return ResNet-18 with the stem that 32×32 images ask for, and VGG-16; a small network for a dry run."""
    if dry:
        return {"ResNet-20": untrained("resnet20@1x12x12", "fashion-mnist")}
    resnet, example = untrained("torchvision:resnet18@3x32x32", "fashion-mnist")
    resnet.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    resnet.maxpool = nn.Identity()
    return {"ResNet-18 CIFAR": (resnet, example), "VGG-16 CIFAR": untrained("vgg16@3x32x32", "fashion-mnist")}


def policy_of(layers_: Sequence[LayerSpec], choice: Choice) -> dict[str, Choice]:
    """Return the choice for every 3×3 layer but the first that can take it."""
    return {layer.name: choice for layer in layers_[1:] if choice.fits(layer)}


def networks(bench: Bench) -> None:
    """Time whole networks forward against their fastest dense execution."""
    for name, (model, image) in cifar_networks(dry=bench.dry).items():
        with bench.guarded(f"networks: {name}"):
            _forward(bench, name, model, image)


def _forward(bench: Bench, name: str, model: nn.Module, image: Tensor) -> None:
    context = bench.context(128)
    choices = list(COMPRESSIONS.items())[:2]
    if bench.dry:
        choices = [(4.5, Pattern(count=8, entries=4, kernels=0.5, share=(16, 8)))]
    example = image.repeat(context.batch, 1, 1, 1)
    found = trace(model, image)
    wanted = {layer: tuple(c for _, c in choices if layer.name in policy_of(found, c)) for layer in found}
    table = build_table(wanted, context, pace=Pace(0.5 * bench.left_s), bench=bench.layers(context))
    plan = gpu_plan(model, example)
    runs = {f"dense:{key}": run for key, run in dense_forms(model, plan, table, example).items()}
    deployer = GpuDeployer(plan, example, table)
    runs |= {choice.text: deployer(policy_of(found, choice)) for _, choice in choices}
    if not bench.dry and bench.left_s > _COMPILE_S:
        runs["dense:torch-compile"] = _compiled(model, example, context)
    times: dict[str, float] = {}
    for run_name, run in runs.items():
        with bench.guarded(f"networks: {name}, {run_name}"):
            times |= network_us({run_name: run}, bench.backend())
    _write_network(bench, f"{name} forward", times, {choice.text: value for value, choice in choices}, context)


def _compiled(model: nn.Module, example: Tensor, context: Context) -> Callable[[], object]:
    place = place_of(context)
    network = copy.deepcopy(model).to(place.device, place.dtype).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    x = example.to(place.device, place.dtype).contiguous(memory_format=torch.channels_last)
    run = torch.compile(network)
    return lambda: run(x)


def _write_network(
    bench: Bench, case: str, times: Mapping[str, float], compressions: Mapping[str, float], context: Context
) -> None:
    dense_us = min(us for name, us in times.items() if name.startswith("dense:"))
    bench.write([
        row(case, name, metric, [value], baseline=baseline, compression=compressions.get(name, 1.0), unit=unit,
            batch=context.batch, context=context)
        for name, us in times.items()
        for metric, value, baseline, unit in (
            ("latency", us, dense_us, "us"), ("speed-up over fastest dense", dense_us / us, 1.0, "x")
        )
    ])


def training(bench: Bench) -> None:
    """Time the training step of whole networks: forward and backward, BatchNorm in training mode.

    At 4.5× in two forms: shared by 64 × 64, whose input gradient is sparse too, and by 64 × 8.
    """
    shares = [(16, 8)] if bench.dry else [(64, 64), (64, 8)]
    choices: list[Choice] = [Pattern(count=8, entries=4, kernels=0.5, share=share) for share in shares]
    for name, (model, image) in cifar_networks(dry=bench.dry).items():
        with bench.guarded(f"training: {name}"):
            _step(bench, name, model, image, choices)


def _step(bench: Bench, name: str, model: nn.Module, image: Tensor, choices: Sequence[Choice]) -> None:
    context = bench.context(128, "training")
    found = trace(model, image)
    policies = {choice.text: policy_of(found, choice) for choice in choices}
    wanted = {
        layer: tuple(policy[layer.name] for policy in policies.values() if layer.name in policy) for layer in found
    }
    table = build_table(wanted, context, pace=Pace(0.7 * bench.left_s), bench=bench.layers(context))
    place = place_of(context)
    x = image.repeat(context.batch, 1, 1, 1).to(place.device, place.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    dense = model.to(place.device, place.dtype).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    times = {"dense:torch-channels-last": _step_us(dense, x, bench.backend())}
    for choice in choices:
        policy, network = policies[choice.text], copy.deepcopy(dense)
        won = [la for la in found if la.name in policy and (bench.dry or _wins(table, la, choice))]
        for layer in won:
            source = network.get_submodule(layer.name)
            network.set_submodule(layer.name, _trained(source, table, layer, choice, place.dtype))
        print(f"{name} {choice.text}: {len(won)} of {len(policy)} layers on sparse kernels", flush=True)
        with bench.guarded(f"training: {name} {choice.text}"):
            times[choice.text] = _step_us(network, x, bench.backend())
    _write_network(bench, f"{name} training step", times, {choice.text: 4.5 for choice in choices}, context)


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
