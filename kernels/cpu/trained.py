"""One convolution in training: forward, input gradient and weight gradient on the kernels, for masks that stay.

A pass is assembled once from the mask. Its weights are numbered meanwhile, so that what the assembled arrays hold says
which weight goes where; a step's weights then come in by one gather, and gradients leave by the same numbers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.assemble import assemble
from autoprune.kernels.cpu.assemble_common import Row, Work
from autoprune.kernels.cpu.bands import ALONE
from autoprune.kernels.cpu.engine import ENTER, PASS
from autoprune.kernels.cpu.memory import Buffer, Memory
from autoprune.kernels.cpu.operations import Conv, Epilogue
from autoprune.kernels.cpu.passes import MAP_FIELDS, PASS_FIELDS, Pass
from autoprune.kernels.cpu.rows import ROW_FIELDS, Field, Op
from autoprune.kernels.cpu.shapes import LANES
from autoprune.kernels.cpu.weight_gradient import BlockGradient, MapPlace, SingleGradient, address_of
from autoprune.kernels.formats import aligned
from autoprune.kernels.formats.packed import transposed_weight

PassKernel = Literal["block", "csr"]
Gradient = BlockGradient | SingleGradient
MOST_WEIGHTS = 2**24  # a float32 counts no further one by one
_SLACK = 4096 + 64


class _Packing:
    """Where a step's weights go in the arrays that an assembled pass reads."""

    def __init__(self, slots: list[npt.NDArray[np.float32]]) -> None:
        self.slots = slots
        self.index = [slot.astype(np.int64) for slot in slots]

    def fill(self, flat: npt.NDArray[np.float32]) -> None:
        """Write weights; ``flat`` begins with a 0 for what is padding."""
        for slot, index in zip(self.slots, self.index, strict=True):
            slot[...] = flat[index]


class Convolve:
    """Maps in, one convolution, a map out; on the workspace of one worker.

    Args:
        layer: Of the convolution that is run, the transposed one for an input gradient.
        numbered: (K, C, R, S) float32, 0 where the mask drops, else the weight's number from 1 on.
        kernel: Which one.
    """

    def __init__(self, layer: LayerSpec, numbered: npt.NDArray[np.float32], kernel: PassKernel) -> None:
        halo = max(layer.padding)
        x = Buffer(0, 1, layer.channels, *layer.input_hw, halo)
        out = Buffer(1, 1, layer.filters, *layer.output_hw, 0)
        self.memory = Memory([x, out], set())
        self.x, self.out = MapPlace(self.memory, x), MapPlace(self.memory, out)
        zeros = np.zeros(layer.filters, np.float32)
        work, block = Work(), LANES
        rows, _ = assemble(Conv(x, out, layer, numbered, zeros, kernel, Epilogue(), block), self.memory, work, ALONE)
        _place_work(rows, work, self.memory)
        self.rows = table_of(rows, self.memory)
        self.n_rows = len(rows)
        self.packing = _Packing([self._slot(row) for row in rows if row[Field.OP] in (Op.BLOCK, Op.CSR)])

    def _slot(self, row: Row) -> npt.NDArray[np.float32]:
        if row[Field.OP] == Op.BLOCK:
            return self.memory.kept(row[Field.WEIGHTS])  # type: ignore[return-value]
        pairs = self.memory.kept(row[Field.ENTRIES])  # (pairs, {offsets, weights}, 2) int32
        return pairs[:, 1].view(np.float32)


@dataclass(slots=True)
class _Worker:
    """What one thread works with; parts that were not asked for are None."""

    forward: Convolve | None
    back: Convolve | None
    x: MapPlace | None
    dy: MapPlace | None
    gradient: Gradient | None


@dataclass(frozen=True, slots=True)
class Kernels:
    """Which kernel runs each direction; None leaves it to somebody else."""

    forward: PassKernel | None = None
    input_gradient: PassKernel | None = None
    weight_gradient: PassKernel | None = None


