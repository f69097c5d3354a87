"""Autocast, a gradient scaler and accumulated gradients; a step that the scaler skips does not count.

    python examples/mixed_precision.py [--accumulate 2]
"""

from __future__ import annotations

import torch
from task import make_task, parse, tell
from torch.utils.data import DataLoader

import autoprune


def main() -> None:
    options = parse(__doc__, accumulate="2")
    parts = int(options.accumulate)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    task = make_task(options.images)
    model = task.model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    session = autoprune.attach(
        model, optimizer, task.policy, steps_per_epoch=len(task.images) // (options.batch * parts),
        epochs=options.epochs, method="clicktrain", example=task.example,
    )  # fmt: skip
    model.train()
    for _ in range(options.epochs):
        loader = DataLoader(task.images, options.batch, shuffle=True, drop_last=True)
        for number, (images, labels) in enumerate(loader, start=1):
            with torch.autocast(device, dtype):
                loss = task.loss(model(images.to(device)).float(), labels.to(device)) / parts
            scaler.scale(loss).backward()
            if number % parts == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    tell(session.finalize())


if __name__ == "__main__":
    main()
