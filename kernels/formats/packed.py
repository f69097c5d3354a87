"""What every packed form of a weight can do, and the gather that fills one with a training step's weights.

A form's structure (pointers, positions, permutations) depends on the mask alone. While a mask stays, new weights are
packed by one gather through ``gather_index`` (ClickTrain's fast conversion), never by packing anew.
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Shape = tuple[int, int, int, int]


class Packed(Protocol):
    """A packed (K, C, R, S) weight."""

    @property
    def nbytes(self) -> int:
        """Bytes of the structure and the values."""
        ...

    def gather_index(self) -> npt.NDArray[np.int64]:
        """Return the place in the flat KCRS weight of every stored value, in the shape of the values.

        A value that is always 0 has the number of weights, one past the end.
        """
        ...

    def unpack(self) -> npt.NDArray[np.float32]:
        """Return the (K, C, R, S) float32 weight."""
        ...

    def transpose(self) -> Self:
        """Return the weight of the input gradient in the same form: (C, K, R, S), windows turned by half a turn."""
        ...

    def with_weight(self, weight_KCRS: npt.NDArray[np.float32]) -> Self:
        """Return the same structure with the values of another weight, by one gather."""
        ...


def gather(weight_KCRS: npt.NDArray[np.float32], index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the values that ``index`` names, in its shape; one past the end gives 0."""
    flat = np.append(weight_KCRS.astype(np.float32).ravel(), np.float32(0))
    values: npt.NDArray[np.float32] = flat[index]
    return values


def transposed_weight(weight_KCRS: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Return the weight whose convolution with the output's gradient gives the input's, (C, K, R, S), any dtype."""
    return np.ascontiguousarray(weight_KCRS.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])


def kept_mask(shape: Shape, index: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which weights a form stores, (K, C, R, S); a stored weight may be 0."""
    mask = np.zeros(int(np.prod(shape)) + 1, bool)
    mask[index] = True
    return mask[:-1].reshape(shape)
