"""Measures rows of a CPU: a layer with bias and ReLU fused, dense too, on the kernels that deployment runs.

All choices of a shape are timed in turn, round after round, so that drift of the machine hits them alike. Each row runs
on several copies of the layer, so that inputs and weights are as warm as in a network, not warmer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from autoprune.core.choices import Choice
from autoprune.core.errors import AutopruneError, MeasurementError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.program import Buffer, Epilogue, Program
from autoprune.kernels.cpu.shapes import LANES
from autoprune.kernels.dense import torch_threads
from autoprune.kernels.deployed import tile_of
from autoprune.kernels.plan import kernel_for
from autoprune.lut.context import Context
from autoprune.lut.measure import Effort, sample_rounds
from autoprune.lut.row import Row
from autoprune.sparsity.masks import make_mask

_ROUNDS = 25
_SAMPLE_US = 100.0


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A layer with one choice, ready to be timed."""

    time_us: Callable[[], float]
    weight_bytes: int
    kernel: str
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """Context of the rows, and how many images pass a layer together in the network."""

    context: Context
    images: int


def images_at_once(layers: Iterable[LayerSpec], batch: int, threads: int = 1) -> int:
    """Return about how many images of a batch pass a layer together in the deployed network.

    A network runs a batch in parts, so that its maps stay in cache; a layer never sees the whole batch, and its row
    must not either. A residual network's plan holds about four float32 maps of every size, with a border of one.
    """
    sizes = {(layer.filters, *layer.output_hw) for layer in layers if layer.op == "conv"}
    image_bytes = 4 * 4 * sum(channels * (height + 2) * (width + 2) for channels, height, width in sizes)
    return tile_of(batch, image_bytes, threads)


def measure_layer(layer: LayerSpec, choices: Sequence[Choice], setting: Setting) -> dict[tuple[str, str], Row]:
    """Return the rows of one layer's choices.

    Raises:
        MeasurementError: The layer cannot be run on this machine.
    """
    threads = setting.context.threads
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.weight_shape, generator=generator) / math.sqrt(layer.weights / layer.filters)
    with torch_threads(threads), torch.no_grad():
        try:
            candidates = {choice.text: _candidate(layer, choice, weight, setting) for choice in choices}
        except (AutopruneError, ValueError, RuntimeError) as error:
            raise MeasurementError(f"layer '{layer.name}' ({layer.signature}) cannot be measured: {error}") from error
        for candidate in candidates.values():
            candidate.time_us()
        samples, _ = sample_rounds(
            {text: candidate.time_us for text, candidate in candidates.items()},
            Effort(_ROUNDS, threads=threads),
        )
    rows = {}
    for text, candidate in candidates.items():
        p10, p50, p90 = (float(value) for value in np.percentile(samples[text], [10, 50, 90]))
        rows[layer.signature, text] = Row(
            p10=p10,
            p50=p50,
            p90=p90,
            weight_bytes=candidate.weight_bytes,
            kernel=candidate.kernel,
            workspace_bytes=candidate.workspace_bytes,
        )
    return rows


def _candidate(layer: LayerSpec, choice: Choice, weight: Tensor, setting: Setting) -> _Candidate:
    masked = weight * make_mask(weight, choice)
    kernel, block = kernel_for(choice)
    spec = _as_conv(layer)
    program = Program(setting.images, setting.context.threads)
    pairs = _maps(program, spec)
    for x, out in pairs:
        kcrs, bias = masked.reshape(spec.weight_shape), torch.linspace(0.0, 1.0, layer.filters)
        program.conv(x, out, spec, kcrs, bias, kernel, Epilogue(relu=True), block)
    program.finish()
    once_us = float(np.median(program.time_us(5)))
    runs = max(2, math.ceil(_SAMPLE_US / max(once_us, 0.1)))
    scale = setting.context.batch / setting.images / len(pairs)

    def time_us() -> float:
        return float(np.median(program.time_us(runs))) * scale

    return _Candidate(
        time_us=time_us,
        weight_bytes=program.weight_bytes // len(pairs),
        kernel=kernel,
        workspace_bytes=program.workspace_bytes - program.memory.size_bytes,
    )


def _maps(program: Program, spec: LayerSpec) -> list[tuple[Buffer, Buffer]]:
    """Return input and output of each copy of a layer, about as many maps as a residual network keeps going.

    Reading and writing the user's tensors is no part of a layer. Only an image, of few channels, is named the
    program's input, because it is laid out as such.
    """
    halo = max(spec.padding)
    inner, outer = (spec.channels, *spec.input_hw), (spec.filters, *spec.output_hw)
    if spec.channels < LANES:
        image = program.buffer(*inner, halo=halo)
        program.set_input(image)
        return [(image, program.buffer(*outer))]
    if inner == outer:  # as in a network: each copy reads what the one before has just written
        ring = [program.buffer(*inner, halo=halo) for _ in range(3)]
        return [(ring[0], ring[1]), (ring[1], ring[2]), (ring[2], ring[0])]
    out = program.buffer(*outer)
    return [(program.buffer(*inner, halo=halo), out) for _ in range(2)]


def _as_conv(layer: LayerSpec) -> LayerSpec:
    if layer.op == "conv":
        return layer
    # Tokens are pixels side by side, as deployment lays them out.
    tokens = (1, layer.input_hw[0] * layer.input_hw[1])
    return replace(layer, op="conv", weight_shape=(*layer.weight_shape, 1, 1), input_hw=tokens, output_hw=tokens)
