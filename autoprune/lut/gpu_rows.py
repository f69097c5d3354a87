"""Measures rows of a GPU: per layer and choice the candidates of every kernel family, the fastest of them in full.

A choice whose floor cannot beat the layer's dense row is not measured at all. Of a choice's configurations the best
five by the tile model are timed quickly, and the winner is timed warm and cold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.errors import AutopruneError, MeasurementError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.gpu_layers import LayerModule, Source, build_layer
from autoprune.kernels.triton.ops import ell_pad
from autoprune.lut.context import Context
from autoprune.lut.gpu_facts import sm_clock_mhz
from autoprune.lut.gpu_families import Family, Variant, dense_tiles, families, place_of
from autoprune.lut.gpu_timer import Backend, CudaBackend, Subject, time_subject
from autoprune.lut.row import Row, Unmeasured
from autoprune.lut.tile_model import ITEM_BYTES, DeviceModel, floor_us, is_tiled, least_us, predicted_us
from autoprune.sparsity.masks import make_mask

TRIED = 5
_RANKING_LAUNCHES, _RANKING_REPLAYS = 10, 3
_RING_TRIED = 2
# A configuration that the model puts this far behind the best one is not timed.
_HOPELESS = 2.0

Key = tuple[str, str]


def device_of(context: Context) -> torch.device:
    """Return where the rows of a context are measured."""
    return place_of(context).device


def no_clock() -> float | None:
    """Return no clock: of a device that has none to read."""
    return None


@dataclass(slots=True)
class GpuBench:
    """Measures layers on one device.

    Attributes:
        context: Batch, dtype and direction of the rows.
        device: Constants for floors and predictions.
        backend: Times the launches.
        known: Kernel families by name.
        precompile: Called before the first row, to compile all kernels side by side.
        clock: Reads the multiprocessors' clock.
    """

    context: Context
    device: DeviceModel
    backend: Backend
    known: Mapping[str, Family] = field(default_factory=families)
    precompile: Callable[[], None] | None = None
    clock: Callable[[], float | None] = no_clock

    def estimate_us(self, layer: LayerSpec) -> float:
        """Return what the tile model says of the dense layer."""
        return predicted_us(self.device, layer, Dense(), self.context.batch, self.context.dtype)

    def prepare(self, wanted: Sequence[tuple[LayerSpec, Sequence[Choice]]]) -> None:
        """Compile what the layers to come launch."""
        if self.precompile is not None and wanted:
            self.precompile()

    def measure(self, layer: LayerSpec, choices: Sequence[Choice], dense: Row | None) -> dict[Key, Row | Unmeasured]:
        """Return a row for each choice, or why it has none.

        Raises:
            MeasurementError: The dense layer does not run.
        """
        device = device_of(self.context)
        weight = torch.randn(layer.weight_shape, generator=torch.Generator(device).manual_seed(0), device=device)
        weight /= math.sqrt(layer.weights / layer.filters)
        found: dict[Key, Row | Unmeasured] = {}
        clock_mhz = self.clock()
        for choice in sorted(choices, key=lambda choice: not isinstance(choice, Dense)):
            outcome = self._outcome(layer, choice, weight, dense)
            if isinstance(outcome, Row):
                outcome = outcome.model_copy(update={"clock_mhz": clock_mhz})
                dense = outcome if isinstance(choice, Dense) else dense
            found[layer.signature, choice.text] = outcome
        return found

    def _outcome(self, layer: LayerSpec, choice: Choice, weight: Tensor, dense: Row | None) -> Row | Unmeasured:
        if not isinstance(choice, Dense):
            bound = self.bound_us(layer, choice)
            if dense is not None and bound >= dense.p50:
                return Unmeasured(reason="floor", bound_us=bound)
        variants = self.variants(layer, choice)
        if not variants and not isinstance(choice, Dense):
            return Unmeasured(reason="kernel", note="no kernel here runs it")
        masked = weight if isinstance(choice, Dense | Channels) else weight * make_mask(weight, choice)
        bias = torch.linspace(-0.5, 0.5, layer.filters, device=device_of(self.context))
        trained = self.context.direction == "training"
        # A sparse kernel's input comes with its padding: its producer writes it so. Gradients have no such producer.
        source = Source(layer, choice, masked, bias, prepadded=not trained, trained=trained)
        try:
            row = self._row(source, variants)
            return row if not isinstance(choice, Dense) else self._with_ring(row, source)
        except MeasurementError as error:
            if isinstance(choice, Dense):
                raise MeasurementError(
                    f"layer '{layer.name}' ({layer.signature}) cannot be measured: {error}"
                ) from error
            return Unmeasured(reason="kernel", note=str(error)[:200])

    def bound_us(self, layer: LayerSpec, choice: Choice) -> float:
        """Return what no kernel that serves the choice can beat, launch included."""
        context = self.context
        scale = 3.0 if context.direction == "training" else 1.0  # two gradients of as many operations
        tiled = is_tiled(choice) or any(v.family == "ell" for v in self.variants(layer, choice))
        return scale * least_us(self.device, layer, choice, context.batch, context.dtype, tiled=tiled)

    def variants(self, layer: LayerSpec, choice: Choice) -> list[Variant]:
        """Return what is worth timing: every dense form, and of sparse kernels the best few by the tile model."""
        offered = [
            variant
            for family in self.known.values()
            for variant in family.variants(layer, choice, self.context, self.device)
        ]
        if isinstance(choice, Dense):
            return offered
        offered.sort(key=lambda variant: variant.model_us)
        return [v for v in offered if v.model_us <= _HOPELESS * offered[0].model_us][:TRIED]

    def _row(self, source: Source, variants: Sequence[Variant]) -> Row:
        layer, context = source.layer, self.context
        with kernel_settings(training=context.direction == "training"):
            best, module = self._fastest(source, variants)
            timing = time_subject(self._subject(module, source), self.backend)
        column = timing.in_network(self._map_bytes(layer), self.backend.cache_bytes)
        return Row(
            p10=column.p10,
            p50=column.p50,
            p90=column.p90,
            weight_bytes=module.weight_bytes,
            kernel=best.family,
            config=best.config,
            workspace_bytes=module.workspace_bytes,
            warm=timing.warm,
            cold=timing.cold,
            floor_us=floor_us(self.device, layer, source.choice, context.batch, context.dtype),
            model_us=best.model_us,
            captured=timing.captured,
        )

    def _with_ring(self, row: Row, source: Source) -> Row:
        """Add what the dense layer takes on the kernel that can write a border for a sparse reader behind it."""
        layer, context = source.layer, self.context
        ell = self.known.get("ell")
        if ell is None or layer.op != "conv" or layer.groups != 1 or source.trained:
            return row
        ringed = replace(source, ring=(1, 1))
        variants = dense_tiles(layer, context, self.device)
        try:
            with kernel_settings():
                best, module = self._fastest(ringed, variants[:_RING_TRIED])
                us = time_subject(
                    self._subject(module, ringed), self.backend, launches=_RANKING_LAUNCHES, cold=False
                ).warm.p50
        except MeasurementError:
            return row
        written = 2.0 * context.batch * layer.filters * math.prod(layer.output_hw) * ITEM_BYTES[context.dtype]
        pad_us = self.device.launch_us + written / self.device.bandwidth * 1e6
        return row.model_copy(update={"ring_us": us, "ring_config": best.config, "pad_us": pad_us})

    def _fastest(self, source: Source, variants: Sequence[Variant]) -> tuple[Variant, LayerModule]:
        """Return the variant with the least warm time, built; those that do not run are left out."""
        best: tuple[float, Variant, LayerModule] | None = None
        failed: list[str] = []
        for variant in variants:
            try:
                module = build_layer(variant.family, variant.config, source, place_of(self.context))
                if len(variants) == 1:
                    return variant, module
                subject = self._subject(module, source)
                us = time_subject(
                    subject, self.backend, launches=_RANKING_LAUNCHES, replays=_RANKING_REPLAYS, cold=False
                ).warm.p50
            except (AutopruneError, RuntimeError, ValueError, TypeError) as error:
                failed.append(f"{variant.family} {variant.config}: {next(iter(str(error).splitlines()), '')[:120]}")
                continue
            if best is None or us < best[0]:
                best = (us, variant, module)
        if best is None:
            raise MeasurementError("; ".join(failed) or "no kernel offers itself")
        return best[1], best[2]

    def _subject(self, module: LayerModule, source: Source) -> Subject:
        layer, context = source.layer, self.context

        def make(index: int) -> Callable[[], object]:
            own = module if index == 0 else own_copy(module)
            x = random_maps(layer, context, seed=index)
            x = x if own.halo == (0, 0) else ell_pad(x, list(own.halo))
            return training_call(own, x) if context.direction == "training" else lambda: own(x)

        return Subject(make, self._map_bytes(layer) + module.weight_bytes)

    def _map_bytes(self, layer: LayerSpec) -> int:
        maps = layer.channels * math.prod(layer.input_hw) + layer.filters * math.prod(layer.output_hw)
        return self.context.batch * maps * ITEM_BYTES[self.context.dtype]


@contextmanager
def kernel_settings(*, training: bool = False) -> Iterator[None]:
    """Let cuDNN choose among its algorithms by trying them; without gradients unless for training."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), nullcontext() if training else torch.no_grad():
        yield


