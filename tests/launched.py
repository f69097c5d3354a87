"""Rows of a GPU measured with a fake driver: a timer makes every launch, which compiles what it needs and runs nothing.

``python launched.py ARCH CACHE [few]`` prints the kernels that had to be compiled and those found in Triton's cache.
The operators' CPU forms are replaced by their CUDA ones; tensors stay on the CPU; nothing reads what kernels "wrote".
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import torch


class NoClock:
    """Makes every call, and says that it took a millisecond."""

    cache_bytes = 1 << 20

    def warm_up(self, calls: Sequence[Callable[[], object]]) -> None:
        for call in calls:
            call()

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        self.warm_up(calls)
        return lambda: 1e3 * len(calls)

    launch = capture

    def flush(self) -> None:
        pass


def on_cuda_kernels() -> None:
    """Let the operators launch Triton kernels on CPU tensors."""
    from autoprune.kernels.triton import ops, spmm_op

    ops.ell_repack.register_kernel("cpu")(ops._repack_cuda)
    ops.ell_pad.register_kernel("cpu")(ops._pad_cuda)
    ops.ell_conv.register_kernel("cpu")(ops._conv_cuda)
    ops.ell_conv_backward.register_kernel("cpu")(ops._conv_backward_cuda)
    for operator in (spmm_op._sparse_conv, spmm_op._sparse_conv_backward):
        operator.register_kernel("cpu")(operator._backend_fns["cuda"])


def measure(few: bool) -> list[str]:
    """Measure forward and training rows of several layers, or a few forward ones; return the kernels of the rows."""
    from autoprune.core.choices import Dense, Fine, Pattern
    from autoprune.core.layers import LayerSpec
    from autoprune.lut.context import Context
    from autoprune.lut.gpu_families import families
    from autoprune.lut.gpu_rows import GpuBench
    from autoprune.lut.row import Row
    from autoprune.lut.tile_model import DEVICES

    layers = [
        LayerSpec("a", "conv", (64, 40, 3, 3), padding=(1, 1), input_hw=(9, 9), output_hw=(9, 9)),
        LayerSpec("b", "conv", (128, 64, 3, 3), (2, 2), (1, 1), input_hw=(9, 9), output_hw=(5, 5)),
        LayerSpec("c", "conv", (96, 128, 1, 1), input_hw=(4, 4), output_hw=(4, 4)),
        LayerSpec("d", "linear", (24, 40)),
    ]
    kernels = []
    for direction in ("forward",) if few else ("forward", "training"):
        for batch in (1,) if few else (1, 3):
            context = Context(device="cpu", batch=batch, dtype="bfloat16", cache="network", direction=direction)
            for name in ("ell",) if few else ("ell", "spmm"):
                known = {key: family for key, family in families().items() if key in ("dense", name)}
                bench = GpuBench(context, DEVICES[0], NoClock(), known)  # type: ignore[arg-type]
                slow = Row(p10=1e9, p50=1e9, p90=1e9, weight_bytes=1, kernel="dense")
                for layer in layers:
                    wanted = [Pattern(count=8, kernels=0.5, share=(32, 8)), Fine(keep=0.02)]
                    choices = [Dense(), *(choice for choice in wanted if choice.fits(layer))]
                    for key, row in bench.measure(layer, choices, slow).items():
                        kernels.append(f"{direction} {key[1]} {row.kernel if isinstance(row, Row) else row}")
    return kernels


def main(arch: int, cache: str, few: bool) -> None:
    """Print as JSON what was compiled, what was found, and the rows."""
    os.environ["TRITON_CACHE_DIR"] = cache
    warnings.simplefilter("ignore")  # of operators that are registered again
    from triton import knobs

    from autoprune.kernels.triton.compile_only import fake_device
    from autoprune.kernels.triton.launching import compiling

    found: dict[str, list[str]] = {"compiled": [], "cached": []}

    def listen(*, src: object, cache_hit: bool, **rest: object) -> None:
        found["cached" if cache_hit else "compiled"].append(str(src.name))  # type: ignore[attr-defined]

    knobs.compilation.listener = listen
    on_cuda_kernels()
    with fake_device(arch), compiling():
        found["rows"] = measure(few)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["few"])
