"""Hugging Face's Trainer: attach to the optimizer that it is given; a callback keeps the session in its checkpoints.

    python examples/with_trainer.py [--out DIR] [--resume DIR/checkpoint-64]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from task import make_task, parse, tell
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import autoprune
from autoprune.trainers.session import Session


class KeepSession(TrainerCallback):
    """Saves the session beside the Trainer's own files, and takes it up from there.

    Args:
        session: Of the training.
        resume: Checkpoint that the Trainer goes on from; empty for none.
    """

    def __init__(self, session: Session, resume: str) -> None:
        self.session, self.resume = session, resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.resume:
            self.session.load_state_dict(torch.load(Path(self.resume) / "session.pt", weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.session.state_dict(), folder / "session.pt")


def collate(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a batch by the names of the network's own arguments."""
    images, labels = zip(*pairs, strict=True)
    return {"x": torch.stack(images), "labels": torch.stack(labels)}


def main() -> None:
    options = parse(__doc__, out="", resume="")
    task = make_task(options.images)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    steps = len(task.images) // options.batch
    session = autoprune.attach(
        task.model, optimizer, task.policy, steps_per_epoch=steps, epochs=options.epochs, method="campfire",
        example=task.example,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=options.out or tempfile.mkdtemp(), num_train_epochs=options.epochs, report_to=[], use_cpu=True,
        per_device_train_batch_size=options.batch, dataloader_drop_last=True, remove_unused_columns=False,
        save_strategy="epoch", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        task.model, arguments, data_collator=collate, train_dataset=task.images, optimizers=(optimizer, None),
        compute_loss_func=lambda outputs, labels, **_: task.loss(outputs, labels),
        callbacks=[KeepSession(session, options.resume)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=options.resume or None)
    tell(session.finalize())


if __name__ == "__main__":
    main()
