"""Images with labels by name, and where they come from.

Splits are disjoint and fixed: of the training images of Fashion-MNIST, MNIST and CIFAR 5,000 (chosen by ``SPLIT_SEED``)
are held out as validation data; the test images are used for one closing figure and no choice. Inside the package stand
Fashion-MNIST's validation images, 8,000 of its training images and its test images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autoprune.core.errors import DataError
from autoprune.tasks.cifar import CIFAR10, CIFAR100, load_cifar
from autoprune.tasks.dataset import SPLIT_SEED, DataSet, Split
from autoprune.tasks.factory import load_factory
from autoprune.tasks.folders import load_folder
from autoprune.tasks.idx import FASHION, MNIST, SEARCH_TRAIN_IMAGES, embedded_fashion_mnist, load_idx
from autoprune.tasks.pictures import make_transform
from autoprune.tasks.source import FOLDERS, DataName, Options, parse_data

__all__ = ["SPLIT_SEED", "DataSet", "Split", "load_data"]


def load_data(name: str, data_dir: Path | None = None, *, full: bool = False) -> DataSet:
    """Return a data set.

    Args:
        name: As in ``--data``, options included; see ``source``.
        data_dir: Folder with the original files; None looks in the system's dataset folder and downloads.
        full: Ask for all training images rather than the part that a search uses.
    Raises:
        UnknownName: No such data set or option.
        DataError: Files absent or unreadable, or too few images.
    """
    parsed = parse_data(name)
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir}: no such folder.")
    if parsed.base in FOLDERS:
        return load_folder(parsed, full=full)
    return _adjusted(_whole(parsed, data_dir, full), parsed)


def _whole(name: DataName, data_dir: Path | None, full: bool) -> DataSet:
    if name.is_factory:
        return load_factory(name.base)
    if name.base == "fashion-mnist":
        return load_idx(FASHION, data_dir) if full or data_dir is not None else embedded_fashion_mnist()
    found = load_idx(MNIST, data_dir) if name.base == "mnist" else _cifar(name.base, data_dir)
    return found if full or name.options.train is not None else found.cut(SEARCH_TRAIN_IMAGES, None, None)


def _cifar(name: str, data_dir: Path | None) -> DataSet:
    return load_cifar(CIFAR10 if name == "cifar10" else CIFAR100, data_dir)


def _adjusted(data: DataSet, name: DataName) -> DataSet:
    """Return the data as its options ask for it."""
    options = name.options
    if options == Options():
        return data
    data = data.cut(options.train, options.validation, options.test)
    data = replace(data, name=name.text, mean=options.mean or data.mean, std=options.std or data.std)
    channels = int(data.train.images.shape[1])
    for key, values in (("mean", data.mean), ("std", data.std)):
        if len(values) not in (1, channels):
            raise DataError(f"data option {key}: {len(values)} numbers for images of {channels} channels.")
    if options.size is None and options.resize is None:
        return data
    train, validation, test = (_resized(part, options) for part in (data.train, data.validation, data.test))
    return replace(data, train=train, validation=validation, test=test)


def _resized(split: Split, options: Options) -> Split:
    if not isinstance(split.images, Tensor):
        raise DataError("data options size, resize: these images come from files that their own function prepares.")
    size = options.size or options.resize or int(split.images.shape[-1])
    transform = make_transform(size, options.resize or size, options.interpolation or "bilinear")
    parts = [transform(part) for part in torch.split(split.images, 1_000)]
    return Split(torch.cat(parts) if parts else split.images, split.labels)
