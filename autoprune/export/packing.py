"""Sparse tensors in a file: the values that are not zero, and one bit for every place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autoprune.core.errors import ModelError

_VALUES, _BITS = "values", "bits"


def pays(value: Tensor) -> bool:
    """Return whether the packed form of a tensor is smaller than the tensor."""
    if value.dim() < 2 or not value.is_floating_point():
        return False
    packed = int(torch.count_nonzero(value)) * value.element_size() + -(-value.numel() // 8)
    return packed < value.numel() * value.element_size()


def pack(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return a tensor's entries in the file."""
    flat = value.detach().cpu().contiguous().flatten()
    alive = flat != 0
    bits = torch.from_numpy(np.packbits(alive.numpy()))
    return {f"{name}.{_VALUES}": flat[alive].contiguous(), f"{name}.{_BITS}": bits}


def unpack(name: str, shape: list[int], stored: dict[str, Tensor]) -> Tensor:
    """Return the tensor of ``shape`` from its entries.

    Raises:
        ModelError: They are missing or of another shape.
    """
    try:
        values, bits = stored[f"{name}.{_VALUES}"], stored[f"{name}.{_BITS}"]
    except KeyError as error:
        raise ModelError(f"the weights lack {error}; apply the policy again.") from None
    size = int(np.prod(shape))
    if bits.dtype != torch.uint8 or len(bits) != -(-size // 8):
        raise ModelError(f"the packed weights of '{name}' are not of shape {tuple(shape)}; apply the policy again.")
    alive = torch.from_numpy(np.unpackbits(bits.numpy(), count=size).astype(bool))
    if int(alive.sum()) != len(values):
        raise ModelError(f"the packed weights of '{name}' do not fit their places; apply the policy again.")
    flat = values.new_zeros(size)
    flat[alive] = values
    return flat.reshape(shape)
