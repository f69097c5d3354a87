"""The threads that run programs: the caller, and workers that sleep while nothing is to do."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from autoprune.kernels.cpu.engine import ANNOUNCE, ENTER, PREPARE, RUN, STOPPED, WORK
from autoprune.kernels.cpu.rows import Control, control_size
from autoprune.kernels.formats import aligned

PATIENCE_NS = 200_000  # how long a worker spins for the next run before it sleeps


class Team:
    """The calling thread and ``threads - 1`` daemon threads that serve the runs announced in a control block.

    Programs of the same number of threads take turns on one team: its threads are awake and on their cores already
    when the next program runs. Programs that run at the same time have a team each.
    """

    def __init__(self, threads: int) -> None:
        """Start the workers; ``borrowed`` does it when no team is free."""
        self.control = aligned((control_size(threads),), np.int64).view(np.int64)
        self.control[Control.THREADS] = threads
        self._address = int(self.control.ctypes.data)
        self._loaded: npt.NDArray[np.int64] | None = None
        self._allowed: set[int] = set()  # cores of the thread that called last
        self._bells = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._workers = [
            threading.Thread(
                target=_serve, args=(self.control, i, bell, self._allowed), daemon=True, name=f"kernel-{i}"
            )
            for i, bell in enumerate(self._bells, start=1)
        ]
        for worker in self._workers:
            worker.start()

    def load(self, program: npt.NDArray[np.int64]) -> None:
        """Take on a program: (field of the control block, value) pairs, shape (n, 2)."""
        if self._loaded is not program:
            self.control[program[:, 0]] = program[:, 1]
            self._loaded = program

    def run(self) -> None:
        """Do what the control block asks for; returns when all threads are done."""
        if self._workers:
            asleep = ENTER(ANNOUNCE, self._address, 0, 0, 0)
            if asleep:
                self._wake(asleep)
        ENTER(RUN, self._address, 0, 0, 0)

    def _wake(self, asleep: int) -> None:
        """Wake the workers whose bit is set, each on a core of its own.

        Left alone, the system often wakes a worker on the core of the caller, which spins and never yields it: until
        the system balances its load, milliseconds later, both run at a third of their speed.
        """
        cores = _cores_from_here(len(self._workers) + 1)
        self._allowed.clear()
        self._allowed.update(cores)
        for index, (worker, bell) in enumerate(zip(self._workers, self._bells, strict=True), start=1):
            if asleep >> index & 1:
                if cores and worker.native_id:
                    _place(worker.native_id, {cores[index]})
                bell.release()

    def run_on(self, source: int, target: int) -> None:
        """Run once from the tensor at address ``source`` to the one at ``target``."""
        ENTER(PREPARE, self._address, source, target, 0)
        self.run()

    def stop(self) -> None:
        """End the workers."""
        self.control[Control.STOP] = 1
        for bell in self._bells:
            bell.release()
        for worker in self._workers:
            worker.join(timeout=5.0)


_idle: defaultdict[int, list[Team]] = defaultdict(list)


@contextlib.contextmanager
def borrowed(threads: int) -> Iterator[Team]:
    """Lend a team of ``threads`` threads, the one that ran last if it is free."""
    idle = _idle[threads]
    try:
        team = idle.pop()
    except IndexError:
        team = Team(threads)
    yield team
    idle.append(team)  # not after an error: nobody knows what its workers are at


@atexit.register
def _dismiss() -> None:
    for teams in _idle.values():
        while teams:
            teams.pop().stop()


if hasattr(os, "register_at_fork"):
    # A fork copies no threads and may copy a half-open barrier.
    os.register_at_fork(after_in_child=_idle.clear)


def _serve(control: npt.NDArray[np.int64], thread: int, bell: threading.Semaphore, allowed: set[int]) -> None:
    address, seen = int(control.ctypes.data), 0
    while (seen := ENTER(WORK, address, thread, seen, PATIENCE_NS)) != STOPPED:
        bell.acquire()
        if allowed:  # placed once; from here on the system may move it
            _place(0, allowed)


def _place(thread: int, cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # a sandbox may forbid it: slower, not wrong
        os.sched_setaffinity(thread, cores)


def _find_getcpu() -> Callable[[], int] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        function: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
    except (OSError, AttributeError):
        return None
    return function


_GETCPU = _find_getcpu()


def _cores_from_here(threads: int) -> list[int]:
    """Return the caller's core and those after it, or nothing where threads cannot all have one of their own."""
    if _GETCPU is None:
        return []
    allowed, here = sorted(os.sched_getaffinity(0)), _GETCPU()
    if len(allowed) < threads or here not in allowed:
        return []
    first = allowed.index(here)
    return allowed[first:] + allowed[:first]
