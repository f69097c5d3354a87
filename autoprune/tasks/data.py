"""Images with labels, held in memory as uint8, and where they come from.

Splits are disjoint and fixed: of Fashion-MNIST's 60,000 training images 5,000 (chosen by ``SPLIT_SEED``) are held out
as validation data, 55,000 train; the 10,000 test images are used for one closing figure and no choice.
Inside the package stand the validation images, 8,000 of the training images and the test images.
"""

from __future__ import annotations

import gzip
import importlib.resources
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.core.errors import DataError
from autoprune.core.registry import unknown_name

SPLIT_SEED = 20260101
VALIDATION_IMAGES = 5_000
EMBEDDED_TRAIN_IMAGES = 8_000
SYSTEM_DIRS = (Path("/usr/share/datasets/fashion-mnist"),)
DATA_SETS = ("fashion-mnist",)


@dataclass(frozen=True, slots=True)
class Split:
    """Images ``(N, C, H, W)`` uint8 and labels ``(N,)`` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int) -> Split:
        """Return the first ``count`` images."""
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True, slots=True)
class DataSet:
    """A classification data set.

    Attributes:
        name: As in ``--data``.
        classes: Number of classes.
        mean, std: Of the pixels in 0..1, over all training images.
        train, validation, test: Disjoint splits.
        full: Whether ``train`` is the whole training set or the part inside the package.
    """

    name: str
    classes: int
    mean: float
    std: float
    train: Split
    validation: Split
    test: Split
    full: bool

    def normalize(self, images: Tensor) -> Tensor:
        """Return float32 images in channels-last memory format, zero mean and unit variance."""
        x = images.to(torch.float32).div_(255.0).sub_(self.mean).div_(self.std)
        return x.contiguous(memory_format=torch.channels_last)


def load_data(name: str, data_dir: Path | None = None, *, full: bool = False) -> DataSet:
    """Return a data set.

    Args:
        name: ``fashion-mnist``.
        data_dir: Folder with the original idx files; None looks in the system's dataset folder.
        full: Ask for all training images rather than the embedded part.
    Raises:
        UnknownName: No such data set.
        DataError: Files absent or unreadable.
    """
    if name not in DATA_SETS:
        raise unknown_name("data set", name, DATA_SETS)
    if full or data_dir is not None:
        return _fashion_mnist_full(data_dir)
    return _fashion_mnist_embedded()


def _data_set(train: Split, validation: Split, test: Split, *, full: bool) -> DataSet:
    return DataSet("fashion-mnist", 10, 0.2860, 0.3530, train, validation, test, full)


def _fashion_mnist_embedded() -> DataSet:
    resource = importlib.resources.files("autoprune.assets") / "fashion-mnist.npz"
    try:
        with resource.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            splits = {
                part: Split(
                    torch.from_numpy(arrays[f"{part}_images"]).unsqueeze(1),
                    torch.from_numpy(arrays[f"{part}_labels"]).long(),
                )
                for part in ("train", "validation", "test")
            }
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"the data inside the package is damaged ({error}); install autoprune again.") from None
    return _data_set(splits["train"], splits["validation"], splits["test"], full=False)


def _fashion_mnist_full(data_dir: Path | None) -> DataSet:
    folder = _find_idx(data_dir)
    images, labels = _read_idx_pair(folder, "train")
    test = Split(*_read_idx_pair(folder, "t10k"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, rest = order[:VALIDATION_IMAGES], order[VALIDATION_IMAGES:]
    return _data_set(
        Split(images[rest], labels[rest]), Split(images[held_out], labels[held_out]), test, full=True
    )


def _find_idx(data_dir: Path | None) -> Path:
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir}: no such folder.")
    places = [data_dir] if data_dir is not None else list(SYSTEM_DIRS)
    for place in places:
        for folder in (place, place / "FashionMNIST" / "raw"):
            if _idx_path(folder, "train-images-idx3-ubyte") is not None:
                return folder
    return _download(data_dir or Path.home() / ".cache" / "autoprune" / "data")


def _download(root: Path) -> Path:
    from torchvision.datasets import FashionMNIST  # carries the files' checksums

    try:
        FashionMNIST(str(root), train=True, download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"full Fashion-MNIST not found and not downloadable ({error}): put train-images-idx3-ubyte.gz and its "
            "three companions in a folder and give --data-dir, install the system package dataset-fashion-mnist, or "
            "train with --embedded."
        ) from None
    return root / "FashionMNIST" / "raw"


def _idx_path(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _read_idx_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte")
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels; fetch the files again.")
    return images.unsqueeze(1), labels.long()


def _read_idx(folder: Path, stem: str) -> Tensor:
    path = _idx_path(folder, stem)
    if path is None:
        raise DataError(f"{folder}: {stem}[.gz] is missing; fetch the four files of the data set.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rank = raw[3]
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())
    except (OSError, EOFError, IndexError, struct.error, ValueError) as error:
        raise DataError(f"{path}: not a complete idx file ({error}); fetch it again.") from None
