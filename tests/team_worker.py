"""One process of a training on several: run by torchrun, or by the tests with its environment.

    team_worker.py cli ARGUMENTS…                  the command line, with a small network behind the name ``small``
    team_worker.py checks FOLDER PORT ARGUMENTS…   gradients and masks, written to FOLDER/RANK.json; then the same

With KILL_EPOCH set, rank 1 kills itself at the start of that epoch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import autoprune.trainers.run as training
from autoprune.cli.main import run
from autoprune.core.choices import Fine, parse_choice
from autoprune.tasks.data import DataSet, Split
from autoprune.tasks.models import MODELS
from autoprune.trainers import loop
from autoprune.trainers.session import Session, attach
from autoprune.trainers.team import joined

STEPS, EPOCHS = 2, 4
CHOICES = {"second": parse_choice("pattern(count=4,entries=4,kernels=0.5,share=1x1)"), "fc": Fine(0.5)}


class SmallNet(nn.Module):
    def __init__(self, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(self.first(x).relu())).relu()
        out: Tensor = self.fc(self.drop(x.mean((2, 3))))
        return out


def replica(method: str, **settings: object) -> tuple[DistributedDataParallel, torch.optim.Optimizer, Session]:
    torch.manual_seed(0)
    model = DistributedDataParallel(SmallNet().to(memory_format=torch.channels_last), bucket_cap_mb=0.002)
    model.module.drop.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    session = attach(
        model, optimizer, CHOICES, steps_per_epoch=STEPS, epochs=EPOCHS, method=method, settings=settings or None
    )
    return model, optimizer, session


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(number * 10 + rank)
    images, labels = torch.randn(4, 1, 6, 6, generator=generator), torch.randint(0, 2, (4,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def compare_compressed(rank: int) -> dict[str, Any]:
    """Train twice on the same batches, with dense and with packed gradients; count what the packed one sends."""
    dense, dense_optimizer, _ = replica("clicktrain")
    packed, packed_optimizer, session = replica("clicktrain")
    compression = session.compress_gradients()
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[-1] += tensor.numel() * tensor.element_size()
        return real(tensor, *args, **kwargs)

    frozen, differences = [], []
    for number in range(STEPS * EPOCHS):
        frozen.append(session.frozen)
        step(dense, dense_optimizer, number, rank)
        sent.append(0)
        dist.all_reduce = counted
        step(packed, packed_optimizer, number, rank)
        dist.all_reduce = real
        pairs = zip(dense.parameters(), packed.parameters(), strict=True)
        differences.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    parameters = sum(p.numel() for p in packed.parameters())
    removed = sum(int((~mask).sum()) for mask in session.masks.values())
    return {
        "frozen": frozen, "sent": sent, "differences": differences, "parameters": parameters,
        "kept": parameters - removed, "counted": [compression.sent_bytes, compression.dense_bytes],
    }  # fmt: skip


def disagree(rank: int, method: str) -> list[list[int]]:
    """Let rank 1 see other weights than rank 0 when masks are decided; return the masks that it ends with."""
    model, optimizer, session = replica(method)
    for number in range(STEPS * EPOCHS):
        if rank == 1:
            with torch.no_grad():
                model.module.second.weight.add_(0.1 * torch.randn_like(model.module.second.weight))
        step(model, optimizer, number, rank)
    return [mask.int().flatten().tolist() for mask in session.masks.values()]


def make_data() -> DataSet:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.randint(0, 2, (count,), generator=generator)
        images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator) + 100 * labels[:, None, None, None]
        return Split(images.to(torch.uint8), labels)

    return DataSet("fashion-mnist", 2, 0.45, 0.3, split(256), split(64), split(32), full=False)


def small_command(arguments: list[str]) -> int:
    MODELS._items["small"] = SmallNet
    training.load_data = lambda name, data_dir=None, *, full=False: make_data()  # type: ignore[assignment]
    training._deploy = lambda *args: None  # type: ignore[assignment, return-value]
    train_epoch = loop._train_epoch

    def killed(*args: Any) -> float:
        if os.environ.get("KILL_EPOCH") == str(args[3]) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return train_epoch(*args)

    loop._train_epoch = killed
    return run(arguments)


def main() -> int:
    mode, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if mode == "cli":
        return small_command(arguments)
    with joined("cpu") as team:
        record = {
            "compressed": compare_compressed(team.rank),
            "masks": {method: disagree(team.rank, method) for method in ("clicktrain", "campfire", "magnitude")},
        }
    Path(arguments[0], f"{team.rank}.json").write_text(json.dumps(record))
    os.environ["MASTER_PORT"] = arguments[1]  # the first group's store is still there, and remembers it
    return small_command(arguments[2:])


if __name__ == "__main__":
    sys.exit(main())
