"""Runs of operations done strip by strip, so that the maps between them stay in the second-level cache.

Mobile networks widen a map sixfold, filter every channel and narrow it again: at 112 × 112 pixels the wide maps take
megabytes, and writing them out and fetching them back costs more than the arithmetic. Here each run of operations
computes a few rows of its last map at a time. What lies between keeps only the rows of its window, in an arena that all
runs share; rows that the next strip reads again move to the window's start. Pure arithmetic: a strip is made of the
operations that there are, on buffers that are parts of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from autoprune.kernels.cpu.layout import Strides, round_up
from autoprune.kernels.cpu.memory import STAGGER_BYTES, Buffer, Placed
from autoprune.kernels.cpu.operations import Conv, Depthwise, Elementwise, Operation
from autoprune.kernels.cpu.shapes import LANES, VECTOR_BYTES

STRIP_BYTES = 320 * 1024  # of the windows of a run together: they share the second-level cache with weights
RUN_BYTES = 512 * 1024  # maps between the operations of a run that are worth it
LINK_BYTES = 96 * 1024  # a map between two operations that is worth it
WEIGHT_BYTES = 384 * 1024  # of a run: every strip reads them again
SLACK_PIXELS = 2  # after each window: vector loads may run past the last pixel

Link = Conv | Depthwise | Elementwise
Rows = tuple[int, int]


@dataclass(slots=True)
class Arrangement:
    """What a program does in which order.

    Attributes:
        operations: (number of the recorded operation that it is a part of, operation).
        buffers: The recorded ones and those that strips use.
        places: Buffers without memory of their own, by index.
        zeros: Index of a buffer of zeros, or None.
    """

    operations: list[tuple[int, Operation]]
    buffers: list[Buffer]
    places: dict[int, Placed] = field(default_factory=dict)
    zeros: int | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Of one operation in one strip: the window of its output that the next one reads, and the rows that are new."""

    window: Rows
    new: Rows


def arrange(
    operations: Sequence[Operation], buffers: Sequence[Buffer], target: Buffer | None, alone: bool
) -> Arrangement:
    """Return the operations with those of every run that is worth it cut into strips.

    Args:
        operations: As recorded.
        buffers: As recorded.
        target: Buffer that is read after the last operation.
        alone: Whether one thread does all images in turn, so that they can share one arena.
    """
    runs = [run for run in _runs(operations, target) if _worth(operations[run.start : run.stop])]
    numbered = list(enumerate(operations))
    if not runs:
        return Arrangement(numbered, list(buffers))
    done = Arrangement([], list(buffers))
    cutter = _Cutter(done, alone)
    position = 0
    for run in runs:
        done.operations += numbered[position : run.start]
        cutter.cut(run.start, [o for o in operations[run.start : run.stop] if isinstance(o, Link)])
        position = run.stop
    done.operations += numbered[position:]
    cutter.close()
    return done


def _reads(operation: Operation) -> Iterator[Buffer]:
    """Yield what an operation reads besides its ``x``."""
    if isinstance(operation, Elementwise) and operation.y is not None:
        yield operation.y
    if isinstance(operation, Conv | Depthwise) and operation.epilogue.residual is not None:
        yield operation.epilogue.residual


def _can_link(operation: Operation) -> bool:
    """Return whether an operation can be done a few rows at a time."""
    if isinstance(operation, Conv):
        return operation.kernel != "csr"
    if isinstance(operation, Elementwise):
        return operation.y is None and operation.out.channels == operation.x.channels
    return isinstance(operation, Depthwise)


def _runs(operations: Sequence[Operation], target: Buffer | None) -> Iterator[range]:
    """Yield the longest runs in which every operation but the last is read by the next one alone, as its ``x``."""
    writer: dict[int, int] = {}
    readers: list[list[tuple[int, bool]]] = [[] for _ in operations]
    for number, operation in enumerate(operations):
        read = [(operation.x, True), *((other, False) for other in _reads(operation))]
        if isinstance(operation, Elementwise) and operation.out.channels != operation.x.channels:
            read.append((operation.out, False))  # some of its channels stay as they are
        for buffer, as_x in read:
            if buffer.index in writer:
                readers[writer[buffer.index]].append((number, as_x))
        writer[operation.out.index] = number
    if target is not None and target.index in writer:
        readers[writer[target.index]].append((len(operations), False))
    start, weights = 0, 0
    for number, operation in enumerate(operations):
        weights += operation.weight.nbytes if isinstance(operation, Conv | Depthwise) else 0
        following = operations[number + 1] if number + 1 < len(operations) else None
        linked = (
            following is not None
            and readers[number] == [(number + 1, True)]
            and _can_link(operation)
            and _can_link(following)
            and _map_bytes(operation.out) >= LINK_BYTES
            and weights + (following.weight.nbytes if isinstance(following, Conv | Depthwise) else 0) <= WEIGHT_BYTES
        )
        if not linked:
            if number > start:
                yield range(start, number + 1)
            start, weights = number + 1, 0


