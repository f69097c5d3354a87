"""What leaving channels out is worth in onnxruntime: torchvision networks shrunk by torch-pruning, dense beside them.

    python benchmarks/export.py --models resnet18,mobilenet_v2 --csv benchmarks/results/export.csv

Weights are random: they decide no latency. Outputs of the exported file are checked against the network's first.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torch_pruning
from common import command, today
from torch import Tensor, nn
from torchvision.models import get_model

from autoprune.export.bundle import load, save
from autoprune.export.compare import Comparison, compare, rows
from autoprune.export.onnx_file import export_onnx
from autoprune.export.report import bytes_text
from autoprune.lut.bench import Labels, append_rows


def shrunk(model: nn.Module, example: Tensor, keep: float) -> nn.Module:
    """Return a copy that keeps a fraction of every coupled group of channels, a multiple of 8; the classes stay."""
    smaller = copy.deepcopy(model)
    linear = [module for module in smaller.modules() if isinstance(module, nn.Linear)]
    classifier = [module for module in linear if module.out_features == 1000]
    pruner = torch_pruning.pruner.MagnitudePruner(
        smaller, example, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=1.0 - keep,
        ignored_layers=classifier, round_to=8,
    )  # fmt: skip
    pruner.step()
    return smaller.eval()


def measured(name: str, keep: float, options: argparse.Namespace) -> tuple[Comparison, float, float]:
    """Return the latencies, the largest difference of the exported outputs, and parameters dense over kept."""
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval()
    images = torch.randn(2, 3, options.size, options.size)
    smaller = shrunk(model, images[:1], keep)
    with tempfile.TemporaryDirectory() as folder:
        # By way of the stored form, as a user would.
        save(model, smaller, folder)
        loaded = load(folder, lambda: get_model(name, weights=None))
        made = export_onnx(loaded, images, Path(folder) / "net.onnx")
    found = compare(model, loaded, images[: options.batch], options.threads, options.seconds)
    counts = [sum(p.numel() for p in network.parameters()) for network in (model, loaded)]
    return found, made.difference, counts[0] / counts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,resnet50,mobilenet_v2,densenet121")
    parser.add_argument("--keep", default="0.75,0.5", help="fractions of channels to keep")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, choices=(1, 2), default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    for name in options.models.split(","):
        for keep in map(float, options.keep.split(",")):
            found, difference, compression = measured(name, keep, options)
            print(
                f"{name:14s} keep {keep:.2f}  "
                f"{bytes_text(found.pruned_bytes):>8s} of {bytes_text(found.dense_bytes):>8s}  "
                f"{found.pruned.p50 / 1e3:7.2f} of {found.dense.p50 / 1e3:7.2f} ms "
                f"({found.pruned.p50 / found.dense.p50:.3f})  outputs within {difference:.1e}",
                flush=True,
            )
            if options.csv is not None:
                labels = Labels(
                    f"{name} {options.size}", f"channels(keep={keep:g})", round(compression, 3), today(), command()
                )
                append_rows(options.csv, rows(found, labels))


if __name__ == "__main__":
    main()
