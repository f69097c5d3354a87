"""The processes of one training: one alone, or several under torchrun that share every batch.

Rank 0 leads: it writes the files, tells the progress and judges the model; the others only compute.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autoprune.core.errors import AutopruneError, DeviceError
from autoprune.core.launch import launched_rank, launched_size

_GRACE_SECONDS = 3.0
_LOST = (
    "another process of this training has ended, so it cannot go on; the same command resumes from the last checkpoint."
)
# How gloo and NCCL say that the other end has gone.
_GONE = ("onnection closed", "onnection reset", "onnection refused", "roken pipe", "imed out", "NCCL", "remote process")


class PeerLost(AutopruneError):
    """Another process of the training has ended before its time."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those of one training.

    Attributes:
        rank: 0 leads.
        size: Number of processes; 1 outside torchrun.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Team:
        """Return the process group's, or a single process."""
        if not (dist.is_available() and dist.is_initialized()):
            return Team()
        return Team(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process writes files and tells the progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is trained: data-parallel where there are several processes."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def share(self, index: Tensor) -> Tensor:
        """Return this process's part of a batch: every ``size``-th of its images."""
        return index if self.size == 1 else index[self.rank :: self.size]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        if self.size == 1:
            return value
        value = value / self.size
        dist.all_reduce(value)
        return value

    def from_lead(self, value: float, device: torch.device) -> float:
        """Return rank 0's number on every process."""
        if self.size == 1:
            return value
        sent = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(sent, 0)
        return float(sent)

    def bytes_from_lead(self, data: bytes | None, device: torch.device) -> bytes | None:
        """Return rank 0's bytes on every process; None stays None."""
        if self.size == 1:
            return data
        length = int(self.from_lead(-1.0 if data is None else float(len(data)), device))
        if length < 0:
            return None
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(length, dtype=torch.uint8)
        sent = sent.to(device)
        dist.broadcast(sent, 0)
        return sent.cpu().numpy().tobytes()


@contextlib.contextmanager
def watched(team: Team) -> Iterator[None]:
    """Turn what a collective operation raises when another process has ended into one line.

    Raises:
        PeerLost: Instead of the back end's own error.
    """
    try:
        yield
    except RuntimeError as error:
        told_gone = isinstance(error, dist.DistError) or any(text in str(error) for text in _GONE)
        if team.size == 1 or not told_gone:
            raise
        raise PeerLost(_LOST) from None


def agree(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Overwrite boolean tensors by those of the group's first process, all in one message.

    Args:
        tensors: Of the same shapes on every process.
        group: Of the data-parallel model.
    """
    if not tensors:
        return
    device = tensors[0].device
    flat = torch.cat([tensor.to(device).flatten() for tensor in tensors]).to(torch.uint8)
    dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


@contextlib.contextmanager
def joined(device: str) -> Iterator[Team]:
    """Join the processes that torchrun started, by NCCL on GPUs and gloo on CPUs; alone without it.

    Args:
        device: ``cpu`` or ``cuda``; of several GPUs each process takes the one of its local rank.
    Raises:
        DeviceError: More processes on this machine than GPUs.
        PeerLost: Another process ended meanwhile.
    """
    team = Team(launched_rank(), launched_size())
    if team.size == 1:
        yield team
        return
    if device == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise DeviceError(f"--device cuda: this machine has {count} GPUs for process number {local}; start fewer.")
        torch.cuda.set_device(local)
    with _told_to_stop(team.rank), watched(team):
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        yield team
        dist.destroy_process_group()


@contextlib.contextmanager
def _told_to_stop(rank: int) -> Iterator[None]:
    """End with the line of a lost peer when the launcher says to stop, which it does when another process ended.

    A process that waits inside a collective operation runs no Python; a thread then says it and leaves.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise PeerLost(_LOST)

    def wait() -> None:
        while (told := os.read(reader, 1)) and told[0] != signal.SIGTERM:
            pass
        if told and not over.wait(_GRACE_SECONDS):
            print(f"autoprune: rank {rank}: {_LOST}", file=sys.stderr, flush=True)
            os._exit(PeerLost.exit_code)

    over = threading.Event()
    before, wakeup = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(writer)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
        signal.signal(signal.SIGTERM, before)
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is about to say why it ends
        raise
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        thread.join()
        os.close(reader)
