"""How the threads of a program share each image: who computes which rows, and who waits for whom. Pure arithmetic.

A cache line that one core has written takes another core up to half a microsecond to read, and a layer of a small
network takes two or three. So every thread keeps a band of each map's rows and reads of its neighbours' bands only what
a window reaches over: the rows at the edge. Those are computed first and announced at once; by the time a neighbour
needs them it has its own inner rows to go on with, and nobody waits for anybody.

Layers whose weights are large against their maps are shared by filters instead, with all threads meeting before and
after; what is too small to share is left to the first thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from autoprune.kernels.cpu.memory import Buffer
from autoprune.kernels.cpu.operations import Conv, Depthwise, Elementwise, Operation, Pool

MEET = -1  # in place of an operation to wait for: all threads meet
# Beyond this every core would read its own copy of the weights from the shared cache.
BAND_WEIGHT_BYTES = 512 * 1024
# Below this a layer takes about as long as the meeting that sharing it would cost.
SHARED_MACS = 32_768
# Cycles until a neighbour sees what was announced: inner rows of that length hide it.
SIGHT_CYCLES = 1_000.0
_GROWTH = 3

Kind = Literal["band", "units", "solo"]
Item = TypeVar("Item")
Rows = tuple[int, int]
Cover = Callable[[int, int], tuple[float, list[Item]]]


@dataclass(frozen=True, slots=True)
class Band:
    """Rows ``first`` … ``last - 1`` of a thread; the ``top`` first and ``bottom`` last of them matter to neighbours."""

    first: int
    last: int
    top: int = 0
    bottom: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """One operation's part in the agreement.

    Attributes:
        bands: Of every thread; empty where threads share units of work, or there is one thread.
        wait: Number of the operation whose edge rows the neighbours must have announced; 0 for none, or ``MEET``.
        mark: Number under which its own edge rows are announced.
    """

    bands: tuple[Band, ...] = ()
    wait: int = 0
    mark: int = 0


ALONE = Share()


@dataclass(slots=True)
class _Step:
    """An operation while the agreement is made: what it reads and writes."""

    kind: Kind
    out: Buffer
    reads: list[tuple[Buffer, Callable[[int, int], Rows]]]
    partly: bool = False  # other operations write other channels of the same map
    edges: list[list[int]] = field(default_factory=list)  # per thread: top, bottom


def cut(height: int, threads: int) -> list[Rows]:
    """Return every thread's rows of a map: the first threads get the larger bands."""
    at = [-(-height * thread // threads) for thread in range(threads + 1)]
    return [(at[thread], at[thread + 1]) for thread in range(threads)]


def agree(operations: Sequence[Operation], source: Buffer | None, target: Buffer | None, threads: int) -> list[Share]:
    """Return the share of the input's transfer, of every operation, and of the output's transfer, in this order.

    Args:
        operations: In order of execution.
        source, target: Buffers of the user's input and output, which have a transfer each unless None.
        threads: At least 2.
    """
    steps = [_step(operation, threads) for operation in operations]
    if source is not None:
        steps.insert(0, _Step("band" if source.height >= 2 * threads else "solo", source, []))
    if target is not None:
        steps.append(_Step("band" if target.height >= 2 * threads else "solo", target, [(target, _same)]))
    for step in steps:
        step.edges = [[0, 0] for _ in range(threads)]
    waits = list(_waits(steps, threads))  # all of them: later steps say which rows of earlier ones matter
    numbered = enumerate(zip(steps, waits, strict=True), start=1)
    return [_share(step, number, wait, threads) for number, (step, wait) in numbered]


def _share(step: _Step, number: int, wait: int, threads: int) -> Share:
    if step.kind == "units":
        return Share((), wait, number)
    if step.kind == "solo":
        nothing = Band(step.out.height, step.out.height)
        return Share((Band(0, step.out.height), *[nothing] * (threads - 1)), wait, number)
    rows = cut(step.out.height, threads)
    return Share(
        tuple(Band(*own, *edges) for own, edges in zip(rows, step.edges, strict=True)), wait, number
    )


def _same(first: int, last: int) -> Rows:
    return first, last


def _first(first: int, last: int) -> Rows:
    return 0, 1


def _window(stride: int, padding: int, reach: int, height: int) -> Callable[[int, int], Rows]:
    """Return which input rows a range of output rows reads."""
    return lambda first, last: (
        max(0, first * stride - padding), min(height, (last - 1) * stride - padding + reach)
    )


def _step(operation: Operation, threads: int) -> _Step:
    kind: Kind = "band" if operation.out.height >= 2 * threads else "solo"
    partly = False
    if isinstance(operation, Conv | Depthwise):
        layer = operation.layer
        reach = (layer.window[0] - 1) * layer.dilation[0] + 1
        reads = [(operation.x, _window(layer.stride[0], layer.padding[0], reach, operation.x.height))]
        if operation.epilogue.residual is not None:
            reads.append((operation.epilogue.residual, _same))
        whole = isinstance(operation, Depthwise) or operation.kernel == "dense"
        kept = operation.weight.size if whole else int(np.count_nonzero(operation.weight))
        macs = kept * operation.out.height * operation.out.width
        if 4 * kept > BAND_WEIGHT_BYTES or (kind == "solo" and macs > SHARED_MACS):
            kind = "units"
    elif isinstance(operation, Elementwise):
        # One value for a whole channel stands in the only row of its map.
        reads = [
            (buffer, _same if buffer.height == operation.out.height else _first)
            for buffer in (operation.x, operation.y)
            if buffer is not None
        ]
        partly = operation.x.channels < operation.out.channels
    else:
        assert isinstance(operation, Pool)
        reads = [(operation.x, _window(operation.stride, operation.padding, operation.window[0], operation.x.height))]
    return _Step(kind, operation.out, reads, partly)


def _waits(steps: Sequence[_Step], threads: int) -> Iterator[int]:
    """Yield what each step has to wait for, and note in earlier steps which rows others wait for."""
    met = 0  # steps before this one are done by all threads
    writers: dict[int, list[int]] = {}
    readers: dict[int, list[tuple[int, bool]]] = {}
    for index, step in enumerate(steps):
        meet = step.kind == "units" or (index > 0 and steps[index - 1].kind == "units")
        wait = 0
        remote: set[int] = set()  # buffers of which it reads a neighbour's rows
        for buffer, rows in step.reads:
            recent = [written for written in writers.get(buffer.index, []) if written >= met]
            if step.kind == "band":
                distance = _note_edges(step, rows, buffer, [steps[written] for written in recent], threads)
                remote |= {buffer.index} if distance else set()
                meet |= any(distance > 1 or steps[written].kind != "band" for written in recent)
                if distance == 1:
                    wait = max([wait, *(written + 1 for written in recent)])
            else:
                meet |= any(steps[written].kind != step.kind for written in recent)
        # What others may still read, or write, must not be overwritten.
        for reader, far in readers.get(step.out.index, []):
            if reader >= met:
                meet |= steps[reader].kind != step.kind
                wait = max(wait, reader + 1) if far else wait
        before = writers.get(step.out.index, [])
        meet |= any(steps[written].kind != step.kind for written in before if written >= met)
        if meet:
            met = index
        yield MEET if meet else wait
        writers[step.out.index] = [*before, index] if step.partly else [index]
        readers[step.out.index] = []
        for buffer, _ in step.reads:
            readers.setdefault(buffer.index, []).append((index, buffer.index in remote))


def _note_edges(
    step: _Step, rows: Callable[[int, int], Rows], buffer: Buffer, writers: Sequence[_Step], threads: int
) -> int:
    """Note which rows of ``step`` read a neighbour's rows of ``buffer``, and which of its writers' rows those are.

    Returns:
        How far the rows that are read lie: 0 in the own band, 1 in a neighbour's, 2 beyond.
    """
    own, outputs, distance = cut(buffer.height, threads), cut(step.out.height, threads), 0
    for thread, ((first, last), (low, high)) in enumerate(zip(own, outputs, strict=True)):
        needed = rows(low, high)
        above, below = max(0, first - needed[0]), max(0, needed[1] - last)
        if above:
            step.edges[thread][0] = max(step.edges[thread][0], _rows_reading(rows, range(low, high), first, last))
            distance = max(distance, 1 if thread and above <= first - own[thread - 1][0] else 2)
            for writer in writers if thread else []:
                writer.edges[thread - 1][1] = max(writer.edges[thread - 1][1], above)
        if below:
            turned = range(high - 1, low - 1, -1)
            step.edges[thread][1] = max(step.edges[thread][1], _rows_reading(rows, turned, first, last))
            near = thread + 1 < threads and below <= own[thread + 1][1] - last
            distance = max(distance, 1 if near else 2)
            for writer in writers if thread + 1 < threads else []:
                writer.edges[thread + 1][0] = max(writer.edges[thread + 1][0], below)
    return distance


def _rows_reading(rows: Callable[[int, int], Rows], outputs: range, first: int, last: int) -> int:
    """Return how many of the output rows, from the outermost on, read input rows outside ``first`` … ``last - 1``."""
    count = 0
    for row in outputs:
        low, high = rows(row, row + 1)
        if low >= first and high <= last:
            break
        count += 1
    return count


def deal(
    share: Share, height: int, groups: int, cover: Cover[Item]
) -> tuple[list[Item], npt.NDArray[np.int32] | None]:
    """Return an operation's items, and where each thread's begin, its inner ones begin, and end, (T, 4) int32.

    Args:
        share: Of the operation.
        height: Of its output.
        groups: How often each item is done.
        cover: (first row, end) → predicted cycles of a group's pass, and the items that cover these rows.
    Returns:
        The items; None for the table where threads share the units of all items.
    """
    if not share.bands:
        return cover(0, height)[1], None
    items: list[Item] = []
    table = np.zeros((len(share.bands), 4), np.int32)
    for thread, band in enumerate(share.bands):
        edge, inner = _edge_first(band, groups, cover)
        table[thread, :3] = np.cumsum([len(items), len(edge), len(inner)])
        items += edge + inner
    return items, table


def _edge_first(band: Band, groups: int, cover: Cover[Item]) -> tuple[list[Item], list[Item]]:
    """Return the items at the edge of a band, and those inside: as many rows at the edge as make it cheapest."""
    best: tuple[float, list[Item], list[Item]] = (float("inf"), [], [])
    if band.first == band.last:
        return [], []
    if not band.top and not band.bottom:
        return [], cover(band.first, band.last)[1]
    for growth in range(_GROWTH + 1):
        top = band.first + (band.top + growth if band.top else 0)
        bottom = band.last - (band.bottom + growth if band.bottom else 0)
        regions = [(band.first, top), (bottom, band.last)] if top < bottom else [(band.first, band.last)]
        edge = [cover(*rows) for rows in regions if rows[0] < rows[1]]
        inner_cost, inner = cover(top, bottom) if top < bottom else (0.0, [])
        cost = groups * (sum(cost for cost, _ in edge) + inner_cost) + max(0.0, SIGHT_CYCLES - groups * inner_cost)
        if cost < best[0]:
            best = cost, [item for _, items in edge for item in items], inner
    return best[1], best[2]
