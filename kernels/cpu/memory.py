"""The memory of a frozen program: buffers with zero halos, packed weights, and their addresses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from autoprune.kernels.cpu.layout import Strides
from autoprune.kernels.formats import aligned

SLACK_BYTES = 4096  # vector loads may run past the last pixel
STAGGER_BYTES = 17 * 64  # buffers must not all start on the same cache sets
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Buffer:
    """Handle of one activation map (batch, channels, height, width) with ``halo`` zero pixels around it."""

    index: int
    batch: int
    channels: int
    height: int
    width: int
    halo: int


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a buffer lies that is a part of another one: ``offset`` bytes, rows and columns from where that begins.

    Attributes:
        strides: Its own; None for those of the other one.
    """

    base: int
    row: int
    column: int
    strides: Strides | None = None
    offset: int = 0


class Memory:
    """Owns every array whose address stands in an instruction."""

    def __init__(
        self,
        buffers: Sequence[Buffer],
        exact: set[int],
        places: Mapping[int, Placed] | None = None,
        zeros: int | None = None,
    ) -> None:
        """Allocate ``buffers``; those in ``exact`` store C channels per pixel, the others the next multiple of 16.

        Args:
            places: Buffers that are parts of others, by index.
            zeros: Index of a buffer that holds zeros, where others hold noise.
        """
        self._arrays: dict[int, npt.NDArray[np.generic]] = {}
        self._made: dict[Hashable, tuple[object, Any]] = {}
        self._wholes: dict[int, npt.NDArray[np.float32]] = {}
        self._interiors: dict[int, npt.NDArray[np.float32]] = {}
        places = places or {}
        noise = np.random.default_rng(0)
        located: dict[int, tuple[int, Strides]] = {}
        for buffer in buffers:
            if buffer.index in places:
                continue
            strides = Strides.of(buffer.channels, buffer.height, buffer.width, buffer.halo, buffer.index in exact)
            shift = buffer.index * STAGGER_BYTES % 4096
            raw = aligned((shift + buffer.batch * strides.image + SLACK_BYTES,), np.uint8)
            located[buffer.index] = self.keep(raw) + shift, strides
            pixels = raw[shift : shift + buffer.batch * strides.image].view(np.float32)
            padded = (buffer.height + 2 * buffer.halo, buffer.width + 2 * buffer.halo)
            pixels = pixels.reshape(buffer.batch, *padded, strides.pixel // 4)
            inside = slice(buffer.halo, buffer.halo + buffer.height), slice(buffer.halo, buffer.halo + buffer.width)
            interior = pixels[:, inside[0], inside[1], : buffer.channels]
            if buffer.index != zeros:
                interior[:] = noise.uniform(-1, 1, interior.shape)  # so that timings alone see plausible numbers
            self._interiors[buffer.index] = interior
            self._wholes[buffer.index] = pixels
        self.size_bytes = sum(buffers[index].batch * strides.image for index, (_, strides) in located.items())
        """Bytes of all buffers, halos included."""

        def locate(index: int) -> tuple[int, Strides]:
            if index not in located:
                place = places[index]
                base, strides = locate(place.base)
                strides = place.strides or strides
                located[index] = (
                    base + place.row * strides.row + place.column * strides.pixel + place.offset, strides
                )
            return located[index]

        found = [locate(buffer.index) for buffer in buffers]
        self.base = [base for base, _ in found]
        self.strides = [strides for _, strides in found]

    def keep(self, array: npt.NDArray[np.generic]) -> int:
        """Own ``array`` and return its address."""
        address = int(array.ctypes.data)
        self._arrays[address] = array
        return address

    def once(self, source: object, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what ``make`` returned the first time for this source and key: strips share their weights."""
        known = self._made.setdefault((id(source), key), (source, None))
        if known[1] is None:
            known = self._made[id(source), key] = (source, make())
        made: Made = known[1]
        return made

    def kept(self, address: int) -> npt.NDArray[np.generic]:
        """Return the array that ``keep`` gave this address."""
        return self._arrays[address]

    def at(self, buffer: Buffer, row: int = 0, col: int = 0) -> int:
        """Return the address of a pixel of image 0."""
        return self.base[buffer.index] + self.strides[buffer.index].at(row, col)

    def interior_NHWC(self, buffer: Buffer) -> npt.NDArray[np.float32]:
        """Return a writable view of the real pixels and channels."""
        return self._interiors[buffer.index]

    def whole_NHWC(self, buffer: Buffer) -> npt.NDArray[np.float32]:
        """Return a view of a buffer with its halo and padding channels."""
        return self._wholes[buffer.index]
