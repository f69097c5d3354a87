"""A compiled model: attach to it as to any other.

    python examples/compiled.py [--backend inductor]
"""

from __future__ import annotations

import torch
from task import make_task, parse, tell
from torch.utils.data import DataLoader

import autoprune


def main() -> None:
    options = parse(__doc__, backend="inductor")
    task = make_task(options.images)
    model = torch.compile(task.model, backend=options.backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    session = autoprune.attach(
        model, optimizer, task.policy, steps_per_epoch=len(task.images) // options.batch, epochs=options.epochs,
        method="clicktrain",
    )  # fmt: skip
    model.train()
    for _ in range(options.epochs):
        for images, labels in DataLoader(task.images, options.batch, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            task.loss(model(images), labels).backward()
            optimizer.step()
    tell(session.finalize())


if __name__ == "__main__":
    main()
