"""Where and in which precision a network's quality is computed fastest."""

from __future__ import annotations

import torch


def native_dtype(device: str = "cpu") -> torch.dtype:
    """Return bfloat16 where the device (``cpu`` or ``cuda``) multiplies it natively, float32 elsewhere.

    Emulation is slower than float32.
    """
    native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def compute_device() -> torch.device:
    """Return the GPU when there is one, else the CPU: where layer databases are built and policies scored.

    What a policy's network is deployed on is another matter; its latency is measured there.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
