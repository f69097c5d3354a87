"""CIFAR-10 and CIFAR-100 in their binary form: the Python form is a pickle, which runs whatever its writer wished.

Records of bytes: the label (CIFAR-100: coarse, then fine), then 32 × 32 pixels of each of three channels. They are read
from the unpacked folder or straight from the archive.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autoprune.core.errors import DataError
from autoprune.tasks.dataset import SPLIT_SEED, DataSet, Split
from autoprune.tasks.idx import cache_dir, held_out

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True, slots=True)
class CifarSet:
    """One of the two.

    Attributes:
        name, title: As in ``--data``, and in messages.
        classes: 10 or 100.
        folder: What the archive unpacks to.
        archive, md5: The archive's name, and the checksum its makers publish.
        train, test: Files of each part.
        labels: Label bytes a record; the last one counts.
        mean, std: Of the training pixels in 0..1, of each channel.
        pickled: Folder of the Python form.
    """

    name: str
    title: str
    classes: int
    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pickled: str


CIFAR10 = CifarSet(
    "cifar10", "CIFAR-10", 10, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)), ("test_batch.bin",), 1,
    (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "cifar-10-batches-py",
)  # fmt: skip
CIFAR100 = CifarSet(
    "cifar100", "CIFAR-100", 100, "cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
    ("train.bin",), ("test.bin",), 2,
    (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cifar-100-python",
)  # fmt: skip


def load_cifar(kind: CifarSet, data_dir: Path | None) -> DataSet:
    """Return the whole set.

    Args:
        kind: Which.
        data_dir: Folder that holds the binary files, their folder or the archive; None looks in the cache folder and
            downloads the archive.
    Raises:
        DataError: Files absent, not downloadable or unreadable.
    """
    read = _reader(kind, data_dir)
    train, validation = held_out(_split(kind, read, kind.train))
    test = _split(kind, read, kind.test)
    parts = (train, validation, test)
    return DataSet(kind.name, kind.classes, kind.mean, kind.std, *parts, full=True, seed=SPLIT_SEED)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the files lie: a folder, or an archive that holds it."""

    path: Path
    folder: str

    def read(self, name: str) -> bytes:
        where = self.path / name
        try:
            if self.path.is_dir():
                return where.read_bytes()
            with tarfile.open(self.path) as archive:
                member = archive.extractfile(f"{self.folder}/{name}")
                return b"" if member is None else member.read()
        except FileNotFoundError:
            raise DataError(f"{where} is missing; fetch the binary version of the data set again.") from None
        except (OSError, EOFError, KeyError, tarfile.TarError) as error:
            raise DataError(f"{where}: cannot be read ({error}); fetch the data set again.") from None


def _reader(kind: CifarSet, data_dir: Path | None) -> _Place:
    root = data_dir or cache_dir()
    for place in (root / kind.folder, root):
        if (place / kind.train[0]).is_file():
            return _Place(place, kind.folder)
    if (root / kind.archive).is_file():
        return _Place(root / kind.archive, kind.folder)
    if (root / kind.pickled).is_dir():
        raise DataError(
            f"{root / kind.pickled} is the pickled version of {kind.title}, which runs code when it is read; put the "
            f"binary version ({kind.archive}) beside it."
        )
    return _Place(_download(kind, root), kind.folder)


def _download(kind: CifarSet, root: Path) -> Path:
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    source: str = datasets.CIFAR10.url
    try:
        root.mkdir(parents=True, exist_ok=True)
        download_url(f"{source.rpartition('/')[0]}/{kind.archive}", str(root), kind.archive, kind.md5)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{kind.title} not found and not downloadable ({error}): put {kind.archive}, or the folder {kind.folder} "
            "that it holds, in a folder and give --data-dir."
        ) from None
    return root / kind.archive


def _split(kind: CifarSet, place: _Place, names: tuple[str, ...]) -> Split:
    record = kind.labels + _PIXELS
    parts = []
    for name in names:
        raw = np.frombuffer(place.read(name), np.uint8)
        if len(raw) == 0 or len(raw) % record:
            raise DataError(
                f"{place.path / name}: {len(raw)} bytes, want a multiple of {record}; fetch the data set again."
            )
        parts.append(raw.reshape(-1, record))
    rows = np.concatenate(parts)
    labels = rows[:, kind.labels - 1]
    if int(labels.max()) >= kind.classes:
        raise DataError(f"{place.path}: label {labels.max()}, {kind.title} has {kind.classes}; fetch it again.")
    images = torch.from_numpy(rows[:, kind.labels :].reshape(-1, 3, 32, 32).copy())
    return Split(images, torch.from_numpy(labels.astype(np.int64)))
