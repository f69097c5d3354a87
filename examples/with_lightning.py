"""A Lightning module that trains under a policy; the session travels in Lightning's own checkpoints.

    pip install lightning; python examples/with_lightning.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from task import Task, make_task, parse, tell
from torch import Tensor
from torch.utils.data import DataLoader

import autoprune


class Pruned(lightning.LightningModule):
    """A network, and the session that prunes it."""

    def __init__(self, task: Task, steps_per_epoch: int, epochs: int) -> None:
        super().__init__()
        self.task, self.network = task, task.model
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.saved: dict[str, Any] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9)
        self.session = autoprune.attach(
            self.network, optimizer, self.task.policy, steps_per_epoch=self.steps_per_epoch, epochs=self.epochs,
            method="clicktrain", example=self.task.example,
        )  # fmt: skip
        if self.saved is not None:
            self.session.load_state_dict(self.saved)
        return optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.task.loss(self.network(images), labels)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["autoprune"] = self.session.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["autoprune"]  # Lightning loads before it asks for the optimizer


def main() -> None:
    options = parse(__doc__)
    task = make_task(options.images)
    loader = DataLoader(task.images, options.batch, shuffle=True, drop_last=True)
    module = Pruned(task, len(loader), options.epochs)
    trainer = lightning.Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    tell(module.session.finalize())


if __name__ == "__main__":
    main()
