"""ResNet-50 at 224 × 224, batch 1: one block density for every layer, and channels, against every dense execution.

    python benchmarks/resnet50.py [--compressions 2.25 4.5 9] [--channels 0.5] [--threads 1] [--batch 1] [--seconds 20]

The weights are random: latency depends on where the zeros are, not on the values. First convolution and classifier stay
dense. ``--channels`` gives shares of MACs: all groups of channels keep one fraction, the largest that comes to no more;
that smaller network runs in onnxruntime too. All networks are timed in turn, round after round, in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import RESULTS, command, today
from torch import Tensor, nn

from autoprune.core.choices import Channels
from autoprune.core.coupling import Coupling
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.kernels.convert import convert
from autoprune.kernels.dense import dense_references, runners
from autoprune.lut.bench import BenchResult, Labels, append_rows, rows
from autoprune.lut.deploy import masked_copy
from autoprune.lut.measure import measure
from autoprune.search_spaces.trace import trace
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.sparsity.channel_graph import channel_groups
from autoprune.sparsity.channels import ChannelGroups
from autoprune.sparsity.compact import compact
from autoprune.tasks.networks import untrained

MODEL = "torchvision:resnet50"


def block_policies(layers: Sequence[LayerSpec], compressions: Sequence[float]) -> dict[str, Policy]:
    """Return one policy a compression, every layer that can take it in blocks of 16 filters."""
    texts = [f"block(keep={1.0 / compression:.4g},filters=16)" for compression in compressions]
    return {text: uniform_policy(layers, [text], model=MODEL) for text in texts}


def channel_policies(layers: Sequence[LayerSpec], coupling: Coupling, shares: Sequence[float]) -> dict[str, Policy]:
    """Return one policy a share of MACs: the widest channels of one fraction for all groups that stay within it."""
    found = {}
    for share in shares:
        for percent in range(99, 0, -1):
            text = f"channels(keep={percent / 100:g})"
            policy = uniform_policy(layers, [text], model=MODEL, coupling=coupling)
            if policy.file.predicted.macs_ratio <= share:
                found[f"{text} {policy.file.predicted.macs_ratio:.1%} of the MACs"] = policy
                break
    return found


def deployed(
    model: nn.Module, x: Tensor, policies: dict[str, Policy], groups: ChannelGroups, threads: int
) -> dict[str, Callable[[], object]]:
    """Return a call for each policy's network, after its outputs were compared with the masked network's."""
    calls: dict[str, Callable[[], object]] = {}
    for text, policy in policies.items():
        masked = masked_copy(model, policy.choices, x, groups)
        network = convert(masked, policy, x, threads=threads, groups=groups)
        with torch.no_grad():
            want = masked(x)
        error = float((network(x) - want).abs().max() / want.abs().max())
        print(f"{text}: outputs differ from the masked network's by {error:.1e} of their scale", flush=True)
        calls[text] = lambda network=network: network(x)  # type: ignore[misc]
        if any(isinstance(choice, Channels) for choice in policy.choices.values()):
            smaller = compact(masked, policy, x, groups)
            elsewhere = dense_references(smaller, x, threads, only=("onnxruntime",))["onnxruntime"]
            assert not isinstance(elsewhere, str), elsewhere
            calls[f"{text}, onnxruntime"] = elsewhere
    return calls


def main() -> None:
    """Time the networks and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressions", type=float, nargs="+", default=[4.5])
    parser.add_argument("--channels", type=float, nargs="+", default=[0.5])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--csv", type=Path, default=RESULTS / "resnet50.csv")
    options = parser.parse_args()
    model, example = untrained(f"{MODEL}@3x{options.size}x{options.size}", "fashion-mnist")
    layers = trace(model, example)
    x = torch.randn(options.batch, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    groups = channel_groups(model, example)
    policies = block_policies(layers, options.compressions)
    policies |= channel_policies(layers, groups.coupling, options.channels)
    calls = deployed(model, x, policies, groups, options.threads)
    seconds: dict[str, float] = {}
    found = dense_references(model, x, options.threads, built=seconds.__setitem__)
    timed = measure({**runners(found), **calls}, options.seconds, options.threads)
    absent = {name: why for name, why in found.items() if isinstance(why, str)}
    references = {name: spread for name, spread in timed.spreads.items() if name not in calls}
    for index, text in enumerate(calls):
        result = BenchResult(
            timed.spreads[text], references, absent, seconds, timed.taken, timed.dropped, options.batch, options.threads
        )
        kept = policies[text.removesuffix(", onnxruntime")].file.predicted.params_ratio
        case = f"{MODEL} {options.size}x{options.size}"
        lines = rows(result, Labels(case, text, round(1.0 / kept, 3), today(), command()))
        append_rows(options.csv, lines if index == 0 else lines[:1])
        print(f"{text}: {result.deployed.p50:,.0f} us, {1.0 / result.ratio:.2f} times as fast as {result.best}")
    print(f"{timed.dropped} of {timed.taken} samples were disturbed and left out")


if __name__ == "__main__":
    main()
