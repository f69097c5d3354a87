"""What the examples share: a network, the images inside the package, and a policy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autoprune.core.policy import Policy
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.tasks.data import load_data
from autoprune.tasks.models import build_model
from autoprune.trainers.session import SessionReport

CHOICES = ["pattern(count=8,entries=4,kernels=0.5,share=1x1)", "fine(keep=0.5)"]


@dataclass(frozen=True)
class Task:
    """What a training loop starts from; in real use the policy is ``Policy.load("runs/NAME/policy.json")``."""

    model: nn.Module
    images: TensorDataset
    policy: Policy
    example: Tensor
    loss: nn.Module


def parse(description: str | None, **more: str) -> argparse.Namespace:
    """Return the options of an example: its length, and its own by name and default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()


def make_task(images: int) -> Task:
    """Return ResNet-20, the first ``images`` of the training images, and half of the weights in patterns of four."""
    data = load_data("fashion-mnist")
    model = build_model("resnet20", 1, data.classes)
    example = data.normalize(data.validation.images[:1])
    policy = uniform_policy(trace(model, example), CHOICES, model="resnet20")
    pairs = TensorDataset(data.normalize(data.train.images[:images]), data.train.labels[:images])
    return Task(model, pairs, policy, example, nn.CrossEntropyLoss())


def tell(report: SessionReport) -> None:
    """Print what a training came to."""
    counts = report.sparsity
    print(f"{report.method}: {report.steps} steps, masks final: {report.finished}")
    print(f"sparsity {counts.prunable_sparsity:.3f}, {counts.conv_compression:.2f}x convolution weights")
