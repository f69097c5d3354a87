"""Geometry of one Block-ELL convolution, and whether the kernel serves a layer. No Triton here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.formats.ell import GROUP, padded

MAX_STRIDE, MAX_PADDING, MAX_WINDOW = 4, 3, 7


def cdiv(count: int, size: int) -> int:
    """Return ``count / size`` rounded up."""
    return -(-count // size)


def refusal(layer: LayerSpec) -> str | None:
    """Return why the kernel does not serve a layer, or None where it does."""
    if layer.op != "conv":
        return "not a convolution"
    if layer.groups != 1:
        return f"{layer.groups} groups, not 1"
    if layer.dilation != (1, 1):
        return f"dilation {layer.dilation}, not 1"
    if max(layer.stride) > MAX_STRIDE or max(layer.padding) > MAX_PADDING or max(layer.window) > MAX_WINDOW:
        return f"stride above {MAX_STRIDE}, padding above {MAX_PADDING} or window above {MAX_WINDOW}"
    return None


@dataclass(frozen=True, slots=True)
class EllShape:
    """What a convolution is besides its tensors.

    Attributes:
        filters, channels: K and C without their padding to 8.
        window: (R, S).
        stride: (rows, columns), 1 to 4.
        halo: Rows and columns of zeros on each side that the input comes with: the convolution's padding.
        ring: Rows and columns of zeros to write on each side of the output: the padding of its reader.
        relu: Whether negative results become 0.
    """

    filters: int
    channels: int
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    halo: tuple[int, int] = (0, 0)
    ring: tuple[int, int] = (0, 0)
    relu: bool = False

    def __post_init__(self) -> None:
        for name, values, low, high in (
            ("window", self.window, 1, MAX_WINDOW),
            ("stride", self.stride, 1, MAX_STRIDE),
            ("padding", self.halo, 0, MAX_WINDOW - 1),
            ("ring", self.ring, 0, MAX_WINDOW - 1),
        ):
            if not low <= min(values) <= max(values) <= high:
                raise ModelError(
                    f"Block-ELL convolution: {name} {values}: allowed are {low} to {high}; keep the layer dense."
                )

    @staticmethod
    def of(layer: LayerSpec, *, ring: tuple[int, int] = (0, 0), relu: bool = False) -> EllShape:
        """Return the geometry of a layer.

        Raises:
            ModelError: The kernel does not serve the layer.
        """
        reason = refusal(layer)
        if reason is not None:
            raise ModelError(f"layer '{layer.name}': no Block-ELL kernel: {reason}; keep it dense.")
        return EllShape(layer.filters, layer.channels, layer.window, layer.stride, layer.padding, ring, relu)

    def out_hw(self, height: int, width: int) -> tuple[int, int]:
        """Return (P, Q) for an input of ``height`` × ``width`` with its halo."""
        return (height - self.window[0]) // self.stride[0] + 1, (width - self.window[1]) // self.stride[1] + 1

    def out_shape(self, x_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the NHWC shape of the output with its ring for an input NCHW with its halo."""
        p, q = self.out_hw(x_shape[2], x_shape[3])
        return x_shape[0], p + 2 * self.ring[0], q + 2 * self.ring[1], padded(self.filters, GROUP)

    @property
    def integers(self) -> list[int]:
        """The geometry as a flat list, for an operator's schema."""
        flat: list[int] = []
        for value in astuple(self):
            flat += [int(v) for v in value] if isinstance(value, tuple) else [int(value)]
        return flat

    @staticmethod
    def read(values: Sequence[int]) -> EllShape:
        """Return the geometry that ``integers`` spells at the beginning of ``values``."""
        k, c, r, s, sh, sw, ph, pw, oh, ow, relu = values[:11]
        return EllShape(k, c, (r, s), (sh, sw), (ph, pw), (oh, ow), bool(relu))
