"""A whole network as one table of instructions, run by one compiled function on preallocated buffers."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch

from autoprune.core.errors import ModelError
from autoprune.kernels.cpu.assemble import assemble, transfer
from autoprune.kernels.cpu.assemble_common import Row, Work
from autoprune.kernels.cpu.bands import ALONE, Share, agree
from autoprune.kernels.cpu.memory import Buffer, Memory
from autoprune.kernels.cpu.operations import Conv, Elementwise, Epilogue
from autoprune.kernels.cpu.recorder import Recorder
from autoprune.kernels.cpu.rows import ROW_FIELDS, Control, Field, Op
from autoprune.kernels.cpu.strips import Arrangement, arrange
from autoprune.kernels.cpu.team import borrowed
from autoprune.kernels.formats import aligned

__all__ = ["Buffer", "Epilogue", "Program"]

CHUNK_BYTES = 2 * 1024 * 1024  # activations of the images that pass all rows together; measured flat from 1 to 4 MiB


class Program(Recorder):
    """Records operations on buffers, then runs them as often as asked without returning to Python in between.

    Use: ``buffer``, ``conv``, ``add`` …, optionally ``set_input`` and ``set_output``, then ``finish``, then ``run`` or
    ``time_us``. Float32 throughout. One run at a time; further callers wait.
    """

    def __init__(self, batch: int, threads: int = 1) -> None:
        """Start an empty program.

        Args:
            batch: Images per run.
            threads: Threads that share the work, the caller included.
        Raises:
            ModelError: Either number is below 1, or there are more than 62 threads.
        """
        if batch < 1 or not 1 <= threads <= 62:
            raise ModelError(f"program: batch {batch}, threads {threads}: at least 1 each and at most 62 threads.")
        super().__init__(batch)
        self.threads = threads
        self._memory: Memory | None = None
        self._weight_bytes = self._workspace_bytes = 0
        self._lock = threading.Lock()

    def finish(self, *, strips: bool = False) -> None:
        """Freeze the program: allocate buffers, pack weights, plan tiles, write the table.

        Args:
            strips: Do runs of operations strip by strip where that saves memory traffic; buffers between them then
                hold nothing. Programs whose threads share an image do whole maps.
        """
        self._check_open()
        exact = {self._input.index} if self._input is not None and self._may_be_exact(self._input) else set()
        plain = Arrangement(list(enumerate(self._operations)), self._buffers)
        whole = not strips or not (self.threads == 1 or self._by_image)
        order = plain if whole else arrange(self._operations, self._buffers, self._output, self.threads == 1)
        self._memory = memory = Memory(order.buffers, exact, order.places, order.zeros)
        work, table = Work(), list[Row]()
        self._spans: list[list[int]] = [[] for _ in self._operations]
        shares = self._shares()
        if self._input is not None:
            table.append(transfer(self._input, memory, Op.INPUT, shares.pop(0)))
        sizes: dict[int, int] = {}
        for number, operation in order.operations:
            rows, size = assemble(operation, memory, work, shares[number])
            self._spans[number] += range(len(table), len(table) + len(rows))
            table += rows
            sizes[number] = max(size, sizes.get(number, 0))
        self._weight_bytes = sum(sizes.values())
        if self._output is not None:
            table.append(transfer(self._output, memory, Op.OUTPUT, shares[-1]))
        # Images that share an arena pass one after another.
        chunk = 1 if order.places and self.threads == 1 else self._chunk()
        self._place_work(table, work, chunk)
        self._write(table, chunk)
        self._operations.clear()

    def _shares(self) -> list[Share]:
        """Return what each row's operation is to its threads; those that have images of their own agree on nothing."""
        if self.threads == 1 or self._by_image:
            return [ALONE] * (len(self._operations) + 2)
        return agree(self._operations, self._input, self._output, self.threads)

    def _may_be_exact(self, buffer: Buffer) -> bool:
        """Whether nothing reads or writes ``buffer`` in vectors of 16 channels."""
        if buffer == self._output:
            return False
        for operation in self._operations:
            residual = operation.epilogue.residual if isinstance(operation, Conv) else None
            if buffer in (operation.out, residual) or (operation.x == buffer and not isinstance(operation, Conv)):
                return False
            if isinstance(operation, Elementwise) and operation.y == buffer:
                return False
        return True

    def _chunk(self) -> int:
        assert self._memory is not None
        per_image = max(1, self._memory.size_bytes // self.batch)
        return max(1, min(self.batch, CHUNK_BYTES // per_image))

    def _place_work(self, table: list[Row], work: Work, chunk: int) -> None:
        """Allocate the workspace and write its addresses into the rows that use it."""
        assert self._memory is not None
        if work.image_bytes == 0:
            return
        lane_bytes = (chunk if self._by_image else self.batch) * work.image_bytes + 4096 + 64
        planes = aligned((self.threads, lane_bytes), np.uint8)
        scratch = aligned((self.threads, work.scratch_bytes + 64), np.uint8)
        self._workspace_bytes += planes.nbytes + scratch.nbytes
        for row in table:
            if row[Field.OP] in (Op.PLANAR, Op.CSR):
                row[Field.WORK] = self._memory.keep(planes)
                row[Field.WORK_THREAD] = lane_bytes
                row[Field.SCRATCH] = self._memory.keep(scratch)
                row[Field.SCRATCH_THREAD] = work.scratch_bytes + 64

    @property
    def _by_image(self) -> bool:
        return self.batch >= 2 * self.threads

    def _write(self, table: list[Row], chunk: int) -> None:
        assert self._memory is not None
        self._workspace_bytes += self._memory.size_bytes
        fields = np.zeros((max(len(table), 1), ROW_FIELDS), np.int64)
        for index, row in enumerate(table):
            for field, value in row.items():
                fields[index, field] = value
        self._n_rows = len(table)
        self._table = self._memory.keep(fields)
        settings = {
            Control.TABLE: self._table,
            Control.N_ROWS: self._n_rows,
            Control.BATCH: self.batch,
            Control.CHUNK: chunk if self._by_image else self.batch,
            Control.BY_IMAGE: int(self._by_image),
        }
        self._settings = np.array(list(settings.items()), np.int64)
        self._in_shape, self._out_shape = _tensor_shape(self._input), _tensor_shape(self._output)
        if self._out_shape[2:] == (1, 1):
            self._out_shape = self._out_shape[:2]
        self._sample, self._result = torch.zeros(self._in_shape), torch.zeros(self._out_shape)

    def run(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the output for one batch.

        Args:
            x_NCHW: (N, C, H, W) float32 on the CPU, shaped as the input buffer.
        Returns:
            A new (N, C) tensor if the output is a 1×1 map, else (N, C, H, W).
        Raises:
            ModelError: Wrong shape, or the program has no input or output.
        """
        self._check_finished()
        if self._input is None or self._output is None:
            raise ModelError("program: run() needs set_input() and set_output() before finish().")
        if x_NCHW.dtype != torch.float32 or x_NCHW.shape != self._in_shape:
            want = "×".join(map(str, self._in_shape))
            raise ModelError(f"program: input is {tuple(x_NCHW.shape)} {x_NCHW.dtype}; it takes float32 of {want}.")
        last = x_NCHW.dim() == 4 and not x_NCHW.is_contiguous() and _is_channels_last(x_NCHW)
        x = x_NCHW if last else x_NCHW.contiguous()
        result = torch.empty(self._out_shape)
        out_last = last and len(self._out_shape) == 4
        if out_last:  # a user who keeps channels last gets them back so
            result = result.contiguous(memory_format=torch.channels_last)
        with self._lock, borrowed(self.threads) as team:
            team.load(self._settings)
            team.run_on(x.data_ptr() + last, result.data_ptr() + out_last)
        return result

    def time_us(self, repeats: int) -> npt.NDArray[np.float64]:
        """Return the wall time of each of ``repeats`` whole runs in µs, on the buffers as they are."""
        self._check_finished()
        times = np.zeros(repeats, np.int64)
        self._measure(repeats, times, by_row=False)
        return times / 1e3

    def profile_us(self, repeats: int) -> list[npt.NDArray[np.float64]]:
        """Return, for every operation in the order added, its time in µs inside each of ``repeats`` whole runs.

        With several threads these are the times of the calling thread, waiting for the others included.
        """
        self._check_finished()
        times = np.zeros((repeats, max(self._n_rows, 1)), np.int64)
        self._measure(repeats, times, by_row=True)
        return [times[:, rows].sum(axis=1) / 1e3 for rows in self._spans]

    def _measure(self, repeats: int, times: npt.NDArray[np.int64], by_row: bool) -> None:
        with self._lock, borrowed(self.threads) as team:
            team.load(self._settings)
            control = team.control
            control[Control.SOURCE] = self._sample.data_ptr()
            control[Control.TARGET] = self._result.data_ptr()
            control[Control.REPEATS] = repeats
            control[Control.TIMES] = times.ctypes.data
            control[Control.PROFILE] = by_row
            team.run()

    @property
    def memory(self) -> Memory:
        """The buffers of the finished program, for looking into and for filling by hand."""
        self._check_finished()
        assert self._memory is not None
        return self._memory

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights and their indices."""
        return self._weight_bytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes of activation buffers and workspaces."""
        return self._workspace_bytes

    def _check_finished(self) -> None:
        if self._memory is None:
            raise ModelError("program: call finish() first; nothing runs and no buffer has memory before.")

    @property
    def _is_finished(self) -> bool:
        return self._memory is not None


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _tensor_shape(buffer: Buffer | None) -> tuple[int, ...]:
    """Return the NCHW shape of a buffer; (0,) without one."""
    return (0,) if buffer is None else (buffer.batch, buffer.channels, buffer.height, buffer.width)
