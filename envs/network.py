"""A network whose layers' weights are exchanged thousands of times: BatchNorm recalibrated, folded, run in bfloat16.

Recalibration is what makes an untrained pruned network's score mean anything: without it the correlation with the
accuracy after fine-tuning is noise. The folded copy runs without BatchNorm, in the CPU's fastest native precision.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.envs.overwriting import overwriting
from autoprune.kernels.plan_norms import is_plain_norm
from autoprune.tasks.outputs import main_output
from autoprune.tasks.precision import native_dtype

BATCH = 125


class StitchedNetwork:
    """Two copies of one network: with BatchNorm (for recalibration) and folded (for evaluation).

    Args:
        model: Dense network; left as it is.
        calibration: Normalised images ``(N, C, H, W)`` float32 for BatchNorm statistics.

    Both copies live on the model's device; logits come back to the CPU. ``fast`` runs the folded copy's layers with
    activations in place.
    """

    def __init__(self, model: nn.Module, calibration: Tensor) -> None:
        self.device = next(model.parameters()).device
        self._calibration = calibration.to(self.device)
        self._native = native_dtype(self.device.type)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._norms = norm_of_each_conv(self.model, self._calibration[:1])
        if not self._foldable():
            self._norms = {}
        self.folded = copy.deepcopy(self.model)
        for conv, norm in self._norms.items():
            module = layer_of(self.folded, conv)
            if module.bias is None:
                zeros = torch.zeros(len(module.weight), device=self.device)
                module.bias = nn.Parameter(zeros, requires_grad=False)
            parent, _, child = norm.rpartition(".")
            setattr(self.folded.get_submodule(parent), child, nn.Identity())
        self.folded.to(self._native)
        self.fast = self._checked(overwriting(self.folded))
        self._recalibrator = Recalibrator(self.model, traced=True)
        self._dense = {name: module.weight.clone() for name, module in _weighted(self.model)}
        self._dense_norms = {
            name: tuple(tensor.clone() for tensor in _statistics(self.model, name)) for name in self._norms.values()
        }

    def _foldable(self) -> bool:
        """Return whether the network with its BatchNorms folded is the same: a second reader of an output shows."""
        trial = copy.deepcopy(self.model)
        for conv, name in self._norms.items():
            norm, layer = trial.get_submodule(name), layer_of(trial, conv)
            assert isinstance(norm, nn.BatchNorm2d)
            bias = torch.zeros(len(layer.weight), device=self.device) if layer.bias is None else layer.bias
            weight, shift = folded(layer.weight, bias, norm, _running(norm))
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.bias = nn.Parameter(shift, requires_grad=False)
            trial.set_submodule(name, nn.Identity())
        with torch.no_grad():
            want = main_output(self.model(self._calibration[:1]))
            got = main_output(trial(self._calibration[:1]))
        return float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())

    def _checked(self, fast: nn.Module) -> nn.Module:
        """Return ``fast`` if it gives what the folded copy gives, which a trace of a forward with branches may not."""
        image = self.to_native(self._calibration[:1])
        with torch.inference_mode():
            same = torch.equal(main_output(fast(image)), main_output(self.folded(image)))
        return fast if same else self.folded

    def dense_weight(self, layer: str) -> Tensor:
        """Return the dense weight of a layer."""
        return self._dense[layer]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put these weights in, dense ones and dense statistics everywhere else; not yet recalibrated."""
        for name, dense in self._dense.items():
            layer_of(self.model, name).weight.copy_(weights.get(name, dense))
        for name, statistics in self._dense_norms.items():
            for tensor, value in zip(_statistics(self.model, name), statistics, strict=True):
                tensor.copy_(value)

    def recalibrate(self) -> None:
        """Set BatchNorm statistics to those of the calibration images under the present weights."""
        self._recalibrator.run(self._calibration, self._native)

    def fold(self, only: str | None = None) -> None:
        """Bring the folded copy up to date, or one layer of it."""
        for name in self._dense if only is None else [only]:
            weight, bias = self._folded_parameters(name)
            target = layer_of(self.folded, name)
            target.weight.copy_(weight)
            if target.bias is not None:
                target.bias.copy_(bias)

    def _folded_parameters(self, name: str) -> tuple[Tensor, Tensor]:
        source = layer_of(self.model, name)
        bias = torch.zeros(len(source.weight), device=self.device) if source.bias is None else source.bias
        if name not in self._norms:
            return source.weight, bias
        norm = self.model.get_submodule(self._norms[name])
        assert isinstance(norm, nn.BatchNorm2d)
        return folded(source.weight, bias, norm, _running(norm))

    def changed(self, name: str, weight: Tensor, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return what the folded copy would hold for one layer under another weight, in its precision.

        Args:
            name: Of the layer; neither copy is touched.
            weight: Float32, in the layer's shape.
            statistics: Mean and variance (K,) of the BatchNorm behind it, None without one.
        """
        own = layer_of(self.model, name).bias
        bias = torch.zeros(len(weight), device=weight.device) if own is None else own
        if statistics is not None:
            norm = self.model.get_submodule(self._norms[name])
            assert isinstance(norm, nn.BatchNorm2d)
            weight, bias = folded(weight, bias, norm, statistics)
        return weight.to(self._native, memory_format=_format_of(weight)), bias.to(self._native)

    def set_norm(self, layer: str, mean: Tensor, variance: Tensor) -> None:
        """Set the statistics of the BatchNorm behind one convolution (K values each), if it has one."""
        if layer in self._norms:
            for tensor, value in zip(_statistics(self.model, self._norms[layer]), (mean, variance), strict=True):
                tensor.copy_(value)

    def norm_statistics(self, layer: str) -> tuple[Tensor, ...] | None:
        """Return the dense network's BatchNorm mean and variance (K,) behind a convolution, if there is one."""
        return self._dense_norms.get(self._norms.get(layer, ""))

    def logits(self, images: Tensor) -> Tensor:
        """Return float32 logits ``(N, classes)`` of the folded network."""

        def run(part: Tensor) -> Tensor:
            with torch.inference_mode():
                return main_output(self.fast(part)).float().cpu()

        with side_by_side() as pool:
            return torch.cat(list(pool.map(run, torch.split(self.to_native(images), BATCH))))

    def to_native(self, images: Tensor) -> Tensor:
        """Return the images as the folded network wants them."""
        return images.to(self.device, self._native, memory_format=torch.channels_last)


def folded(
    weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, statistics: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the convolution's weight and bias with an eval-mode BatchNorm of this mean and variance folded in."""
    mean, variance = statistics
    scale = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    new_weight = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return new_weight.to(weight.dtype), (bias.double() * scale + shift).to(weight.dtype)


class Recalibrator:
    """Sets BatchNorm statistics of one network, whose weights may be exchanged meanwhile.

    Args:
        model: In eval mode.
        traced: Run a trace that overwrites its maps, which is faster. torch.fx patches every module's call while it
            traces: no other thread may run a network meanwhile.
    """

    def __init__(self, model: nn.Module, *, traced: bool) -> None:
        self._norms = _norms(model)
        twin = overwriting(model) if traced else model
        if twin is model:  # another tree of the same tensors
            twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        own = {id(_running(norm)[0]): norm for norm in self._norms}
        self._seen: dict[nn.Module, _BatchStatistics] = {}
        for name, module in list(twin.named_modules(remove_duplicate=False)):
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                norm = own[id(module.running_mean)]
                twin.set_submodule(name, self._seen.setdefault(norm, _BatchStatistics(norm)))
        self._twin = twin

    def run(self, images: Tensor, precision: torch.dtype = torch.float32, batch: int = BATCH) -> None:
        """Set every BatchNorm's statistics to the mean over batches of ``images``; all else stays as it is."""
        half = precision == torch.bfloat16

        def measure(part: Tensor) -> list[tuple[Tensor, Tensor]]:
            with torch.inference_mode(), torch.autocast(part.device.type, torch.bfloat16, enabled=half):
                self._twin(part)
            return [self._seen[norm].take() if norm in self._seen else _running(norm) for norm in self._norms]

        with side_by_side() as pool:
            measured = list(pool.map(measure, torch.split(images, batch)))
        for norm, batches in zip(self._norms, zip(*measured, strict=True), strict=True):
            for target, values in zip(_running(norm), zip(*batches, strict=True), strict=True):
                target.copy_(torch.stack(values).mean(0))


class _BatchStatistics(nn.Module):
    """A BatchNorm that normalises by its batch, and keeps that batch's statistics for the thread that ran it."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self._norm = norm
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        norm = self._norm
        mean, variance = (torch.zeros_like(tensor) for tensor in _running(norm))
        self._found[threading.get_ident()] = (mean, variance)
        # Momentum 1: the statistics of this batch alone.
        return nn.functional.batch_norm(x, mean, variance, norm.weight, norm.bias, True, 1.0, norm.eps)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of this thread's last batch; the running ones if it did not pass by."""
        return self._found.pop(threading.get_ident(), _running(self._norm))


def recalibrate(model: nn.Module, images: Tensor, precision: torch.dtype = torch.float32, batch: int = BATCH) -> None:
    """Set every BatchNorm's statistics to the mean over batches of ``images``; all else stays as it is."""
    modes = {module: module.training for module in model.modules()}
    Recalibrator(model.eval(), traced=False).run(images, precision, batch)
    for module, training in modes.items():
        module.training = training


@contextmanager
def side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Give a pool of as many workers as PyTorch has threads, each running its kernels on one core.

    Small tensors are not worth splitting: batches or layers side by side take less, above all on a busy machine, where
    split kernels wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        # After an interrupt nobody waits for jobs that have not begun.
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def _running(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def norm_of_each_conv(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Return conv name → name of the BatchNorm that alone takes its output; found by running ``example``.

    Raises:
        ModelError: The model does not run on the example.
    """
    producers: dict[int, str] = {}
    pairs: dict[str, str] = {}
    calls: dict[str, int] = {}
    alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def after(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        alive.append(output)
        if isinstance(module, nn.Conv2d):
            producers[id(output)] = name
        elif is_plain_norm(module) and id(inputs[0]) in producers:
            pairs[producers[id(inputs[0])]] = name

    handles = [
        module.register_forward_hook(lambda m, i, o, n=name: after(n, m, i, o))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:
        raise ModelError(f"the model does not run on an input of shape {tuple(example.shape)}: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    return {conv: norm for conv, norm in pairs.items() if calls[conv] == 1 and calls[norm] == 1}


def layer_of(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """Return the convolution or linear layer of that name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Conv2d | nn.Linear)
    return module


def _statistics(model: nn.Module, norm: str) -> tuple[Tensor, Tensor]:
    module = model.get_submodule(norm)
    assert isinstance(module, nn.BatchNorm2d)
    return _running(module)


def _format_of(weight: Tensor) -> torch.memory_format:
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format


def _weighted(model: nn.Module) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    """Return the layers with a weight of their own; one that shares another's goes with it."""
    found: dict[int, tuple[str, nn.Conv2d | nn.Linear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(module._parameters.get("weight"), nn.Parameter):
            found.setdefault(id(module.weight), (name, module))
    return list(found.values())
