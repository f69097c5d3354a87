"""The threads that run a program together: the caller, and workers that sleep while nothing is to do."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

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
        self._bells = [threading.Semaphore(0) for _ in range(int(control[Control.THREADS]) - 1)]
        self._workers = [
            threading.Thread(target=_serve, args=(control, keep, i, bell, epoch), daemon=True, name=f"kernel-{i}")
            for i, bell in enumerate(self._bells, start=1)
        ]
        for worker in self._workers:
            worker.start()

    def run(self) -> None:
        """Do what the control block asks for; returns when all threads are done."""
        if self._workers:
            asleep = ENTER(ANNOUNCE, self._address, 0, 0, 0)
            for index, bell in enumerate(self._bells):
                if asleep >> (index + 1) & 1:
                    bell.release()
        ENTER(RUN, self._address, 0, 0, 0)

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
    control: npt.NDArray[np.int64], keep: Sequence[object], thread: int, bell: threading.Semaphore, seen: int
) -> None:
    address = int(control.ctypes.data)
    while (seen := ENTER(WORK, address, thread, seen, PATIENCE_NS)) != STOPPED:
        bell.acquire()
    del keep
