"""Threads that share an image: every row is announced before it is read, and nothing is overwritten too early."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.bands import MEET, Band, Share, agree, cut, deal
from autoprune.kernels.cpu.memory import Buffer
from autoprune.kernels.cpu.operations import Conv, Depthwise, Elementwise, Epilogue, Operation, Pool
from autoprune.kernels.cpu.program import Program


def conv_spec(channels: int, filters: int, size: int, window: int, stride: int, padding: int) -> LayerSpec:
    out = (size + 2 * padding - window) // stride + 1
    return LayerSpec(
        "layer", "conv", (filters, channels, window, window), (stride, stride), (padding, padding),
        input_hw=(size, size), output_hw=(out, out),
    )


def read_rows(operation: Operation, buffer: Buffer, first: int, last: int) -> set[int]:
    """Return the rows of ``buffer`` that output rows ``first`` … ``last - 1`` read, counted one by one."""
    rows: set[int] = set()
    for row in range(first, last):
        if isinstance(operation, Conv | Depthwise):
            layer = operation.layer
            if operation.x == buffer:
                taps = range(layer.window[0])
                rows |= {row * layer.stride[0] - layer.padding[0] + tap * layer.dilation[0] for tap in taps}
            if operation.epilogue.residual == buffer:
                rows.add(row)
        elif isinstance(operation, Pool):
            if operation.x == buffer:
                rows |= {row * operation.stride - operation.padding + tap for tap in range(operation.window[0])}
        elif buffer in (operation.x, operation.y):
            rows.add(row)
    return {row for row in rows if 0 <= row < buffer.height}


def reads_of(operation: Operation) -> list[Buffer]:
    if isinstance(operation, Conv | Depthwise):
        return [b for b in (operation.x, operation.epilogue.residual) if b is not None]
    if isinstance(operation, Pool):
        return [operation.x]
    return [b for b in (operation.x, operation.y) if b is not None]


class Checker:
    """Replays an agreement as loosely as it allows, and looks for a row that is read too early or lost too early.

    What is certain before operation i of a thread: all of its own earlier operations; everything before the last
    meeting; and of each neighbour the edge rows of the operations up to the highest number waited for so far.
    """

    def __init__(self, operations: Sequence[Operation], shares: Sequence[Share], threads: int) -> None:
        self.operations, self.shares, self.threads = operations, shares, threads

    def rows(self, index: int, thread: int) -> tuple[set[int], set[int]]:
        """Return (rows at the edge, all rows) that a thread computes of an operation; all of them in units."""
        share = self.shares[index]
        if not share.bands:
            every = set(range(self.operations[index].out.height))
            return set(), every
        band = share.bands[thread]
        edge = {*range(band.first, min(band.last, band.first + band.top))}
        edge |= {*range(max(band.first, band.last - band.bottom), band.last)}
        return edge, set(range(band.first, band.last))

    def certain(self, index: int, me: int, other: int, row: int, done: int, met: int, waited: int) -> bool:
        """Return whether ``other`` has surely computed ``row`` of operation ``done`` before ``me`` starts ``index``."""
        edge, every = self.rows(done, other)
        if row not in every:
            return True
        return done < met or other == me or (abs(other - me) == 1 and done < waited and row in edge)

    def check(self) -> None:
        met = 0
        waited = 0
        for index, (operation, share) in enumerate(zip(self.operations, self.shares, strict=True)):
            if share.wait == MEET:
                met = index
            waited = max(waited, share.wait)
            for me in range(self.threads):
                self._check_reads(operation, index, me, met, waited)
                self._check_writes(operation, index, me, met, waited)

    def _check_reads(self, operation: Operation, index: int, me: int, met: int, waited: int) -> None:
        own = self.rows(index, me)[1]
        for buffer in reads_of(operation):
            for writer in self.writers(buffer, index) if own else []:
                assert writer < met or self.shares[index].bands, "units read what was not finished"
                for row in read_rows(operation, buffer, min(own), max(own) + 1):
                    for other in range(self.threads):
                        assert self.certain(index, me, other, row, writer, met, waited), (index, me, other, row)

    def writers(self, buffer: Buffer, before: int) -> list[int]:
        """Return the operations whose results a map holds: the last one, or all that wrote a part of it since."""
        found = []
        for index in reversed([i for i in range(before) if self.operations[i].out == buffer]):
            found.append(index)
            operation = self.operations[index]
            if not isinstance(operation, Elementwise) or operation.x.channels == buffer.channels:
                break
        return found

    def _check_writes(self, operation: Operation, index: int, me: int, met: int, waited: int) -> None:
        mine = self.rows(index, me)[1]
        for reader in range(met, index):
            if operation.out not in reads_of(self.operations[reader]):
                continue
            for other in range(self.threads):
                theirs = self.rows(reader, other)[1]
                for row in theirs:
                    lost = mine & read_rows(self.operations[reader], operation.out, row, row + 1)
                    assert not lost or self.certain(index, me, other, row, reader, met, waited), (index, reader, row)


class Maps:
    """Few maps of each size, as a residual network uses them again and again."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.made: dict[int, list[Buffer]] = {}

    def any(self, height: int) -> Buffer:
        pool = self.made.setdefault(height, [])
        if len(pool) < 3:
            pool.append(Buffer(sum(map(len, self.made.values())), 1, 16, height, height, 3))
        return self.draw(st.sampled_from(pool))

    def any_or_none(self, height: int) -> Buffer | None:
        return self.draw(st.sampled_from([None, *self.made.get(height, [])]))


