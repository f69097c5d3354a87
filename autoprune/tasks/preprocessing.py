"""How a network wants its images: what torchvision and timm publish with its weights."""

from __future__ import annotations

from dataclasses import replace

from autoprune.tasks.source import FOLDERS, Options, parse_data

_SMALL = Options(size=32, resize=32)


def prepared(data: str, model: str) -> str:
    """Return a data set's text with the options that the network's own preprocessing gives; those given win.

    Args:
        data: As in ``--data``.
        model: As in ``--model``.
    Raises:
        UnknownName, DataError: The data's name cannot be read.
    """
    name = parse_data(data)
    if name.base not in FOLDERS:
        return name.text
    given = name.options
    defaults = preprocessing_of(model)
    if given.size is not None and given.resize is None and defaults.size and defaults.resize:
        # The network's own proportion of what is cut away, at the size asked for.
        defaults = replace(defaults, resize=round(given.size * defaults.resize / defaults.size))
    return replace(name, options=given.over(defaults)).text


def preprocessing_of(model: str) -> Options:
    """Return the size, crop, mean and std of a network as its package publishes them; empty where none does."""
    base = model.partition("{")[0]
    own = base.partition("@")[0]
    prefix, colon, rest = own.partition(":")
    if not colon:
        found = _SMALL
    elif prefix == "torchvision":
        found = _torchvision(rest)
    elif prefix == "timm":
        found = _timm(rest)
    else:
        found = Options()
    sizes = base.partition("@")[2].split("x")
    if len(sizes) == 3 and sizes[2].isdecimal():
        size = int(sizes[2])
        scale = found.resize / found.size if found.resize and found.size else 1.0
        found = replace(found, size=size, resize=round(size * scale))
    return found


def _torchvision(name: str) -> Options:
    from torchvision.models import get_model_weights, list_models

    if name not in list_models():
        return Options()
    weights = list(get_model_weights(name))
    if not weights:
        return Options()
    transform = getattr(get_model_weights(name), "DEFAULT", weights[-1]).transforms()
    return Options(
        size=int(transform.crop_size[0]),
        resize=int(transform.resize_size[0]),
        mean=tuple(float(value) for value in transform.mean),
        std=tuple(float(value) for value in transform.std),
        interpolation=transform.interpolation.value,
    )


def _timm(name: str) -> Options:
    try:
        from timm.models import get_pretrained_cfg, is_model
    except ImportError:
        return Options()
    if not is_model(name.partition(".")[0]):
        return Options()
    config = get_pretrained_cfg(name)
    if config is None:
        return Options()
    size = int(config.input_size[-1])
    return Options(
        size=size,
        resize=round(size / float(config.crop_pct)),
        mean=tuple(float(value) for value in config.mean),
        std=tuple(float(value) for value in config.std),
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",
    )
