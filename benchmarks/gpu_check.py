"""The part ``correctness`` of ``gpu.py``: every kernel and configuration against float64 on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from common import row
from gpu_bench import Bench, conv
from torch import Tensor, nn

from autoprune.core.choices import NM, Choice, Dense, Fine, Pattern
from autoprune.core.layers import LayerSpec
from autoprune.kernels.formats.ell import Tile
from autoprune.kernels.gpu_layers import Place, Source, build_layer
from autoprune.kernels.triton.configs import Launch, all_configs
from autoprune.kernels.triton.layers import ELLConv2d, ELLOptions
from autoprune.kernels.triton.spmm_launch import forward_configs
from autoprune.kernels.triton.spmm_layers import SparseConv2d
from autoprune.lut.gpu_families import place_of
from autoprune.lut.gpu_rows import kernel_settings
from autoprune.sparsity.masks import make_mask

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def correctness(bench: Bench) -> None:
    """Compare every kernel and configuration with float64 on the CPU, on odd and usual shapes."""
    shapes = [(32, 40, 9, 3, 1), (64, 64, 14, 3, 1), (64, 128, 14, 3, 2), (128, 64, 7, 1, 1)]
    context = bench.context(2)
    dtypes = [torch.float32] if bench.dry else [torch.bfloat16, torch.float16]
    worst: dict[tuple[str, str], float] = {}
    for channels, filters, size, window, stride in shapes[:2] if bench.dry else shapes:
        layer = conv(channels, filters, size, window, stride)
        for dtype in dtypes:
            for kernel, config, choice in _cases(layer, dtype, dry=bench.dry):
                error = _error(layer, choice, kernel, config, replace(place_of(context), dtype=dtype))
                key = (kernel, f"{config} {dtype}".strip())
                worst[key] = max(worst.get(key, 0.0), error / TOLERANCE[dtype])
            for key, error in _gradient_errors(layer, replace(place_of(context), dtype=dtype)).items():
                worst[key] = max(worst.get(key, 0.0), error / TOLERANCE[dtype])
    bench.write([
        row("correctness", f"{kernel} {config}", "largest error over tolerance", [value], baseline=1.0,
            batch=context.batch, context=context)
        for (kernel, config), value in worst.items()
    ])
    wrong = {key: value for key, value in worst.items() if not value <= 1.0}
    if wrong:
        raise AssertionError(f"outputs differ from the reference (error over tolerance): {wrong}")


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


def _error(layer: LayerSpec, choice: Choice, kernel: str, config: str, place: Place) -> float:
    """Return the largest error of one layer's output over the output's scale."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.weight_shape, generator=generator) / math.sqrt(layer.weights / layer.filters)
    weight = weight if isinstance(choice, Dense) else weight * make_mask(weight, choice)
    x = torch.randn(2, layer.channels, *layer.input_hw, generator=generator)
    bias, residual = torch.linspace(-1, 1, layer.filters), torch.randn(
        2, layer.filters, *layer.output_hw, generator=generator
    )
    device, dtype = place.device, place.dtype
    rounded = [tensor.to(dtype).double() for tensor in (x, weight, bias, residual)]
    want = nn.functional.conv2d(rounded[0], rounded[1], rounded[2], layer.stride, layer.padding) + rounded[3]
    want = want.relu()
    module = build_layer(kernel, config, Source(layer, choice, weight, bias), place)
    maps = [t.to(device, dtype).contiguous(memory_format=torch.channels_last) for t in (x, residual)]
    with kernel_settings():
        got = module(*maps).double().cpu()
    return float((got - want).abs().max() / want.abs().max())


def _gradient_errors(layer: LayerSpec, place: Place) -> dict[tuple[str, str], float]:
    """Return the largest errors of both gradients over their scales, of each configuration of each trained kernel."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(layer.weight_shape, generator=generator) / math.sqrt(layer.weights / layer.filters)
    share = (min(64, layer.filters), min(64, layer.channels))
    choice: Choice = Pattern(count=8, kernels=0.5, share=share) if layer.window == (3, 3) else Fine(keep=0.5)
    source = nn.Conv2d(layer.channels, layer.filters, layer.window, layer.stride, layer.padding, bias=False)
    with torch.no_grad():
        source.weight.copy_((weight * make_mask(weight, choice)).to(place.dtype).float())
    x = torch.randn(2, layer.channels, *layer.input_hw, generator=generator).to(place.dtype)
    dy = torch.randn(2, layer.filters, *layer.output_hw, generator=generator).to(place.dtype)
    want = _gradients(source.double(), x.double(), dy.double())
    source = source.to(place.device, place.dtype)
    found: dict[tuple[str, str], float] = {}
    for config in all_configs(place.dtype):
        if config.kind == "dweight":
            depth = next(c.bk for c in all_configs(place.dtype) if c.kind == "forward" and c.bn == config.bn)
            options = ELLOptions(tile=Tile(config.bn, depth), master="dense", launch=Launch(dweight=config))
            module = ELLConv2d.from_conv(source, options=options).to(place.device)
            got = _gradients(module, x.to(place.device), dy.to(place.device))
            found["ell gradients", f"{config.text} {place.dtype}"] = _largest(got, want)
    sparse = SparseConv2d(source).to(place.device)
    got = _gradients(sparse, x.to(place.device), dy.to(place.device))
    want = (want[0], want[1].flatten()[sparse.index.gather_index.cpu()])
    found["spmm gradients", str(place.dtype)] = _largest(got, want)
    return found


def _gradients(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weights, float64 on the CPU; of pruned weights 0."""
    x = x.detach().requires_grad_()
    weight = next(module.parameters())
    dx, dw = torch.autograd.grad(module(x), (x, weight), dy)
    return dx.double().cpu(), (dw * (weight != 0)).double().cpu()


def _largest(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))
