"""Dense against deployed on a GPU, end to end: every network replayed as a CUDA graph, one after another."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice
from autoprune.core.policy import Policy
from autoprune.kernels.convert import check_gpu, deploy_on
from autoprune.kernels.fold import fold_batchnorm
from autoprune.kernels.gpu import GpuModel
from autoprune.kernels.gpu_layers import Place
from autoprune.lut.bench import BenchResult
from autoprune.lut.context import Context, current_context
from autoprune.lut.deploy import masked_copy
from autoprune.lut.gpu_families import place_of
from autoprune.lut.gpu_rows import kernel_settings
from autoprune.lut.gpu_timer import Backend, CudaBackend, samples_us
from autoprune.lut.measure import Spread
from autoprune.lut.table import LatencyTable

_LAUNCHES, _REPLAYS = 4, 15
_LAYOUTS = {"torch-channels-last": torch.channels_last, "torch-folded": torch.contiguous_format}


def bench_on_gpu(
    model: nn.Module,
    policy: Policy | Mapping[str, Choice],
    example_batch: Tensor,
    table: LatencyTable | None = None,
) -> BenchResult:
    """Time the deployed network on the present GPU against every dense execution there.

    Args:
        model: float32, on the CPU; trained under the policy, or dense: then it is masked by magnitude.
        policy: Layer → choice.
        example_batch: (N, C, H, W) float32; its batch size is what is timed.
        table: Rows of this GPU at this batch size: layers that they say are faster dense run dense.
    Raises:
        DeviceError: There is no GPU here.
        PolicyError: The policy does not fit the model.
        TableMismatch: The table is of another context.
    """
    check_gpu("cuda")
    context = current_context(int(example_batch.shape[0]), device="cuda")
    if table is not None:
        table.check(context)
    choices = dict(policy.choices) if isinstance(policy, Policy) else dict(policy)
    deployed = deploy(masked_copy(model, choices), choices, example_batch, context, table)
    return bench_graphs(model, deployed, example_batch, context, table=table)


def deploy(
    model: nn.Module, choices: Mapping[str, Choice], example: Tensor, context: Context, table: LatencyTable | None
) -> GpuModel:
    """Return a model already masked as it is deployed in a context."""
    place = place_of(context)
    return deploy_on(place.device, model, choices, example, table, place.dtype)


def bench_graphs(
    model: nn.Module,
    deployed: GpuModel,
    example: Tensor,
    context: Context,
    backend: Backend | None = None,
    table: LatencyTable | None = None,
) -> BenchResult:
    """Time a network that was deployed before against every dense execution of ``model``.

    Args:
        model: The dense model, float32, on the CPU.
        deployed: In the context's place.
        example: (N, C, H, W) float32.
        context: Where both run.
        backend: Times them; the present GPU's graphs when None.
        table: Rows that the dense plan takes its configurations from.
    """
    place, backend = place_of(context), backend or CudaBackend()
    forms: dict[str, Callable[[], Callable[[], object]]] = {
        "plan": lambda: _call(deploy(model, {}, example, context, table), example, place),
        **{name: functools.partial(_folded, model, example, place, layout) for name, layout in _LAYOUTS.items()},
    }
    references, absent, seconds = {}, {}, {}
    for name, make in forms.items():
        start = time.perf_counter()
        try:
            references[name] = _spread(make(), backend)
            seconds[name] = time.perf_counter() - start
        except Exception as error:  # somebody else's kernels; a form that fails is reported as absent
            absent[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
    taken = _REPLAYS * (len(references) + 1)
    return BenchResult(
        deployed=_spread(_call(deployed, example, place), backend),
        references=references,
        absent=absent,
        build_seconds=seconds,
        taken=taken,
        dropped=0,
        batch=context.batch,
        threads=context.threads,
        decisions=deployed.decisions,
        context=context,
    )


def _call(network: nn.Module, example: Tensor, place: Place) -> Callable[[], object]:
    x = example.to(place.device, place.dtype)
    return lambda: network(x)


def _folded(model: nn.Module, example: Tensor, place: Place, layout: torch.memory_format) -> Callable[[], object]:
    network = fold_batchnorm(model).to(device=place.device, dtype=place.dtype).to(memory_format=layout)
    return _call(network, example.contiguous(memory_format=layout) if example.dim() == 4 else example, place)


def _spread(run: Callable[[], object], backend: Backend) -> Spread:
    with kernel_settings():
        return Spread.of(samples_us(run, backend, _LAUNCHES, _REPLAYS))
