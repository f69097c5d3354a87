"""Measures the constants of a device that the tile model does not know: matrix peak, bandwidths, launch."""

from __future__ import annotations

import torch

from autoprune.lut.gpu_facts import l2_bytes
from autoprune.lut.gpu_timer import Backend, CudaBackend, Subject, time_subject
from autoprune.lut.tile_model import DeviceModel, known_device

_GEMM = 8192
_STREAM_BYTES = 1 << 30
_REPLAYS = 3


def device_model() -> DeviceModel:
    """Return the constants of the present CUDA device: from the table, or measured in about a second."""
    name = torch.cuda.get_device_name()
    known = known_device(name)
    if known is not None:
        return known
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return probe(name, CudaBackend(), torch.device("cuda"), processors=processors)


def probe(
    name: str,
    backend: Backend,
    device: torch.device,
    *,
    processors: int,
    gemm: int = _GEMM,
    stream_bytes: int = _STREAM_BYTES,
) -> DeviceModel:
    """Return the constants of a device by large matrix products and copies.

    Args:
        name: For the record.
        backend: Times the calls.
        device: Where they run.
        processors: How many work side by side.
        gemm: Side of the square matrices.
        stream_bytes: Of a copy that no cache holds.
    """
    tflops = {
        dtype: 2.0 * gemm**3 / _product_us(backend, device, gemm, getattr(torch, dtype)) / 1e6
        for dtype in ("bfloat16", "float16", "float32")
    }
    near = max(1 << 20, backend.cache_bytes // 4)
    return DeviceModel(
        name=name,
        tflops=tflops,
        plain_tflops=tflops["float32"],
        bandwidth=2.0 * stream_bytes / _copy_us(backend, device, stream_bytes) * 1e6,
        l2_bandwidth=2.0 * near / _copy_us(backend, device, near) * 1e6,
        l2_bytes=l2_bytes() if device.type == "cuda" else backend.cache_bytes,
        processors=processors,
        launch_us=_fill_us(backend, device),
    )


def _product_us(backend: Backend, device: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    subject = Subject(lambda index: lambda: a @ b, 3 * size * size * a.element_size())
    return time_subject(subject, backend, launches=4, replays=_REPLAYS, cold=False).warm.p50


def _copy_us(backend: Backend, device: torch.device, size: int) -> float:
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    subject = Subject(lambda index: lambda: target.copy_(source), 2 * size)
    return time_subject(subject, backend, launches=4, replays=_REPLAYS, cold=False).warm.p50


def _fill_us(backend: Backend, device: torch.device) -> float:
    one = torch.zeros(1, device=device)
    return time_subject(Subject(lambda index: one.zero_, 4), backend, replays=_REPLAYS, cold=False).warm.p50
