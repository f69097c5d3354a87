"""A network as an ONNX file, checked against onnxruntime, and timed there beside the dense one.

ONNX knows no sparse convolution: zeros stay zeros in dense tensors, only what left the shapes makes the file smaller
and the network faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.export.program import Exported, check_outputs, refuse_converted, write_bytes
from autoprune.kernels.dense import to_onnx


def export_onnx(model: nn.Module, images: Tensor, path: str | Path) -> Exported:
    """Write a network as ONNX for any number of images, and check it.

    Args:
        model: float32, on the CPU; not modified.
        images: (N, C, H, W) float32, N ≥ 2: what its outputs are compared on.
        path: Of the file.
    Raises:
        ModelError: The network cannot be exported, or it is a converted one.
        MeasurementError: The file's outputs are not the network's.
    """
    refuse_converted(model, "ONNX")
    try:
        content, any_batch = to_onnx(model, images[:2], any_batch=True), True
    except ModelError:
        # Code that reads its batch size as a number exports for one size alone.
        content, any_batch = to_onnx(model, images[:1]), False
    run = onnx_runner(content)
    parts = [images] if any_batch else [images[index : index + 1] for index in range(len(images))]
    difference = check_outputs(model, images, np.concatenate([run(part) for part in parts]), "onnxruntime")
    path = Path(path)
    write_bytes(path, content)
    return Exported(path, len(content), any_batch, difference)


def onnx_runner(content: bytes, threads: int = 1) -> Callable[[Tensor], np.ndarray]:
    """Return a function that runs an ONNX network in onnxruntime: images in, outputs out, float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin on after a run would take cores from whatever is timed beside it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name, out = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(images: Tensor) -> np.ndarray:
        result: np.ndarray = session.run([out], {name: np.ascontiguousarray(images.detach().numpy())})[0]
        return result

    return run


def onnx_cases(files: Mapping[str, bytes], images: Tensor, threads: int = 1) -> dict[str, Callable[[], object]]:
    """Return name → a call that runs that ONNX network on the images, to be timed in turn."""

    def call(content: bytes) -> Callable[[], object]:
        run = onnx_runner(content, threads)
        return lambda: run(images)

    return {name: call(content) for name, content in files.items()}
