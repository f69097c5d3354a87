"""The precision a CPU multiplies fastest without emulation."""

from __future__ import annotations

import torch


def native_dtype() -> torch.dtype:
    """Return bfloat16 where the CPU multiplies it natively, float32 elsewhere (emulation is slower)."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
