"""What the driver says of a GPU: its version, its present clock, its cache. Nothing is set or changed."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

_SECONDS = 5.0
_DEFAULT_L2_BYTES = 50 << 20


def ask_driver(field: str) -> str | None:
    """Return one field of ``nvidia-smi --query-gpu`` for the first GPU, or None where it cannot be had."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


@cache
def driver_version() -> str:
    """Return the driver's version, ``unknown`` where the driver's tool is absent."""
    return ask_driver("driver_version") or "unknown"


def sm_clock_mhz() -> float | None:
    """Return the present clock of the multiprocessors in MHz: from the driver's library, its tool, or None."""
    import torch

    try:
        return float(torch.cuda.clock_rate())
    except (RuntimeError, ImportError, AssertionError, ValueError):  # no GPU, or the driver's Python library is absent
        pass
    text = ask_driver("clocks.sm")
    try:
        return float(text) if text is not None else None
    except ValueError:  # "[N/A]" on devices that hide it
        return None


def l2_bytes() -> int:
    """Return the size of the present GPU's second-level cache; 50 MiB where PyTorch does not tell."""
    import torch

    if not torch.cuda.is_available():
        return _DEFAULT_L2_BYTES
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or _DEFAULT_L2_BYTES