def own_copy(module: LayerModule) -> LayerModule:
    """Return a copy with weights of its own; the module itself where its weights are of a kind that is not copied."""
    try:
        return copy.deepcopy(module)
    except (RuntimeError, NotImplementedError, TypeError):
        return module


def random_maps(layer: LayerSpec, context: Context, seed: int = 0) -> Tensor:
    """Return random input maps of a layer: (N, C, H, W) in channels-last memory, or (N, tokens, I) of a linear one."""
    place = place_of(context)
    generator = torch.Generator(place.device).manual_seed(seed)
    shape: tuple[int, ...] = (context.batch, layer.channels, *layer.input_hw)
    if layer.op == "linear":
        tokens = math.prod(layer.input_hw)
        shape = (context.batch, *((tokens,) if tokens > 1 else ()), layer.channels)
    x = torch.randn(shape, generator=generator, device=place.device).to(place.dtype)
    return x.contiguous(memory_format=torch.channels_last) if layer.op == "conv" else x


def training_call(module: LayerModule, x: Tensor) -> Callable[[], object]:
    """Return a call that runs a layer forward and computes the gradients of its input and its weights."""
    x = x.requires_grad_(True)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    with torch.no_grad():
        gradient = torch.randn_like(module(x))

    def call() -> object:
        return torch.autograd.grad(module(x), wanted, gradient)

    return call


def cuda_bench(context: Context) -> GpuBench:
    """Return the bench of the present CUDA device."""
    from autoprune.lut.device_probe import device_model
    from autoprune.lut.gpu_compile import precompile

    return GpuBench(context, device_model(), CudaBackend(), families(), precompile, sm_clock_mhz)
