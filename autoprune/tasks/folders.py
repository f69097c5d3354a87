"""Folders of images: ``train`` and ``val`` with a folder a class, class folders alone, or images without labels.

Files are listed, not read: an image is decoded when it is asked for, and of a large folder only as many images are used
as a search needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoprune.core.errors import DataError
from autoprune.tasks.dataset import SPLIT_SEED, DataSet, Split
from autoprune.tasks.pictures import SUFFIXES, ImageFiles, Transform, check_header, make_transform
from autoprune.tasks.source import DataName, Options

# What is used of a folder unless options say otherwise: 2,000 images of 224 × 224 take 300 MB.
TRAIN_IMAGES, VALIDATION_IMAGES, TEST_IMAGES = 2_000, 1_000, 1_000
# Fewer than these and neither calibration nor a figure means anything.
LEAST_TRAIN, LEAST_HELD_OUT = 8, 8
IMAGENET_CLASSES = 1_000
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE, _CROP = 224, 0.875
_TRAIN_NAMES, _VALIDATION_NAMES, _TEST_NAMES = ("train",), ("val", "validation", "valid"), ("test",)


@dataclass(frozen=True, slots=True)
class _Files:
    """Image files with their labels (−1: none), and the names of the classes."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def pick(self, numbers: Sequence[int]) -> _Files:
        return _Files(tuple(self.paths[n] for n in numbers), tuple(self.labels[n] for n in numbers), self.classes)


def load_folder(name: DataName, *, full: bool) -> DataSet:
    """Return the images of a folder.

    Args:
        name: ``imagefolder:DIR`` or ``imagenet:DIR`` with its options.
        full: All training images, decoded anew each time, rather than as many as a search needs.
    Raises:
        DataError: The folder is absent, its folders do not agree, a file is no image, or there are too few.
    """
    root = Path(name.where).expanduser()
    if not root.is_dir():
        raise DataError(f"--data {name.plain}: no such folder.")
    parts = _parts(root)
    labelled = parts[0].labels[0] >= 0
    if name.base == "imagenet" and (not labelled or len(parts[0].classes) != IMAGENET_CLASSES):
        found = f"{len(parts[0].classes)} class folders" if labelled else "no class folders"
        raise DataError(
            f"--data {name.plain}: {found}, ImageNet has {IMAGENET_CLASSES:,}; for a part of it, or images without "
            f"labels, give imagefolder:{name.where}."
        )
    options = name.options.over(Options(train=TRAIN_IMAGES, validation=VALIDATION_IMAGES, test=TEST_IMAGES))
    for key, values in (("mean", options.mean), ("std", options.std)):
        if values is not None and len(values) not in (1, 3):
            raise DataError(f"data option {key}: {len(values)} numbers for images of 3 channels.")
    transform, size = _transform(options)

    def split(files: _Files, count: int | None, *, keep: bool = True) -> Split:
        files = files if count is None else files.pick(range(min(count, len(files))))
        for path in files.paths if keep else files.paths[:LEAST_TRAIN]:
            check_header(path)
        return Split(ImageFiles(files.paths, transform, size, keep=keep), torch.tensor(files.labels))

    whole = full and name.options.train is None
    train = split(parts[0], None if whole else options.train, keep=not whole)
    return DataSet(
        name=name.text,
        classes=len(parts[0].classes) if labelled else options.classes or IMAGENET_CLASSES,
        mean=options.mean or IMAGENET_MEAN,
        std=options.std or IMAGENET_STD,
        train=train,
        validation=split(parts[1], options.validation),
        test=split(parts[2], options.test),
        full=len(train) == len(parts[0]),
        labelled=labelled,
        seed=SPLIT_SEED,
    )


def _transform(options: Options) -> tuple[Transform, int]:
    size = options.size or _SIZE
    resize = options.resize or round(size / _CROP)
    if resize < size:
        raise DataError(f"data option resize={resize}: below size={size}; the middle of that size is cut out of it.")
    return make_transform(size, resize, options.interpolation or "bilinear"), size


def _parts(root: Path) -> tuple[_Files, _Files, _Files]:
    """Return training, validation and test images, drawn by ``SPLIT_SEED`` where no folder tells them apart."""
    folders = {key: _first(root, names) for key, names in
               (("train", _TRAIN_NAMES), ("val", _VALIDATION_NAMES), ("test", _TEST_NAMES))}  # fmt: skip
    train, validation, test = (folders[key] for key in ("train", "val", "test"))
    if train is None:
        files = _shuffled(_listed(validation or root), 0)
        _require(root, len(files), LEAST_TRAIN + LEAST_HELD_OUT)
        half, rest = len(files) // 2, len(files) - len(files) // 2
        cut = half + (3 * rest + 4) // 5
        return tuple(files.pick(range(a, b)) for a, b in ((0, half), (half, cut), (cut, len(files))))  # type: ignore[return-value]
    learned = _shuffled(_listed(train), 0)
    _require(train, len(learned), LEAST_TRAIN)
    held = validation or test
    if held is None:
        raise DataError(f"{root}: there is 'train' but no 'val' beside it; make one, or give the folder {train}.")
    judged = _shuffled(_listed(held), 1)
    _same_classes(learned, judged, held)
    if validation is not None and test is not None:
        closing = _shuffled(_listed(test), 2)
        _same_classes(learned, closing, test)
        _require(held, len(judged), LEAST_HELD_OUT // 2)
        _require(test, len(closing), 1)
        return learned, judged, closing
    _require(held, len(judged), LEAST_HELD_OUT)
    cut = (3 * len(judged) + 4) // 5
    return learned, judged.pick(range(cut)), judged.pick(range(cut, len(judged)))


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _listed(folder: Path) -> _Files:
    """Return the images of a folder: with labels if it holds class folders, without if it holds images."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    if classes and loose:
        raise DataError(
            f"{folder}: images ({loose[0].name}, …) beside folders ({classes[0].name}, …); put them in a folder of "
            "their class, or take the folders away."
        )
    if not classes:
        return _Files(tuple(loose), (-1,) * len(loose), ())
    paths: list[Path] = []
    labels: list[int] = []
    for label, entry in enumerate(classes):
        own = sorted(path for path in entry.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not own:
            raise DataError(f"{entry}: no images in this class's folder; known suffixes: {', '.join(SUFFIXES)}.")
        paths += own
        labels += [label] * len(own)
    return _Files(tuple(paths), tuple(labels), tuple(entry.name for entry in classes))


def _shuffled(files: _Files, stream: int) -> _Files:
    generator = torch.Generator().manual_seed(SPLIT_SEED + stream)
    order: Tensor = torch.randperm(len(files), generator=generator)
    return files.pick(order.tolist())


def _require(folder: Path, count: int, least: int) -> None:
    if count < least:
        raise DataError(
            f"{folder}: {count} images, at least {least} are needed (known suffixes: {', '.join(SUFFIXES)}); add some, "
            "or give another folder."
        )


def _same_classes(train: _Files, other: _Files, folder: Path) -> None:
    if train.classes == other.classes:
        return
    if not train.classes or not other.classes:
        raise DataError(f"{folder}: one of it and its 'train' has class folders, the other has none; make them alike.")
    name = next(iter(sorted(set(train.classes) ^ set(other.classes))))
    where = "is not in 'train'" if name in other.classes else "is missing"
    raise DataError(f"{folder}: class folder '{name}' {where}; both must hold the same classes.")
