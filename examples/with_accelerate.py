"""A Hugging Face Accelerate loop: attach to what ``prepare`` returned.

    python examples/with_accelerate.py [--accumulate 2]        or: accelerate launch examples/with_accelerate.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from task import make_task, parse, tell
from torch.utils.data import DataLoader

import autoprune


def main() -> None:
    options = parse(__doc__, accumulate="2")
    accelerator = Accelerator(gradient_accumulation_steps=int(options.accumulate))
    task = make_task(options.images)
    loader = DataLoader(task.images, options.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(task.model, optimizer, loader)
    session = autoprune.attach(
        model, optimizer, task.policy, steps_per_epoch=len(loader) // int(options.accumulate), epochs=options.epochs,
        method="campfire", example=task.example,
    )  # fmt: skip
    accelerator.register_for_checkpointing(session)
    model.train()
    for _ in range(options.epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(task.loss(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
    report = session.finalize()
    if accelerator.is_main_process:
        tell(report)


if __name__ == "__main__":
    main()
