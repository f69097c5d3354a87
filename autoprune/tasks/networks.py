"""Networks by name: built in, of torchvision or timm, or from the user's own code.

``resnet20`` is a built-in network on the data set's images; ``resnet20@3x32x32`` on images of another size;
``torchvision:resnet50`` and ``timm:vit_small_patch16_224`` are those packages' own; ``package.module:factory`` calls
a function of the user's. Arguments of all of them may follow as JSON; see ``names``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.core.errors import AutopruneError, ModelError
from autoprune.core.registry import unknown_name
from autoprune.tasks.data import load_data
from autoprune.tasks.models import MODELS
from autoprune.tasks.names import ModelName, parse_model
from autoprune.tasks.outputs import check_logits
from autoprune.tasks.own_code import first_line, importing_from_here

_IMAGENET = (3, 224, 224)


def make_network(name: ModelName, channels: int, classes: int) -> nn.Module:
    """Return a network with the weights that what builds it gives: random ones (torch's generator), if not asked else.

    Args:
        name: Which; its arguments win over the two below.
        channels: Of the images. Built-in networks and timm's are built for them, torchvision's get another first
            convolution where they differ; a factory is not told.
        classes: Outputs; not told to a factory, nor where pretrained weights are asked for.
    Raises:
        UnknownName: No such network; the nearest name is proposed.
        ModelError: Its package is not installed, its code fails, or it is no ``nn.Module``.
    """
    makers: dict[str, Callable[[ModelName, int, int], object]] = {
        "built-in": _built_in,
        "torchvision": _torchvision,
        "timm": _timm,
        "factory": lambda name, channels, classes: _factory(name.own)(**name.args),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialisation that takes long, of names that move
        try:
            model = makers[name.source](name, channels, classes)
        except AutopruneError:
            raise
        except Exception as error:  # foreign code: whatever it raises means that the network cannot be built
            raise ModelError(f"model '{name.text}' cannot be built: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model '{name.base}': its factory returned a {type(model).__name__}, want an nn.Module.")
    return model


def untrained(name: str, data: str, seed: int = 0, data_dir: Path | None = None) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode with random weights, and an example (1, C, H, W) float32.

    Args:
        name: As in the module's own words.
        data: Data set that gives a network its images' size and its number of classes; torchvision's and timm's have
            those of ImageNet.
        seed: Of weights and example; torch's global generator is left as it was.
        data_dir: Folder of the full data set; None uses the data inside the package.
    Raises:
        UnknownName: No such network.
        ModelError: A size that cannot be read, or a network that cannot be built.
    """
    parsed = parse_model(name)
    shape, classes = parsed.size, 1000
    if parsed.source in ("torchvision", "timm"):
        shape = shape or _IMAGENET
    elif shape is None or (parsed.source == "built-in" and "classes" not in parsed.args):
        data_set = load_data(data, data_dir)
        channels, height, width = (int(number) for number in data_set.train.images.shape[1:])
        shape, classes = shape or (channels, height, width), data_set.classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_network(parsed, shape[0], classes).eval(), torch.randn(1, *shape)


def standalone(name: str, example: Tensor, classes: int) -> str:
    """Return a network's name with the size of its images and its classes in it: what builds it without the data.

    Args:
        name: As in the module's own words.
        example: One image, (1, C, H, W) float32.
        classes: Of the data set.
    """
    parsed = parse_model(name)
    channels, height, width = (int(size) for size in example.shape[1:])
    argument = {"built-in": "classes", "torchvision": "num_classes", "timm": "num_classes"}.get(parsed.source)
    told = {} if argument is None or parsed.brings_weights else {argument: classes}
    return replace(parsed, size=(channels, height, width), args={**told, **parsed.args}).text


def network_for(name: str, example: Tensor, classes: int) -> nn.Module:
    """Return a network that judges a data set's images, in eval mode.

    Args:
        name: As in the module's own words.
        example: One image, (1, C, H, W) float32.
        classes: Of the data set.
    Raises:
        UnknownName, ModelError: As ``make_network``; also images of another size than the name says, or outputs that
            are no finite scores of the classes.
    """
    parsed = parse_model(name)
    shape = tuple(int(size) for size in example.shape[1:])
    if parsed.size is not None and parsed.size != shape:
        got, want = "x".join(map(str, shape)), "x".join(map(str, parsed.size))
        raise ModelError(f"model '{parsed.text}' is for images of {want}, the data has {got}; leave the @{want} out.")
    model = make_network(parsed, shape[0], classes).eval()
    check_logits(model, example, classes, parsed.text)
    return model


def _built_in(name: ModelName, channels: int, classes: int) -> nn.Module:
    numbers = {"channels": channels, "classes": classes}
    for key, value in name.args.items():
        if key not in numbers:
            raise ModelError(f"model '{name.base}' has no argument '{key}'; built-in networks take channels, classes.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"model '{name.base}': {key}={value!r} must be a whole number from 1.")
        numbers[key] = value
    return MODELS.get(name.base)(numbers["channels"], numbers["classes"])


def _torchvision(name: ModelName, channels: int, classes: int) -> object:
    from torchvision.models import get_model, list_models

    if name.own not in list_models():
        raise unknown_name("torchvision model", name.own, list_models())
    defaults: dict[str, object] = {"weights": None}
    if not name.brings_weights:
        defaults["num_classes"] = classes
    if name.own in ("googlenet", "inception_v3"):
        defaults["init_weights"] = True
    model = get_model(name.own, **{**defaults, **name.args})
    if isinstance(model, nn.Module) and channels != 3:
        _first_for(model, channels)
    return model


def _first_for(model: nn.Module, channels: int) -> None:
    """Put a new first convolution, for images of so many channels, in the place of one for three."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3)
    name, conv = next(found, ("", None))
    if conv is not None:
        weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, channels, *conv.kernel_size))
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        conv.in_channels, conv.weight = channels, weight
        model.get_submodule(name)


def _timm(name: ModelName, channels: int, classes: int) -> object:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ModelError(f"model '{name.base}': timm is not installed; run: pip install 'autoprune[timm]'.") from None
    if not timm.is_model(name.own.partition(".")[0]):
        raise unknown_name("timm model", name.own, timm.list_models())
    defaults: dict[str, object] = {"pretrained": False, "in_chans": channels}
    if not name.brings_weights:
        defaults["num_classes"] = classes
    return timm.create_model(name.own, **{**defaults, **name.args})


def _factory(text: str) -> Callable[..., object]:
    module_name, _, path = text.partition(":")
    try:
        with importing_from_here():
            found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ModelError(f"model '{text}': importing '{module_name}' failed: {first_line(error)}") from error
        raise ModelError(
            f"model '{text}': no module '{error.name}' here or among the installed packages; give package.module:name."
        ) from None
    except Exception as error:
        raise ModelError(f"model '{text}': importing '{module_name}' failed: {first_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise unknown_name(f"name in '{module_name}' called", part, public)
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise ModelError(f"model '{text}': '{path}' is a {type(found).__name__}; name a function that makes one.")
    return found