def _map_bytes(buffer: Buffer) -> int:
    return 4 * round_up(buffer.channels, LANES) * buffer.height * buffer.width


def _worth(run: Sequence[Operation]) -> bool:
    """Return whether a run gains from strips; none whose end is written where its beginning, or a residual, is read."""
    outside = {run[0].x.index, *(buffer.index for operation in run for buffer in _reads(operation))}
    return sum(_map_bytes(o.out) for o in run[:-1]) >= RUN_BYTES and run[-1].out.index not in outside


def _reach(operation: Link, rows: Rows) -> Rows:
    """Return the input rows, some perhaps outside the map, that output rows need."""
    if isinstance(operation, Elementwise):
        return rows
    layer = operation.layer
    reach = layer.dilation[0] * (layer.window[0] - 1) + 1
    first = rows[0] * layer.stride[0] - layer.padding[0]
    return first, (rows[1] - 1) * layer.stride[0] - layer.padding[0] + reach


def plan_strips(run: Sequence[Link], height: int) -> list[list[_Part | None]]:
    """Return, for every strip of ``height`` rows of the last map, what each operation does; None for nothing."""
    ends = [-(10**9)] * len(run)
    strips = []
    for first in range(0, run[-1].out.height, height):
        rows: Rows | None = (first, min(first + height, run[-1].out.height))
        strip: list[_Part | None] = [None] * len(run)
        for number in reversed(range(len(run))):
            if rows is None:
                break
            new = max(rows[0], ends[number], 0), min(rows[1], run[number].out.height)
            strip[number] = _Part(rows, new)
            ends[number] = max(ends[number], rows[1])
            rows = _reach(run[number], new) if new[0] < new[1] else None
        strips.append(strip)
    return strips