class TrainedConv:
    """A convolution under a final mask on the kernels, in the directions that are asked for.

    Maps are float32 or bfloat16, channels-last; sums are float32. One call at a time; further callers wait.

    Args:
        layer: As traced; its ``input_hw`` is the only input size that it takes.
        mask: (K, C, R, S) boolean.
        kernels: Per direction; any of them runs any mask.
        threads: That share the images of a batch.
    Raises:
        ModelError: No kernel can run this layer; see ``refusal``.
    """

    def __init__(self, layer: LayerSpec, mask: Tensor, kernels: Kernels, threads: int = 1) -> None:
        reason = refusal(layer, kernels)
        if reason is not None:
            raise ModelError(f"layer '{layer.name}' cannot be trained on the kernels: {reason}.")
        self.layer, self.kernels = layer, kernels
        numbers = np.arange(1, layer.weights + 1, dtype=np.float32).reshape(layer.weight_shape)
        kept = np.where(mask.detach().cpu().contiguous().numpy(), numbers, np.float32(0))
        self._workers = [self._worker(kept) for _ in range(threads)]
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> TrainedConv:
        """A copy of the model under the same mask may use the same arrays: every call fills them anew."""
        return self

    def _worker(self, numbered: npt.NDArray[np.float32]) -> _Worker:
        kernels, layer = self.kernels, self.layer
        forward = back = x = dy = gradient = None
        if kernels.forward is not None:
            forward = Convolve(layer, numbered, kernels.forward)
        if kernels.input_gradient is not None:
            turned: npt.NDArray[np.float32] = transposed_weight(numbered)  # type: ignore[assignment]
            back = Convolve(transposed_layer(layer), turned, kernels.input_gradient)
        if kernels.weight_gradient is not None:
            x = _place(layer.channels, layer.input_hw, max(layer.padding))
            haloed = back is not None and back.x.buffer.halo > 0
            dy = back.x if back is not None and haloed else _place(layer.filters, layer.output_hw, 1)
            kind = BlockGradient if kernels.weight_gradient == "block" else SingleGradient
            gradient = kind(layer, numbered, x, dy)
        return _Worker(forward, back, x, dy, gradient)

    def forward(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the convolution without bias.

        Args:
            x: (N, C, H, W) float32 or bfloat16.
            weight: (K, C, R, S); what the mask drops is not looked at.
            dtype: Of the answer, float32 or bfloat16.
        """
        x = _channels_last(x)
        y = _empty(x, self.layer.filters, self.layer.output_hw, dtype)
        flat = _flat(weight)

        def record(worker: _Worker) -> _Record:
            assert worker.forward is not None
            worker.forward.packing.fill(flat)
            return _Record([worker.forward.x.record(x)], worker.forward, [worker.forward.out.record(y)], None)

        with self._lock:
            self._run(len(x), record)
        return y

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the input (dtype of ``x``) and of the weight (float32, 0 where the mask drops)."""
        dy, x = _channels_last(dy), _channels_last(x)
        dx = _empty(x, self.layer.channels, self.layer.input_hw, x.dtype) if wants_x else None
        flat = _flat(weight) if wants_x else None

        def record(worker: _Worker) -> _Record:
            maps: list[list[int]] = []
            out: list[list[int]] = []
            back = worker.back if wants_x else None
            gradient = worker.gradient if wants_weight else None
            if back is not None and flat is not None:
                back.packing.fill(flat)
                out = [back.out.record(dx)]
            wanted = [back.x if back is not None else None, worker.dy if gradient is not None else None]
            places = {id(place): place for place in wanted if place is not None}
            maps += [place.record(dy) for place in places.values()]
            if gradient is not None:
                assert worker.x is not None
                gradient.sums[...] = 0
                maps.append(worker.x.record(x))
            return _Record(maps, back, out, gradient)

        with self._lock:
            self._run(len(x), record)
            return dx, self._gathered() if wants_weight else None

    def _gathered(self) -> Tensor:
        first = self._workers[0].gradient
        assert first is not None
        rest = (worker.gradient.collected() for worker in self._workers[1:] if worker.gradient is not None)
        total = sum(rest, start=first.collected())
        flat = np.zeros(self.layer.weights + 1, np.float32)
        flat[first.index] = total
        return torch.from_numpy(flat[1:].reshape(self.layer.weight_shape))

    def _run(self, images: int, record: Callable[[_Worker], _Record]) -> None:
        count = len(self._workers)
        bounds = [images * part // count for part in range(count + 1)]
        records = [record(worker) for worker in self._workers]
        parts = [(found.address, bounds[i], bounds[i + 1]) for i, found in enumerate(records)]
        if count == 1:
            ENTER(PASS, *parts[0], 0)
            return
        pool = _pool(count)
        waiting = [pool.submit(ENTER, PASS, *part, 0) for part in parts[1:]]
        ENTER(PASS, *parts[0], 0)
        for one in waiting:
            one.result()


class _Record:
    """The int64 record of a pass, and all that its addresses point to."""

    def __init__(
        self, maps: list[list[int]], convolve: Convolve | None, out: list[list[int]], gradient: Gradient | None
    ) -> None:
        self._maps = np.array(maps, np.int64).reshape(-1, MAP_FIELDS)
        self._out = np.array(out, np.int64).reshape(-1, MAP_FIELDS)
        fields = {
            Pass.N_IN: len(maps),
            Pass.IN: address_of(self._maps),
            Pass.N_ROWS: 0 if convolve is None else convolve.n_rows,
            Pass.ROWS: 0 if convolve is None else convolve.rows,
            Pass.N_OUT: len(out),
            Pass.OUT: address_of(self._out),
            Pass.N_GRADIENTS: 0 if gradient is None else len(gradient.rows),
            Pass.GRADIENTS: 0 if gradient is None else address_of(gradient.rows),
        }
        self._fields = np.array([fields[Pass(index)] for index in range(PASS_FIELDS)], np.int64)
        self.address = address_of(self._fields)


def refusal(layer: LayerSpec, kernels: Kernels = Kernels()) -> str | None:
    """Return why the kernels cannot train a layer in some direction; None where they can."""
    if layer.op != "conv":
        return "it is no convolution"
    if layer.groups != 1:
        return f"it has {layer.groups} groups"
    if layer.weights > MOST_WEIGHTS:
        return f"it has more than {MOST_WEIGHTS} weights"
    if kernels.input_gradient is not None and layer.stride != (1, 1):
        return f"no kernel makes the input gradient at stride {layer.stride}"
    if kernels.input_gradient is not None and min(transposed_layer(layer).padding) < 0:
        return f"no kernel makes the input gradient at padding {layer.padding}"
    return None


def transposed_layer(layer: LayerSpec) -> LayerSpec:
    """Return the convolution of stride 1 that turns an output gradient into an input gradient."""
    k, c, r, s = layer.weight_shape
    reach = [dilation * (size - 1) for dilation, size in zip(layer.dilation, (r, s), strict=True)]
    return replace(
        layer,
        weight_shape=(c, k, r, s),
        padding=(reach[0] - layer.padding[0], reach[1] - layer.padding[1]),
        input_hw=layer.output_hw,
        output_hw=layer.input_hw,
    )


def table_of(rows: list[Row], memory: Memory) -> int:
    """Return the address of instruction rows, which ``memory`` keeps."""
    fields = np.zeros((len(rows), ROW_FIELDS), np.int64)
    for index, row in enumerate(rows):
        for field, value in row.items():
            fields[index, field] = value
    return memory.keep(fields)


def _place_work(rows: list[Row], work: Work, memory: Memory) -> None:
    if work.image_bytes == 0:
        return
    planes = memory.keep(aligned((work.image_bytes + _SLACK,), np.uint8))
    scratch = memory.keep(aligned((work.scratch_bytes + 64,), np.uint8))
    for row in rows:
        row[Field.WORK], row[Field.SCRATCH] = planes, scratch


def _place(channels: int, size: tuple[int, int], halo: int) -> MapPlace:
    buffer = Buffer(0, 1, channels, *size, halo)
    return MapPlace(Memory([buffer], set()), buffer)


def _channels_last(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()
    # Strides of axes of size 1 say nothing, so contiguity is asked of the axes in their order in memory.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _empty(x: Tensor, channels: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty((len(x), *size, channels), dtype=dtype).permute(0, 3, 1, 2)


def _flat(weight: Tensor) -> npt.NDArray[np.float32]:
    values = weight.detach().float().contiguous().flatten()
    flat: npt.NDArray[np.float32] = torch.cat([values.new_zeros(1), values]).numpy()
    return flat


_POOLS: dict[int, tuple[int, ThreadPoolExecutor]] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return this process's workers; a forked child, which has none of its parent's, gets its own."""
    size, pool = _POOLS.get(os.getpid(), (0, None))
    if pool is None or size < threads:
        pool = ThreadPoolExecutor(threads - 1)
        _POOLS.clear()
        _POOLS[os.getpid()] = (threads, pool)
    return pool
