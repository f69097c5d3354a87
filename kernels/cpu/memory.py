"""The memory of a frozen program: buffers with zero halos, packed weights, and their addresses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoprune.kernels.cpu.layout import Strides
from autoprune.kernels.formats import aligned

SLACK_BYTES = 4096  # vector loads may run past the last pixel
STAGGER_BYTES = 17 * 64  # buffers must not all start on the same cache sets


@dataclass(frozen=True, slots=True)
class Buffer:
    """Handle of one activation map (batch, channels, height, width) with ``halo`` zero pixels around it."""

    index: int
    batch: int
    channels: int
    height: int
    width: int
    halo: int


class Memory:
    """Owns every array whose address stands in an instruction."""

    def __init__(self, buffers: list[Buffer], exact: set[int]) -> None:
        """Allocate ``buffers``; those in ``exact`` store C channels per pixel, the others the next multiple of 16."""
        self._arrays: list[npt.NDArray[np.generic]] = []
        self.strides = [Strides.of(b.channels, b.height, b.width, b.halo, b.index in exact) for b in buffers]
        self.base: list[int] = []
        noise = np.random.default_rng(0)
        self._wholes: list[npt.NDArray[np.float32]] = []
        self._interiors: list[npt.NDArray[np.float32]] = []
        for buffer, strides in zip(buffers, self.strides, strict=True):
            shift = buffer.index * STAGGER_BYTES % 4096
            raw = aligned((shift + buffer.batch * strides.image + SLACK_BYTES,), np.uint8)
            self.base.append(self.keep(raw) + shift)
            pixels = raw[shift : shift + buffer.batch * strides.image].view(np.float32)
            padded = (buffer.height + 2 * buffer.halo, buffer.width + 2 * buffer.halo)
            pixels = pixels.reshape(buffer.batch, *padded, strides.pixel // 4)
            inside = slice(buffer.halo, buffer.halo + buffer.height), slice(buffer.halo, buffer.halo + buffer.width)
            interior = pixels[:, inside[0], inside[1], : buffer.channels]
            interior[:] = noise.uniform(-1, 1, interior.shape)  # so that timings alone see plausible numbers
            self._interiors.append(interior)
            self._wholes.append(pixels)

    def keep(self, array: npt.NDArray[np.generic]) -> int:
        """Own ``array`` and return its address."""
        self._arrays.append(array)
        return int(array.ctypes.data)

    def kept(self, address: int) -> npt.NDArray[np.generic]:
        """Return the array that ``keep`` gave this address."""
        return next(array for array in self._arrays if array.ctypes.data == address)

    def at(self, buffer: Buffer, row: int = 0, col: int = 0) -> int:
        """Return the address of a pixel of image 0."""
        return self.base[buffer.index] + self.strides[buffer.index].at(row, col)

    def interior_NHWC(self, buffer: Buffer) -> npt.NDArray[np.float32]:
        """Return a writable view of the real pixels and channels."""
        return self._interiors[buffer.index]

    def whole_NHWC(self, buffer: Buffer) -> npt.NDArray[np.float32]:
        """Return a view of a buffer with its halo and padding channels."""
        return self._wholes[buffer.index]

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers, halos included."""
        return sum(s.image * i.shape[0] for s, i in zip(self.strides, self._interiors, strict=True))