class _Cutter:
    """Cuts runs into strips, and lays their windows into the arena."""

    def __init__(self, done: Arrangement, alone: bool) -> None:
        self.done = done
        self.alone = alone
        batch = done.buffers[0].batch
        # Their sizes are known at the end.
        self.arena = self._handle(Buffer(0, 1 if alone else batch, LANES, 1, 1, 0))
        self.nothing = self._handle(Buffer(0, 1, LANES, 1, 1, 0))
        done.zeros = self.nothing.index
        self.size = self.zero_size = 0
        self.windows: list[int] = []
        self.between: set[int] = set()

    def _handle(self, like: Buffer) -> Buffer:
        buffer = replace(like, index=len(self.done.buffers))
        self.done.buffers.append(buffer)
        return buffer

    def _part(self, of: Buffer, row: int, rows: int, column: int = 0, columns: int = 0) -> Buffer:
        """Return rows ``row`` … of a buffer as a buffer of its own, or some of their columns."""
        part = self._handle(replace(of, height=rows, width=columns or of.width))
        self.done.places[part.index] = Placed(of.index, row, column)
        return part

    def close(self) -> None:
        """Fix the sizes of what all runs share, and give no memory to maps that nobody needs whole."""
        used = {b.index for _, o in self.done.operations for b in (o.x, o.out, *_reads(o))}
        used |= {place.base for place in self.done.places.values()}
        for index in self.between - used:
            self.done.places[index] = Placed(self.arena.index, 0, 0)
        for buffer, size in ((self.arena, self.size), (self.nothing, self.zero_size)):
            self.done.buffers[buffer.index] = replace(buffer, width=-(-size // VECTOR_BYTES))
        if self.alone:
            return
        image = Strides.of(LANES, 1, -(-self.size // VECTOR_BYTES), 0, False).image
        for index in self.windows:
            place = self.done.places[index]
            assert place.strides is not None
            self.done.places[index] = replace(place, strides=replace(place.strides, image=image))

    def cut(self, number: int, run: Sequence[Link]) -> None:
        """Append the strips of a run; ``number`` is that of its first operation."""
        strips = self._fitting(run)
        windows = self._windows(run, strips)
        before: list[_Part | None] = [None] * len(run)
        for strip in strips:
            for place, (operation, part) in enumerate(zip(run, strip, strict=True)):
                if part is None:
                    continue
                steps: list[Operation] = []
                if place < len(run) - 1:
                    steps += self._moves(windows[place], before[place], part, operation.out.height)
                if part.new[0] < part.new[1]:
                    x = windows[place - 1] if place else None
                    steps.append(self._piece(operation, part, x, windows[place]))
                self.done.operations += [(number + place, step) for step in steps]
                before[place] = part
        self.between |= {operation.out.index for operation in run[:-1]}

    def _fitting(self, run: Sequence[Link]) -> list[list[_Part | None]]:
        """Return the strips: as high as fit, and about equally high."""
        total = run[-1].out.height
        strips = plan_strips(run, 1)
        for count in range(1, total + 1):
            planned = plan_strips(run, -(-total // count))
            if sum(_window_bytes(*pair) for pair in zip(run[:-1], _heights(planned), strict=False)) <= STRIP_BYTES:
                return planned
        return strips

    def _windows(self, run: Sequence[Link], strips: Sequence[Sequence[_Part | None]]) -> list[Buffer | None]:
        """Return the windows of all maps but the last, laid out one after another."""
        windows: list[Buffer | None] = []
        offset = 0
        for operation, height in zip(run[:-1], _heights(strips), strict=False):
            following = run[len(windows) + 1]
            halo = 0
            if not isinstance(following, Elementwise):
                halo = max(p + more for p, more in zip(following.layer.padding, following.extra, strict=True))
            out = operation.out
            strides = Strides.of(out.channels, height, out.width, halo, False)
            if self.alone:
                strides = replace(strides, image=0)
            window = self._handle(replace(out, height=height, halo=halo))
            # Row 0 is the window's first: it has no halo above it.
            self.done.places[window.index] = Placed(self.arena.index, 0, 0, strides, offset - halo * strides.row)
            self.windows.append(window.index)
            windows.append(window)
            offset += round_up(height * strides.row + SLACK_PIXELS * strides.pixel, 4096) + STAGGER_BYTES
            self.zero_size = max(self.zero_size, height * strides.row)
        self.size = max(self.size, offset)
        return [*windows, None]

    def _moves(
        self, window: Buffer | None, before: _Part | None, part: _Part, height: int
    ) -> Iterator[Operation]:
        """Yield copies of the rows that the last strip made already, and of zeros around the map."""
        assert window is not None
        low, high = part.window
        end = low
        if before is None and window.halo:
            for column in (-window.halo, window.width):
                yield self._zeros(window, 0, window.height, column, window.halo)
        if before is not None:
            kept = before.window[1] - low
            end = max(low, before.window[1])
            if kept > 0 and low > before.window[0]:
                source = self._part(window, low - before.window[0], kept)
                yield Elementwise(source, None, self._part(window, 0, kept))
        if end < min(0, high):
            yield self._zeros(window, end - low, min(0, high) - end)
        if max(height, end) < high:
            yield self._zeros(window, max(height, end) - low, high - max(height, end))

    def _zeros(self, window: Buffer, row: int, rows: int, column: int = 0, columns: int = 0) -> Operation:
        out = self._part(window, row, rows, column, columns)
        strides = self.done.places[window.index].strides
        assert strides is not None
        zeros = self._handle(replace(out, halo=0))
        self.done.places[zeros.index] = Placed(
            self.nothing.index, 0, 0, replace(strides, row=0, image=0, halo=0), 0
        )
        return Elementwise(zeros, None, out)

    def _piece(self, operation: Link, part: _Part, x: Buffer | None, out: Buffer | None) -> Operation:
        """Return the operation on its new rows; ``x`` and ``out`` are windows, or None for the whole maps."""
        first, last = part.new
        needed = _reach(operation, part.new)
        above = 0 if out is None else part.window[0]
        to = self._part(operation.out if out is None else out, first - above, last - first)
        if isinstance(operation, Elementwise):
            source = self._part(operation.x, needed[0], last - first) if x is None else self._part(x, 0, last - first)
            return replace(operation, x=source, out=to)
        above = operation.layer.padding[0]
        rows = needed[1] - needed[0]
        source = self._part(operation.x, needed[0] + above, rows) if x is None else self._part(x, above, rows)
        layer = replace(operation.layer, input_hw=(rows, operation.x.width), output_hw=(last - first, to.width))
        epilogue = operation.epilogue
        if epilogue.residual is not None:
            epilogue = replace(epilogue, residual=self._part(epilogue.residual, first, last - first))
        return replace(operation, x=source, out=to, layer=layer, epilogue=epilogue)


def _heights(strips: Sequence[Sequence[_Part | None]]) -> list[int]:
    """Return the rows of every window, that of the last map among them."""
    return [
        max((part.window[1] - part.window[0] for part in parts if part is not None), default=1)
        for parts in zip(*strips, strict=True)
    ]


def _window_bytes(operation: Link, height: int) -> int:
    return 4 * round_up(operation.out.channels, LANES) * height * (operation.out.width + 2)
