"""MNIST and Fashion-MNIST: files in idx format, Fashion-MNIST also inside the package."""

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
from autoprune.tasks.dataset import SPLIT_SEED, DataSet, Split

VALIDATION_IMAGES = 5_000
# What a search uses of a set that is not inside the package: as many as are inside it.
SEARCH_TRAIN_IMAGES = 8_000
SYSTEM_DIRS = (Path("/usr/share/datasets/fashion-mnist"),)


@dataclass(frozen=True, slots=True)
class IdxSet:
    """One data set of four idx files.

    Attributes:
        name: As in ``--data``.
        title: In messages.
        folder: Below which torchvision keeps its files, and its class there.
        mean, std: Over all training pixels in 0..1.
        system: Folders where the system may have it.
        hint: Where else it may come from.
    """

    name: str
    title: str
    folder: str
    mean: float
    std: float
    system: tuple[Path, ...] = ()
    hint: str = ""


FASHION = IdxSet(
    "fashion-mnist", "Fashion-MNIST", "FashionMNIST", 0.2860, 0.3530, SYSTEM_DIRS,
    "install the system package dataset-fashion-mnist, or train with --embedded",
)  # fmt: skip
MNIST = IdxSet("mnist", "MNIST", "MNIST", 0.1307, 0.3081)


def embedded_fashion_mnist() -> DataSet:
    """Return the data inside the package.

    Raises:
        DataError: It is damaged.
    """
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
    return _data_set(FASHION, splits["train"], splits["validation"], splits["test"], full=False)


def load_idx(kind: IdxSet, data_dir: Path | None) -> DataSet:
    """Return the whole set from its files, downloaded by torchvision where they are nowhere.

    Args:
        kind: Which.
        data_dir: Folder of the files; None looks in the system's dataset folder.
    Raises:
        DataError: Files absent, not downloadable or unreadable.
    """
    folder = _find(kind, data_dir)
    images, labels = _read_pair(folder, "train")
    test = Split(*_read_pair(folder, "t10k"))
    train, validation = held_out(Split(images, labels))
    return _data_set(kind, train, validation, test, full=True)


def held_out(split: Split) -> tuple[Split, Split]:
    """Return training and validation images, drawn by ``SPLIT_SEED``; of small sets a fifth validates."""
    assert isinstance(split.images, Tensor)
    count = VALIDATION_IMAGES if len(split) > VALIDATION_IMAGES else len(split) // 5
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SPLIT_SEED))
    first, rest = order[:count], order[count:]
    return Split(split.images[rest], split.labels[rest]), Split(split.images[first], split.labels[first])


def _data_set(kind: IdxSet, train: Split, validation: Split, test: Split, *, full: bool) -> DataSet:
    return DataSet(kind.name, 10, (kind.mean,), (kind.std,), train, validation, test, full, seed=SPLIT_SEED)


def _find(kind: IdxSet, data_dir: Path | None) -> Path:
    places = [data_dir] if data_dir is not None else list(kind.system)
    for place in places:
        for folder in (place, place / kind.folder / "raw"):
            if _path(folder, "train-images-idx3-ubyte") is not None:
                return folder
    return _download(kind, data_dir or cache_dir())


def cache_dir() -> Path:
    """Return where downloaded data is kept."""
    return Path.home() / ".cache" / "autoprune" / "data"


def _download(kind: IdxSet, root: Path) -> Path:
    from torchvision import datasets  # carries the files' checksums

    try:
        getattr(datasets, kind.folder)(str(root), train=True, download=True)
    except (RuntimeError, OSError) as error:
        more = f", {kind.hint}" if kind.hint else ""
        raise DataError(
            f"full {kind.title} not found and not downloadable ({error}): put train-images-idx3-ubyte.gz and its "
            f"three companions in a folder and give --data-dir{more}."
        ) from None
    return root / kind.folder / "raw"


def _path(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = _read(folder, f"{part}-images-idx3-ubyte")
    labels = _read(folder, f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels; fetch the files again.")
    return images.unsqueeze(1), labels.long()


def _read(folder: Path, stem: str) -> Tensor:
    path = _path(folder, stem)
    if path is None:
        raise DataError(f"{folder}: {stem}[.gz] is missing; fetch the four files of the data set.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rank = raw[3]
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())
    except (OSError, EOFError, IndexError, struct.error, ValueError) as error:
        raise DataError(f"{path}: not a complete idx file ({error}); fetch it again.") from None
