"""Which devices a table can be measured on."""

from __future__ import annotations

from autoprune.core.errors import DeviceError


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have, or that networks are not deployed on.

    Raises:
        DeviceError: Saying which.
    """
    if device == "cpu":
        return
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise DeviceError("--device cuda: PyTorch finds no NVIDIA GPU on this machine; use --device cpu.")
        return
    raise DeviceError(f"--device {device!r}: sparse kernels exist for 'cpu' and 'cuda'.")
