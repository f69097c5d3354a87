"""White-box attacks: how a network judges images that were moved against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.tasks.data import DataSet, Split
from autoprune.tasks.outputs import main_output


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float, data: DataSet) -> Tensor:
    """Return images moved by the fast gradient sign method, ``x' = clamp(x + ε·sign(∇ₓL), 0, 1)``.

    Args:
        model: In eval mode; takes normalised images.
        pixels: (N, C, H, W) float32 in 0..1.
        labels: (N,) the true ones.
        epsilon: ε, in pixel units.
        data: Says how images are normalised.
    Returns:
        Pixels in 0..1, shape of ``pixels``.
    Source: Goodfellow et al., "Explaining and harnessing adversarial examples" (arXiv 1412.6572).
    """
    with torch.enable_grad():
        moved = pixels.detach().clone().requires_grad_(True)
        answers = main_output(model(data.scale(moved))).float()
        loss = nn.functional.cross_entropy(answers, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
    return (pixels + epsilon * gradient.sign()).clamp_(0.0, 1.0)


def attacked_accuracy(
    model: nn.Module, split: Split, data: DataSet, epsilons: Sequence[float], batch: int = 250
) -> dict[float, float]:
    """Return ε → top-1 accuracy in 0..1 on images attacked by FGSM; ε = 0 is the clean accuracy.

    Args:
        model: On the device that it is to run on; put in eval mode.
        split: Which images.
        data: Says how images are normalised.
        epsilons: In pixel units of 0..1.
        batch: Images a step.
    """
    model.eval()
    device = next(model.parameters()).device
    right = dict.fromkeys(epsilons, 0)
    for start in range(0, len(split), batch):
        pixels = split.images[start : start + batch].to(device, torch.float32) / 255.0
        labels = split.labels[start : start + batch].to(device)
        for epsilon in epsilons:
            moved = fgsm(model, pixels, labels, epsilon, data) if epsilon > 0 else pixels
            with torch.no_grad():
                answers = main_output(model(data.scale(moved))).argmax(1)
            right[epsilon] += int((answers == labels).sum())
    return {epsilon: count / len(split) for epsilon, count in right.items()}