def conv(maps: Maps, x: Buffer) -> Operation:
    draw = maps.draw
    window, stride = draw(st.sampled_from([(1, 1), (3, 1), (3, 2), (5, 1), (1, 2), (7, 2)]))
    spec = conv_spec(x.channels, 16, x.height, window, stride, window // 2)
    out = maps.any(spec.output_hw[0])
    large = draw(st.booleans()) and draw(st.booleans())
    weight = np.ones((512, 300) if large else spec.weight_shape, np.float32)
    epilogue = Epilogue(False, maps.any_or_none(out.height))
    return Conv(x, out, spec, weight, np.zeros(16, np.float32), "dense", epilogue, 16)


def depthwise(maps: Maps, x: Buffer) -> Operation:
    spec = conv_spec(1, 16, x.height, 3, maps.draw(st.integers(1, 2)), 1)
    weight, bias = np.ones(spec.weight_shape, np.float32), np.zeros(16, np.float32)
    return Depthwise(x, maps.any(spec.output_hw[0]), spec, weight, bias, Epilogue())


def add(maps: Maps, x: Buffer) -> Operation:
    return Elementwise(x, maps.any_or_none(x.height), maps.any(x.height), True)


def pool(maps: Maps, x: Buffer) -> Operation:
    return Pool(x, maps.any((x.height - 1) // 2 + 1), (3, 3), 2, 1, False)


def joined(maps: Maps, height: int) -> tuple[list[Operation], Buffer]:
    """Return the copies of two maps into one of 32 channels."""
    out = Buffer(1_000 + height, 1, 32, height, height, 3)
    return [Elementwise(maps.any(height), None, out, offset=offset) for offset in (0, 16)], out


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Operation], int]:
    """Random operations over few maps, and a number of threads."""
    maps = Maps(draw)
    operations: list[Operation] = []
    x = maps.any(draw(st.integers(1, 20)))
    for _ in range(draw(st.integers(1, 9))):
        make = draw(st.sampled_from([conv, conv, conv, depthwise, add, pool]))
        if make is conv and draw(st.booleans()):
            copies, x = joined(maps, x.height)
            operations += copies
        operation = make(maps, x)
        if operation.out != x or make is add:
            operations.append(operation)
            x = operation.out
    return operations, draw(st.integers(2, 4))


@settings(max_examples=300, deadline=None)
@given(chains())
def test_no_row_is_read_before_it_is_there_or_overwritten_while_it_is_needed(
    case: tuple[list[Operation], int],
) -> None:
    operations, threads = case
    Checker(operations, agree(operations, None, None, threads), threads).check()


def test_a_missing_announcement_would_be_noticed() -> None:
    maps = [Buffer(i, 1, 16, 8, 8, 1) for i in range(3)]
    spec = conv_spec(16, 16, 8, 3, 1, 1)
    weight, bias = np.ones(spec.weight_shape, np.float32), np.zeros(16, np.float32)
    operations = [Conv(maps[i], maps[i + 1], spec, weight, bias, "dense", Epilogue(), 16) for i in range(2)]
    shares = agree(operations, None, None, 2)
    assert shares[1].wait == 1
    assert [band.bottom + band.top for band in shares[0].bands] == [1, 1]
    for broken in (
        [shares[0], Share(shares[1].bands, 0, 2)],
        [Share(tuple(Band(b.first, b.last) for b in shares[0].bands), 0, 1), shares[1]],
    ):
        with pytest.raises(AssertionError):
            Checker(operations, broken, 2).check()


def test_layers_of_one_size_never_meet() -> None:
    maps = [Buffer(i, 1, 16, 14, 14, 1) for i in range(3)]
    spec = conv_spec(16, 16, 14, 3, 1, 1)
    weight, bias = np.ones(spec.weight_shape, np.float32), np.zeros(16, np.float32)
    ring = [
        Conv(maps[i % 3], maps[(i + 1) % 3], spec, weight, bias, "dense", Epilogue(False, maps[(i + 1) % 3]), 16)
        for i in range(9)
    ]
    assert MEET not in [share.wait for share in agree(ring, None, None, 2)]


@given(st.integers(1, 40), st.integers(1, 8))
def test_bands_cover_every_row_once(height: int, threads: int) -> None:
    rows = [row for first, last in cut(height, threads) for row in range(first, last)]
    assert rows == list(range(height))


@given(st.integers(4, 40), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
def test_dealt_items_cover_every_row_once_and_edges_come_first(height: int, top: int, bottom: int, groups: int) -> None:
    bands = tuple(
        Band(first, last, min(top, last - first), min(bottom, last - first)) for first, last in cut(height, 2)
    )
    items, table = deal(Share(bands, 0, 1), height, groups, lambda a, b: (100.0 * (b - a), list(range(a, b))))
    assert table is not None
    assert sorted(items) == list(range(height))
    for band, (first, inner, last, _) in zip(bands, table, strict=True):
        assert sorted(items[first:last]) == list(range(band.first, band.last))
        outside = {*range(band.first, band.first + band.top), *range(band.last - band.bottom, band.last)}
        assert outside <= set(items[first:inner])


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("kernel", ["block", "csr"])
def test_deep_networks_equal_torch_on_any_number_of_threads(kernel: str, threads: int) -> None:
    # More threads than cores: the system stops them anywhere, so what is read too early shows.
    generator = torch.Generator().manual_seed(threads)
    program, size, channels = Program(1, threads), 30, 16
    x = program.buffer(3, size, size, halo=1)
    program.set_input(x)
    maps = [program.buffer(channels, size, size, halo=2) for _ in range(3)]
    image = torch.randn(1, 3, size, size, generator=generator)
    outputs, buffer, residual = [image], x, None
    for index in range(14):
        window = (3, 1, 5)[index % 3]
        spec = conv_spec(buffer.channels, channels, size, window, 1, window // 2)
        weight = torch.randn(spec.weight_shape, generator=generator) / spec.weight_shape[1] ** 0.5 / window
        weight *= torch.rand(spec.weight_shape, generator=generator) < (1.0 if kernel == "block" else 0.3)
        out = maps[index % 3]
        program.conv(buffer, out, spec, weight, None, kernel, Epilogue(True, residual))  # type: ignore[arg-type]
        total = F.conv2d(outputs[-1], weight, padding=window // 2)
        outputs.append(torch.relu(total if residual is None else total + outputs[-2]))
        residual, buffer = buffer if index else None, out
    pooled = program.buffer(channels, 1, 1)
    program.global_avg_pool(buffer, pooled)
    program.set_output(pooled)
    program.finish()
    for _ in range(50):
        torch.testing.assert_close(program.run(image), outputs[-1].mean((2, 3)), rtol=1e-4, atol=1e-4)
