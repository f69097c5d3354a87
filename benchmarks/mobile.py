"""Dense mobile networks at 224 × 224, one image: our plan by strips, our plan by whole maps, and onnxruntime, one run.

    python benchmarks/mobile.py [--models efficientnet_lite0 mobilenetv2_100 …] [--threads 1] [--seconds 6]
"""

from __future__ import annotations

import argparse

import numpy as np
import timm
import torch
from common import RESULTS, row

from autoprune.kernels.convert import convert
from autoprune.kernels.cpu import strips
from autoprune.kernels.dense import dense_references, runners
from autoprune.lut.bench import append_rows
from autoprune.lut.measure import interleaved_us

MODELS = ("efficientnet_lite0", "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0")


def main() -> None:
    """Time every network in its forms; append the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(1, 3, 224, 224)
    rows = []
    for name in options.models:
        model = timm.create_model(name).eval()
        runs = dict(runners(dense_references(model, x, options.threads, only=("onnxruntime",))))
        by_strips = convert(model, {}, x, threads=options.threads)
        by_strips(x)
        limit, strips.RUN_BYTES = strips.RUN_BYTES, 1 << 60  # no run is worth it
        whole = convert(model, {}, x, threads=options.threads)
        whole(x)
        strips.RUN_BYTES = limit
        runs |= {"plan by strips": lambda net=by_strips: net(x), "plan by whole maps": lambda net=whole: net(x)}
        with torch.inference_mode():
            samples = interleaved_us(runs, options.seconds, options.threads)
        baseline = float(np.median(samples["onnxruntime"]))
        for form, values in samples.items():
            rows.append(row(f"{name} 224", f"dense:{form}", "latency", [float(value) for value in values],
                            baseline=baseline, unit="us", threads=options.threads))  # fmt: skip
            print(f"{name:24} {form:20} {np.median(values):10.0f} us")
    append_rows(RESULTS / "mobile.csv", rows)


if __name__ == "__main__":
    main()
