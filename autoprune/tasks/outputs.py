"""What a network returns, and whether it is what a classifier must return."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError

# Names under which networks give their main output beside others.
_MAIN = ("logits", "out")


def main_output(result: object) -> Tensor:
    """Return the main one of a network's outputs: its tensor, the first of several, or the one called logits or out.

    Auxiliary outputs, such as GoogLeNet's while it trains, stand behind the main one and are left out.

    Raises:
        ModelError: There is no tensor among them.
    """
    if isinstance(result, Tensor):
        return result
    parts: list[object] = []
    if isinstance(result, Mapping):
        parts = [result[key] for key in _MAIN if key in result] + list(result.values())
    elif isinstance(result, tuple | list):
        parts = [*(getattr(result, key) for key in _MAIN if hasattr(result, key)), *result]
    tensor = next((part for part in parts if isinstance(part, Tensor)), None)
    if tensor is None:
        raise ModelError(f"the model returns a {type(result).__name__} without a tensor; want scores (N, classes).")
    return tensor


def check_logits(model: nn.Module, example: Tensor, classes: int, name: str) -> None:
    """Refuse a network that is no classifier of so many classes.

    Args:
        model: In eval mode.
        example: Images (N, C, H, W) float32.
        classes: Of the data set.
        name: Of the network, for messages.
    Raises:
        ModelError: It fails on the images, or its outputs have another shape or are not finite.
    """
    device = next((parameter.device for parameter in model.parameters()), example.device)
    try:
        with torch.inference_mode():
            result = model(example.to(device))
    except Exception as error:  # foreign code: whatever it raises means that it cannot judge images
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        size = "x".join(str(int(length)) for length in example.shape[1:])
        raise ModelError(
            f"model '{name}' fails on images of {size}: {reason[:200]}; it must take one batch of images alone."
        ) from error
    logits = main_output(result)
    if logits.dim() != 2 or logits.shape[1] < classes:
        raise ModelError(
            f"model '{name}' returns {tuple(logits.shape)} for {len(example)} image(s), want (N, {classes}): one score "
            f"for each of the data's {classes} classes; give the number by --model-args."
        )
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"model '{name}' returns NaN or infinite scores; its weights are damaged or of another model.")
