"""A loop of one's own on several processes; once masks are final, only the gradients of kept weights are sent.

    torchrun --nproc-per-node 2 examples/distributed.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from task import make_task, parse, tell
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import autoprune


def main() -> None:
    options = parse(__doc__)
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    task = make_task(options.images)
    model = DistributedDataParallel(task.model.to(device), device_ids=[local] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = DistributedSampler(task.images, drop_last=True)
    loader = DataLoader(task.images, options.batch, sampler=sampler, drop_last=True)
    session = autoprune.attach(
        model, optimizer, task.policy, steps_per_epoch=len(loader), epochs=options.epochs, method="clicktrain",
        example=task.example,
    )  # fmt: skip
    traffic = session.compress_gradients()
    model.train()
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            task.loss(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
    report = session.finalize()
    if dist.get_rank() == 0:
        tell(report)
        print(f"sent {traffic.sent_bytes / traffic.dense_bytes:.3f} of the bytes of dense gradients")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
