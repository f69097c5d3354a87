"""ResNet-50 at 224 × 224, batch 1: one block density for every layer, against every dense execution, in one run.

    python benchmarks/resnet50.py [--compressions 2.25 4.5 9] [--threads 1] [--batch 1] [--seconds 20]

The weights are random: latency depends on where the zeros are, not on the values. First convolution and classifier stay
dense. All networks are timed in turn, round after round, in one process.
"""

from __future__ import annotations

import argparse

import torch
from common import RESULTS, command, today

from autoprune.core.policy import Policy
from autoprune.kernels.convert import convert
from autoprune.kernels.dense import dense_references, runners
from autoprune.lut.bench import BenchResult, Labels, append_rows, rows
from autoprune.lut.deploy import masked_copy
from autoprune.lut.measure import measure
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.tasks.networks import untrained

MODEL = "torchvision:resnet50"


def main() -> None:
    """Time the networks and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compressions", type=float, nargs="+", default=[4.5])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    model, example = untrained(MODEL, "fashion-mnist")
    layers = trace(model, example)
    x = torch.randn(options.batch, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    policies: dict[str, Policy] = {}
    for compression in options.compressions:
        text = f"block(keep={1.0 / compression:.4g},filters=16)"
        policies[text] = uniform_policy(layers, [text], model=MODEL)
    deployed = {}
    for text, policy in policies.items():
        masked = masked_copy(model, policy.choices)
        deployed[text] = convert(masked, policy, x, threads=options.threads)
        with torch.no_grad():
            want = masked(x)
        error = float((deployed[text](x) - want).abs().max() / want.abs().max())
        print(f"{text}: outputs differ from the masked network's by {error:.1e} of their scale")
    seconds: dict[str, float] = {}
    found = dense_references(model, x, options.threads, built=seconds.__setitem__)
    cases = {**runners(found), **{text: (lambda network=network: network(x)) for text, network in deployed.items()}}
    timed = measure(cases, options.seconds, options.threads)
    absent = {name: why for name, why in found.items() if isinstance(why, str)}
    references = {name: spread for name, spread in timed.spreads.items() if name not in deployed}
    for index, text in enumerate(deployed):
        result = BenchResult(
            timed.spreads[text], references, absent, seconds, timed.taken, timed.dropped, options.batch,
            options.threads, deployed[text].decisions,
        )
        labels = Labels(f"{MODEL} 224x224", text, 1.0 / policies[text].file.predicted.params_ratio, today(), command())
        lines = rows(result, labels)
        append_rows(RESULTS / "resnet50.csv", lines if index == 0 else lines[:1])
        print(f"{text}: {result.deployed.p50:,.0f} us, {1.0 / result.ratio:.2f} times as fast as {result.best}")


if __name__ == "__main__":
    main()
