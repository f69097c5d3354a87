"""A running average of the weights beside the training.

The average remembers weights from before they were removed, so it is masked before it is judged or saved.

    python examples/average.py
"""

from __future__ import annotations

import torch
from task import make_task, parse, tell
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import autoprune


def main() -> None:
    options = parse(__doc__, decay="0.99")
    task = make_task(options.images)
    model = task.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session = autoprune.attach(
        model, optimizer, task.policy, steps_per_epoch=len(task.images) // options.batch, epochs=options.epochs,
        method="campfire", example=task.example,
    )  # fmt: skip
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(float(options.decay)))
    model.train()
    for _ in range(options.epochs):
        for images, labels in DataLoader(task.images, options.batch, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            task.loss(model(images), labels).backward()
            optimizer.step()
            average.update_parameters(model)
    tell(session.finalize())
    session.mask_copy(average)
    weights = dict(average.module.named_parameters())
    masks = session.masks
    zeros = sum(int((weights[f"{name}.weight"] == 0).sum()) for name in masks)
    print(f"average: sparsity {zeros / sum(mask.numel() for mask in masks.values()):.3f}")


if __name__ == "__main__":
    main()
