"""Small folders of real image files, and small files in the formats of known data sets."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def photo(seed: int, height: int = 40, width: int = 52) -> Image.Image:
    """A picture with soft shapes of its own, so that a decoder and a resize have something to keep."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def flat_folder(folder: Path, count: int, *, suffix: str = ".png") -> Path:
    """A folder of images without labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        photo(number).save(folder / f"{number:03d}{suffix}")
    return folder


def class_folder(folder: Path, classes: tuple[str, ...], count: int) -> Path:
    """A folder with ``count`` images in the folder of each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            photo(1_000 * label + number).save(folder / name / f"{number}.png")
    return folder


def cifar_record(labels: int, classes: int, count: int, seed: int) -> bytes:
    """Records of a CIFAR file in binary form."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 256, (count, labels + 3_072), np.uint8)
    rows[:, :labels] = generator.integers(0, classes, (count, labels), np.uint8)
    return rows.tobytes()


def cifar10_folder(root: Path, count: int = 12) -> Path:
    """``cifar-10-batches-bin`` with ``count`` images a file."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(cifar_record(1, 10, count, number))
    (folder / "test_batch.bin").write_bytes(cifar_record(1, 10, count, 6))
    return folder


def cifar100_archive(root: Path, count: int = 20) -> Path:
    """``cifar-100-binary.tar.gz`` with ``count`` images a file."""
    path = root / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for seed, name in enumerate(("train.bin", "test.bin")):
            content = cifar_record(2, 20, count, seed)
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
