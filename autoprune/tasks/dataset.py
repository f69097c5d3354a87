"""What a data set is: splits of images and labels, in memory or decoded from files when they are asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoprune.core.errors import DataError
from autoprune.tasks.pictures import ImageFiles

SPLIT_SEED = 20260101
# Images of a batch that is normalised on its way, where a whole split would not fit beside everything else.
_HASHED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Split:
    """Images ``(N, C, H, W)`` uint8 and labels ``(N,)`` int64; of images without labels the labels are −1.

    ``images`` is a tensor or a list of files; both give a uint8 tensor when they are indexed.
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int) -> Split:
        """Return the first ``count`` images."""
        return self.part(0, count)

    def part(self, start: int, stop: int | None = None) -> Split:
        """Return the images from ``start`` up to ``stop``."""
        if isinstance(self.images, ImageFiles):
            return Split(self.images.part(start, stop), self.labels[start:stop])
        return Split(self.images[start:stop], self.labels[start:stop])

    def digest(self) -> str:
        """Return the SHA-256 of the images as they are judged, in order; files are decoded."""
        found = hashlib.sha256()
        for start in range(0, len(self), _HASHED_AT_ONCE):
            found.update(self.images[start : start + _HASHED_AT_ONCE].contiguous().numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class DataSet:
    """A classification data set.

    Attributes:
        name: As in ``--data``.
        classes: Number of classes.
        mean, std: Of the pixels in 0..1, of each channel.
        train, validation, test: Disjoint splits.
        full: Whether ``train`` is the whole training set or a part of it.
        labelled: Whether the labels are true ones; without them a network is judged by agreement with the dense one.
        seed: Of the draw that made the splits; None where files or the user decided.
    """

    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    validation: Split
    test: Split
    full: bool
    labelled: bool = True
    seed: int | None = None

    def scale(self, pixels: Tensor) -> Tensor:
        """Return pixels in 0..1, (N, C, H, W) float32, with zero mean and unit variance."""
        mean, std = (torch.as_tensor(v, dtype=torch.float32, device=pixels.device) for v in (self.mean, self.std))
        return (pixels - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)

    def normalize(self, images: Tensor | ImageFiles) -> Tensor:
        """Return float32 images in channels-last memory format, zero mean and unit variance."""
        pixels = images[:] if isinstance(images, ImageFiles) else images
        return self.scale(pixels.to(torch.float32).div_(255.0)).contiguous(memory_format=torch.channels_last)

    def judges(self, search: int) -> tuple[Split, Split]:
        """Return the images that policies are searched by and those that finalists are judged by, none in common.

        Args:
            search: Validation images to search by; at most half of them are.
        Raises:
            DataError: There are fewer than two validation images.
        """
        if len(self.validation) < 2:
            raise DataError(
                f"data '{self.name}': {len(self.validation)} validation images, a search needs at least 2: half of "
                "them choose policies, the others judge them."
            )
        count = min(search, len(self.validation) // 2)
        return self.validation.take(count), self.validation.part(count)

    def cut(self, train: int | None, validation: int | None, test: int | None) -> DataSet:
        """Return the data with at most so many images in each split."""

        def part(split: Split, count: int | None) -> Split:
            return split if count is None else split.take(count)

        kept = part(self.train, train)
        full = self.full and len(kept) == len(self.train)
        judged, closing = part(self.validation, validation), part(self.test, test)
        return replace(self, train=kept, validation=judged, test=closing, full=full)
