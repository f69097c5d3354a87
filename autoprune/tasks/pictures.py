"""Image files as one indexed thing: decoded when asked for, resized and cropped by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from autoprune.core.errors import DataError
from autoprune.tasks.source import Interpolation

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

Transform = Callable[[Tensor], Tensor]


def make_transform(size: int, resize: int, interpolation: Interpolation) -> Transform:
    """Return the transform of a network in evaluation: shorter side to ``resize`` pixels, the middle ``size`` of it.

    It takes and returns uint8 images (C, H, W); mean and variance are a data set's own business.
    """
    from torchvision.transforms import InterpolationMode, v2

    mode = InterpolationMode(interpolation)
    transform: Transform = v2.Compose([v2.Resize(resize, interpolation=mode, antialias=True), v2.CenterCrop(size)])
    return transform


class ImageFiles:
    """RGB images in files, indexed like a uint8 tensor (N, 3, H, W).

    Args:
        paths: Of the files.
        transform: To the size that all images have.
        size: Height and width of what it returns.
        keep: Keep decoded images in memory, for splits that are read again and again.
    """

    def __init__(self, paths: Sequence[Path], transform: Transform, size: int, *, keep: bool) -> None:
        self.paths = tuple(paths)
        self._transform = transform
        self._size = size
        # Memory that is not written to yet takes none.
        self._kept = torch.empty(len(self.paths), 3, size, size, dtype=torch.uint8) if keep else None
        self._have = torch.zeros(len(self.paths), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> torch.Size:
        """(N, 3, H, W)."""
        return torch.Size((len(self), 3, self._size, self._size))

    def part(self, start: int, stop: int | None = None) -> ImageFiles:
        """Return the files from ``start`` up to ``stop``; what is decoded of them is shared."""
        found = ImageFiles((), self._transform, self._size, keep=False)
        found.paths, found._have = self.paths[start:stop], self._have[start:stop]
        found._kept = None if self._kept is None else self._kept[start:stop]
        return found

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Return the images of a slice or of an index tensor (n,).

        Raises:
            DataError: A file is absent or no complete image; it is named.
        """
        numbers = torch.arange(len(self))[index]
        if self._kept is None:
            return self._decode(numbers)
        absent = numbers[~self._have[numbers]]
        if len(absent):
            self._kept[absent] = self._decode(absent)
            self._have[absent] = True
        return self._kept[numbers]

    def _decode(self, numbers: Tensor) -> Tensor:
        if not len(numbers):
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            return torch.stack(list(pool.map(self._one, [self.paths[number] for number in numbers.tolist()])))

    def _one(self, path: Path) -> Tensor:
        return self._transform(read_rgb(path))


def read_rgb(path: Path) -> Tensor:
    """Return an image file as uint8 (3, H, W).

    Raises:
        DataError: It is absent, or no complete image.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(path) as image:
            # By way of RGBA: a palette may hold a transparent colour.
            pixels: Tensor = pil_to_tensor(image.convert("RGBA" if image.mode in ("P", "PA", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: no complete image ({_reason(error)}); remove it or fetch it again.") from None
    return pixels[:3]


def check_header(path: Path) -> None:
    """Refuse a file that is absent or does not begin like an image.

    Raises:
        DataError: It is not.
    """
    from PIL import Image

    try:
        with Image.open(path):
            pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: no image ({_reason(error)}); remove it or fetch it again.") from None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:
        return "not of a known format"
    return (getattr(error, "strerror", None) or text or type(error).__name__)[:120]
