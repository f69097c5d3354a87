"""The compiled loop: runs the rows of a program, alone or as one thread of a team."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from autoprune.kernels.cpu.passes import run_pass
from autoprune.kernels.cpu.rows import ROW_BYTES, Control, Field, Op
from autoprune.kernels.cpu.steps import step
from autoprune.kernels.cpu.vector import exchange, fetch_add, give_way, now_ns, pause, peek, poke, watch

SPINS_BEFORE_YIELD = 500  # some microseconds: longer waits mean that the other thread needs this core
STOPPED = -1
COMPILED_FROM = ("emit", "engine", "gradient", "passes", "rows", "select", "shapes", "steps", "tiles", "vector")


@njit(nogil=True)
def _meet(control: int, threads: int) -> None:
    """Wait until all threads are here."""
    phase = watch(control + 8 * Control.PHASE)
    if fetch_add(control + 8 * Control.ARRIVED, 1) == threads - 1:
        exchange(control + 8 * Control.ARRIVED, 0)
        exchange(control + 8 * Control.PHASE, phase + 1)
        return
    spins = 0
    while watch(control + 8 * Control.PHASE) == phase:
        pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            give_way()


@njit(nogil=True)
def _await_neighbours(control: int, thread: int, threads: int, number: int) -> None:
    """Wait until the threads on both sides have announced ``number``."""
    for neighbour in (thread - 1, thread + 1):
        if 0 <= neighbour < threads:
            spins = 0
            while watch(_announced(control, neighbour)) < number:
                pause()
                spins += 1
                if spins > SPINS_BEFORE_YIELD:
                    give_way()


@njit(nogil=True)
def _announced(control: int, thread: int) -> int:
    """Return the address of what a thread has announced."""
    return control + 8 * Control.STATE + 128 * thread + 64


@njit(nogil=True)
def _once(control: int, thread: int, times: int) -> None:
    """Run all rows on all images once; ``times``: where to add every row's nanoseconds, or 0."""
    threads, batch = peek(control + 8 * Control.THREADS), peek(control + 8 * Control.BATCH)
    by_image = peek(control + 8 * Control.BY_IMAGE) != 0
    rows, told = peek(control + 8 * Control.N_ROWS), _announced(control, thread)
    since = peek(told)  # the same for all threads, since all have run the same rows as often
    begin = batch * thread // threads if by_image else 0
    end = batch * (thread + 1) // threads if by_image else batch
    part, parts, lane = (0, 1, thread) if by_image else (thread, threads, 0)
    before = now_ns() if times != 0 else 0
    while begin < end:
        last = min(begin + peek(control + 8 * Control.CHUNK), end)
        for i in range(rows):
            row = peek(control + 8 * Control.TABLE) + ROW_BYTES * i
            user = Control.TARGET if peek(row + 8 * Field.OP) == Op.OUTPUT else Control.SOURCE
            wait = peek(row + 8 * Field.WAIT)
            if wait < 0:
                _meet(control, threads)
            elif wait > 0:
                _await_neighbours(control, thread, threads, since + wait)
            step(row, peek(control + 8 * user), begin, last, part, parts, lane, thread, told, since)
            if times != 0:
                after = now_ns()
                poke(times + 8 * i, peek(times + 8 * i) + after - before)
                before = after
        begin = last
    if threads > 1:
        exchange(told, since + rows + 1)
        _meet(control, threads)


@njit(nogil=True)
def _runs(control: int, thread: int) -> None:
    """Do the runs that the control block asks for, as thread ``thread`` of its team."""
    threads, times = peek(control + 8 * Control.THREADS), peek(control + 8 * Control.TIMES)
    by_row = peek(control + 8 * Control.PROFILE) != 0
    rows = peek(control + 8 * Control.N_ROWS)
    for repeat in range(peek(control + 8 * Control.REPEATS)):
        if times == 0:
            _once(control, thread, 0)
            continue
        if threads > 1:
            _meet(control, threads)
        mine = thread == 0
        before = now_ns()
        _once(control, thread, times + 8 * rows * repeat if by_row and mine else 0)
        if mine and not by_row:
            poke(times + 8 * repeat, now_ns() - before)


@njit(nogil=True)
def _work(control: int, thread: int, seen: int, patience_ns: int) -> int:
    """Serve runs as a worker; return the last one seen when nothing came for ``patience_ns``, or ``STOPPED``."""
    epoch, state = control + 8 * Control.EPOCH, control + 8 * Control.STATE + 128 * thread
    since = now_ns()
    while True:
        if watch(control + 8 * Control.STOP) != 0:
            return STOPPED
        if watch(epoch) != seen:
            seen = watch(epoch)
            _runs(control, thread)
            since = now_ns()
        elif now_ns() - since < patience_ns:
            pause()
        else:
            exchange(state, 1)
            # A run announced in between has either seen the 1 and will wake us, or must be served now.
            if watch(epoch) == seen or exchange(state, 0) == 0:
                return seen
            since = now_ns()


@njit(nogil=True)
def _announce(control: int) -> int:
    """Start a run; return the bits of the workers that sleep and must be woken."""
    fetch_add(control + 8 * Control.EPOCH, 1)
    asleep = 0
    for thread in range(1, peek(control + 8 * Control.THREADS)):
        if exchange(control + 8 * Control.STATE + 128 * thread, 0) != 0:
            asleep |= 1 << thread
    return asleep


def _compile() -> Callable[[int, int, int, int, int], int]:
    """Return the one entry point, cached on disk under the contents of its sources.

    numba watches only the file of the cached function; a closed-over hash makes any change to the others a new entry.
    """
    digest = hashlib.sha256()
    for name in COMPILED_FROM:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    stamp = int.from_bytes(digest.digest()[:7], "big")

    @njit("int64(int64, int64, int64, int64, int64)", nogil=True, cache=True)
    def enter(verb: int, control: int, a: int, b: int, c: int) -> Any:
        if verb == 0:
            _runs(control, a)
        elif verb == 1:
            return _work(control, a, b, c)
        elif verb == 2:
            return _announce(control)
        elif verb == 3:
            poke(control + 8 * Control.SOURCE, a)
            poke(control + 8 * Control.TARGET, b)
            poke(control + 8 * Control.REPEATS, 1)
            poke(control + 8 * Control.TIMES, 0)
        elif verb == 4:
            run_pass(control, a, b)
        return stamp

    entry: Callable[[int, int, int, int, int], int] = enter
    return entry


ENTER = _compile()
# The verbs of ENTER(verb, control, a, b, c): run as thread a; serve as worker a that saw run b, for c ns at most;
# announce a run; prepare one run from the tensor at address a to the one at b. PASS takes a training pass in place of
# the control block and runs it on images a to b - 1.
RUN, WORK, ANNOUNCE, PREPARE, PASS = 0, 1, 2, 3, 4
