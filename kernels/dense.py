"""The dense network in every form a user could run instead: the references all ratios are taken against.

Each form is a callable that runs the network once on the example, as its user would call it; a form this machine cannot
run is a string that says why.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.kernels.convert import convert
from autoprune.kernels.deployed import PlannedModel
from autoprune.kernels.fold import fold_batchnorm

REFERENCES = ("plan", "torch-folded", "torch-channels-last", "torch-jit-optimized", "torch-compile", "onnxruntime")

Runner = Callable[[], object]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch's own kernels use ``threads`` threads, and restore the setting afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Keep a compiler's own warnings, and those that ``loggers`` would print, from the user."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in found:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(found, levels, strict=True):
                logger.setLevel(level)


def dense_references(
    model: nn.Module,
    example: Tensor,
    threads: int = 1,
    *,
    compile: bool = True,
    only: Collection[str] = REFERENCES,
    built: Callable[[str, float], None] | None = None,
) -> dict[str, Runner | str]:
    """Return every dense execution of ``model``, by the names in ``REFERENCES``.

    Run the callables under ``torch_threads(threads)`` (``lut.measure.interleaved_us`` does).

    Args:
        model: float32, on the CPU, taken as in eval mode; not modified.
        example: (N, C, H, W) float32.
        threads: Threads each form may use.
        compile: Include ``torch-compile``, which takes tens of seconds to build.
        only: Names of the forms to build.
        built: Called with the name and the build seconds of each form.
    """
    makers: dict[str, Callable[[], Runner | str]] = {
        "plan": lambda: _plan(model, example, threads),
        "torch-folded": lambda: _folded(model, example, torch.contiguous_format),
        "torch-channels-last": lambda: _folded(model, example, torch.channels_last),
        "torch-jit-optimized": lambda: _jit(model, example),
        "torch-compile": lambda: _compiled(model, example) if compile else "left out on request",
        "onnxruntime": lambda: _onnxruntime(model, example, threads),
    }
    found: dict[str, Runner | str] = {}
    for name in [name for name in REFERENCES if name in only]:
        start = time.perf_counter()
        with torch_threads(threads), torch.no_grad():
            try:
                found[name] = makers[name]()
            except Exception as error:  # each form is somebody else's compiler; one that fails is reported as absent
                first_line = (str(error).splitlines() or [""])[0]
                found[name] = f"{type(error).__name__}: {first_line[:160]}"
        if built is not None and not isinstance(found[name], str):
            built(name, time.perf_counter() - start)
    return found


def runners(references: Mapping[str, Runner | str]) -> dict[str, Runner]:
    """Return the references this machine can run."""
    return {name: run for name, run in references.items() if not isinstance(run, str)}


def _plan(model: nn.Module, example: Tensor, threads: int) -> Runner | str:
    deployed = convert(model, {}, example, threads=threads)
    if not isinstance(deployed, PlannedModel):
        return f"not one flat plan: {getattr(deployed, 'refusal', '')}"
    return lambda: deployed(example)


def _format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor


def _folded(model: nn.Module, example: Tensor, memory_format: torch.memory_format) -> Runner:
    network = fold_batchnorm(model).to(memory_format=memory_format)
    x = _format(example, memory_format)

    def run() -> object:
        with torch.inference_mode():
            return network(x)

    run()
    return run


def _jit(model: nn.Module, example: Tensor) -> Runner:
    x = _format(example, torch.channels_last)
    with _quiet():  # TorchScript is announced as deprecated; it is still a form users deploy
        network = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
        frozen = torch.jit.freeze(torch.jit.trace(network, x))  # type: ignore[no-untyped-call]
        optimized = torch.jit.optimize_for_inference(frozen)

        def run() -> object:
            with torch.inference_mode():
                return optimized(x)

        for _ in range(3):  # the profiling executor settles after a few runs
            run()
    return run


def _compiled(model: nn.Module, example: Tensor) -> Runner | str:
    import os

    from torch._inductor import config

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        return f"no C++ compiler ({compiler}) on this machine"
    network = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    x = _format(example, torch.channels_last)
    with _quiet("torch.utils.cpp_extension", "torch._inductor"):  # it warns that there is no CUDA
        # A second batch size would otherwise compile for any batch size, which is slower and fails when frozen.
        # Forms built before this one in the process count against the compiler's limit of recompilations.
        torch._dynamo.reset()
        compiled = torch.compile(network, dynamic=False)

        def run() -> object:
            with torch.no_grad():
                return compiled(x)

        # Freezing folds BatchNorm and packs the weights, at compile time, which is the first call.
        with config.patch(freezing=True):
            run()
            run()
    return run


def _onnxruntime(model: nn.Module, example: Tensor, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin on after a run would take cores from whatever is timed beside it; within a run they still spin.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(to_onnx(model, example), options, providers=["CPUExecutionProvider"])
    name, out_name = session.get_inputs()[0].name, session.get_outputs()[0].name
    x = np.ascontiguousarray(example.detach().numpy())
    out = np.empty(session.run([out_name], {name: x})[0].shape, np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    target = onnxruntime.OrtValue.ortvalue_from_numpy(out)
    binding.bind_ortvalue_output(out_name, target)

    def plain() -> object:
        return session.run([out_name], {name: x})

    def bound() -> object:
        session.run_with_iobinding(binding)
        return target.numpy()

    return min((plain, bound), key=_seconds)


def to_onnx(model: nn.Module, example: Tensor, *, any_batch: bool = False) -> bytes:
    """Return the model as ONNX.

    Args:
        model: Not modified; exported in eval mode.
        example: (N, C, H, W) float32.
        any_batch: Leave the number of images open; else it is fixed to the example's.
    Raises:
        ModelError: It cannot be exported.
    """
    shapes = ({0: torch.export.Dim.DYNAMIC},) if any_batch else None
    with _quiet("torch.onnx", "onnxscript", "onnx_ir"):  # the exporter warns about its own dependencies
        try:
            program = torch.onnx.export(
                copy.deepcopy(model).eval(), (example,), dynamo=True, verbose=False, dynamic_shapes=shapes
            )
            assert program is not None
            content: bytes = program.model_proto.SerializeToString()
        except Exception as error:
            # The exporter's own words are several coloured lines of advice; the cause is behind them.
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            first_line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise ModelError(f"the model cannot be exported to ONNX: {first_line[:160]}") from None
    return content


def _seconds(run: Runner) -> float:
    """Return the best of a few timings, enough to tell two ways of calling one runtime apart."""
    run()
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
