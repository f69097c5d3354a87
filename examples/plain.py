"""A plain loop, with the session in its checkpoint: stop it anywhere, in the middle of an era too, and run it again.

    python examples/plain.py [--optimizer sgd] [--checkpoint plain.pt] [--stop 40]
"""

from __future__ import annotations

from pathlib import Path

import torch
from task import make_task, parse, tell
from torch.utils.data import DataLoader

import autoprune

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def main() -> None:
    options = parse(__doc__, optimizer="adamw", checkpoint="", stop="")
    torch.manual_seed(0)
    task = make_task(options.images)
    model, steps = task.model, len(task.images) // options.batch
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = OPTIMIZERS[options.optimizer]([{"params": weights, "weight_decay": 1e-4}, {"params": others}], lr=1e-3)
    session = autoprune.attach(
        model, optimizer, task.policy, steps_per_epoch=steps, epochs=options.epochs, method="campfire",
        example=task.example,
    )  # fmt: skip
    checkpoint = Path(options.checkpoint) if options.checkpoint else None
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        session.load_state_dict(saved["session"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    model.train()
    first = session.steps
    for epoch in range(first // steps, options.epochs):
        torch.manual_seed(epoch)  # the order of an epoch's images, for a resumed run too
        for step, (images, labels) in enumerate(DataLoader(task.images, options.batch, shuffle=True, drop_last=True)):
            if epoch * steps + step < first:
                continue
            optimizer.zero_grad()
            task.loss(model(images), labels).backward()
            optimizer.step()
            if options.stop and session.steps == int(options.stop):
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**saved, "session": session.state_dict()}, options.checkpoint)
                return
        print(f"epoch {epoch}: {session.phase}, sparsity {session.sparsity:.3f}")
    tell(session.finalize())
    if checkpoint is not None:
        torch.save({"model": model.state_dict()}, checkpoint)


if __name__ == "__main__":
    main()
