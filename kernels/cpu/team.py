"""The threads that run a program together: the caller, and workers that sleep while nothing is to do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from autoprune.kernels.cpu.engine import ANNOUNCE, ENTER, PREPARE, RUN, STOPPED, WORK
from autoprune.kernels.cpu.rows import Control

PATIENCE_NS = 200_000  # how long a worker spins for the next run before it sleeps


class Team:
    """``threads - 1`` daemon threads that serve the runs announced in a control block."""

    def __init__(self, control: npt.NDArray[np.int64], keep: Sequence[object]) -> None:
        """Start the workers.

        Args:
            control: Block laid out as in ``rows.Control``; used by this team alone.
            keep: What the instructions point to; lives as long as a worker may touch it.
        """
        self._control = control
        self._address = int(control.ctypes.data)
        self.process = os.getpid()
        epoch = int(control[Control.EPOCH])
        self._allowed: set[int] = set()  # cores of the thread that called last
        self._bells = [threading.Semaphore(0) for _ in range(int(control[Control.THREADS]) - 1)]
        self._workers = [
            threading.Thread(
                target=_serve, args=(control, keep, i, bell, epoch, self._allowed), daemon=True, name=f"kernel-{i}"
            )
            for i, bell in enumerate(self._bells, start=1)
        ]
        for worker in self._workers:
            worker.start()

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
        """End the workers; in a forked child, which has none, do nothing."""
        if os.getpid() != self.process:
            return
        self._control[Control.STOP] = 1
        for bell in self._bells:
            bell.release()
        for worker in self._workers:
            worker.join(timeout=5.0)


def _serve(
    control: npt.NDArray[np.int64],
    keep: Sequence[object],
    thread: int,
    bell: threading.Semaphore,
    seen: int,
    allowed: set[int],
) -> None:
    address = int(control.ctypes.data)
    while (seen := ENTER(WORK, address, thread, seen, PATIENCE_NS)) != STOPPED:
        bell.acquire()
        if allowed:  # placed once; from here on the system may move it
            _place(0, allowed)
    del keep


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
