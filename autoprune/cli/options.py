"""Flags that several commands share, each spelt and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from autoprune.search_spaces.preset import presets

T = TypeVar("T")

# The kernels' program serves at most 62 threads; torch's and scikit-learn's generators take 32-bit seeds.
_MOST_THREADS = 62
_MOST_SEED = 2**32 - 1

MODEL_HELP = "a built-in name, torchvision:NAME, timm:NAME, or package.module:factory"
Model = Annotated[str, typer.Option(help=f"Network to prune: {MODEL_HELP}.")]
ModelArgs = Annotated[
    str | None,
    typer.Option(help="Arguments of what builds the network: name=value,… or JSON.", show_default="none"),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Its trained weights: safetensors, or a state dict of torch.save.",
        show_default="those of the package, or what a factory brings",
    ),
]
_DATA_HELP = (
    "Data set: fashion-mnist, mnist, cifar10, cifar100, imagenet:DIR, imagefolder:DIR (train/ and val/ with a folder a "
    "class, or images without labels), or package.module:factory."
)
Data = Annotated[str, typer.Option(help=_DATA_HELP)]
Transform = Annotated[
    list[str] | None,
    typer.Option(
        "--transform",
        metavar="NAME=VALUE",
        help="How images are prepared and how many are used: size, resize, mean, std (such as 0.5/0.5/0.5), "
        "interpolation, train, validation, test; repeatable.",
        show_default="the network's own",
    ),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the full data set.")]
_SPACE_HELP = f"Search space: a YAML file or a preset: {', '.join(presets())}."
Space = Annotated[str, typer.Option(help=_SPACE_HELP)]
SpaceByDevice = Annotated[
    str | None, typer.Option("--space", help=_SPACE_HELP, show_default="the device's own")
]
Batch = Annotated[int, typer.Option(min=1, help="Images per forward pass of the deployed network.")]
Threads = Annotated[
    int, typer.Option(min=1, max=_MOST_THREADS, help="CPU threads of the deployed network.", metavar="INTEGER")
]
Seed = Annotated[int, typer.Option(min=0, max=_MOST_SEED, help="Seed of every random draw.", metavar="INTEGER")]
Device = Annotated[str, typer.Option(help="Where the network is to be deployed: cpu or cuda.")]
Run = Annotated[str | None, typer.Option(help="Name of the run's folder.", show_default="made from the settings")]
RunsDir = Annotated[Path, typer.Option(help="Folder of all runs.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an existing run of this name aside and start over.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# Of commands that take up a policy or a finished run.
TakenPolicy = Annotated[
    Path | None, typer.Option("--policy", help="Policy file; this or --run.", show_default=False)
]
TakenRun = Annotated[
    str | None,
    typer.Option("--run", help="Take policy and weights of this run; this or --policy.", show_default=False),
]
TakenWeights = Annotated[
    Path | None,
    typer.Option(
        "--weights", help="Weights trained under the policy.", show_default="the run's, or dense masked by magnitude"
    ),
]
TakenData = Annotated[
    str | None, typer.Option("--data", help="Data set, by name.", show_default="the run's, or fashion-mnist")
]

# Of commands that only read: the value is compared with what is read, and another one is refused.
RunRead = Annotated[str | None, typer.Option("--run", help="Name of the run to read.")]
BatchRead = Annotated[
    int | None, typer.Option("--batch", min=1, help="Refuse what was made for another batch.", show_default="any")
]
ThreadsRead = Annotated[
    int | None, typer.Option("--threads", min=1, help="Refuse what was made for other threads.", show_default="any")
]
SeedRead = Annotated[
    int | None, typer.Option("--seed", min=0, help="Refuse what was made with another seed.", show_default="any")
]


def named(model: str | None, args: str | None) -> str | None:
    """Return a network's text with the arguments of ``--model-args``; None where no network is named.

    Raises:
        ModelError: Either cannot be read, or there are arguments and no network.
    """
    from autoprune.core.errors import ModelError
    from autoprune.tasks.names import with_args

    if model is None:
        if args is not None:
            raise ModelError(f"--model-args {args!r}: of no network; give --model too.")
        return None
    return with_args(model, args)


def prepared_data(data: str, transform: list[str] | None) -> str:
    """Return the data set's text with the options of ``--transform``.

    Raises:
        UnknownName: No such data set or option.
        DataError: A value cannot be read.
    """
    from autoprune.tasks.source import with_options

    return with_options(data, transform or ())


def one_of(first: str, a: T | None, second: str, b: T | None) -> T:
    """Return the one of two arguments that was given.

    Raises:
        RunError: Both were given, or neither.
    """
    from autoprune.core.errors import RunError

    given = [value for value in (a, b) if value is not None]
    if len(given) != 1:
        raise RunError(f"{first} and {second}: got {'both' if given else 'neither'}; give one of the two.")
    return given[0]
