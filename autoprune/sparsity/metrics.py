"""What pruning removed, counted on the weights themselves (METHODS §4).

Sparsity is the fraction of exact zeros. Compression is weights over non-zero weights, on the convolutions alone (the
scope of the published pattern-pruning ratios) and on all parameters. MACs saved follow the layers' real non-zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.core.choices import CK, NM, Block, Channels, Choice, Combined, Dense, Fine, Pattern, Tile, Window
from autoprune.core.layers import LayerSpec
from autoprune.sparsity.masks import group_mean

VALUE_BITS = 32


@dataclass(frozen=True, slots=True)
class LayerSparsity:
    """Counts of one layer.

    Attributes:
        name: Dotted module name.
        choice: Canonical text of the layer's choice.
        weights: Weights of the layer, bias not counted.
        nonzero: Weights that are not exactly zero.
        nominal: Sparsity that the choice asks for, 0..1.
        storage_bits: Size in the format of the choice, indices included.
    """

    name: str
    choice: str
    weights: int
    nonzero: int
    storage_bits: int
    nominal: float = 0.0

    @property
    def sparsity(self) -> float:
        """True sparsity, 0..1."""
        return 1.0 - self.nonzero / self.weights


@dataclass(frozen=True, slots=True)
class SparsityReport:
    """Counts of a network.

    Attributes:
        layers: One entry per convolution and linear layer.
        prunable_sparsity: Exact zeros over the weights of the layers that a choice other than dense covers.
        global_sparsity: Exact zeros of the conv and linear weights over all parameters of the model.
        conv_compression: Convolution weights over their non-zeros.
        all_compression: All parameters (biases and norms included) over the non-zero ones.
        storage_ratio: Bits of all parameters as 32-bit dense values over the bits in the chosen formats.
        inference_macs_saved: Fraction of dense MACs; None when the layers' feature-map sizes are unknown.
    """

    layers: tuple[LayerSparsity, ...]
    prunable_sparsity: float
    global_sparsity: float
    conv_compression: float
    all_compression: float
    storage_ratio: float
    inference_macs_saved: float | None


def true_sparsity(weight: Tensor) -> float:
    """Return the fraction of exact zeros."""
    return 1.0 - int(torch.count_nonzero(weight)) / weight.numel()


def summarise(
    weights: Mapping[str, Tensor],
    choices: Mapping[str, Choice],
    parameters: int,
    layers: Sequence[LayerSpec] | None = None,
) -> SparsityReport:
    """Return the counts of a network.

    Args:
        weights: Name → weight of every convolution and linear layer, (K, C, R, S) or (O, I).
        choices: Name → choice; a layer it does not name is dense.
        parameters: Number of all parameters of the model.
        layers: The traced layers; needed for MACs only.
    """
    rows = []
    for name, weight in weights.items():
        choice = choices.get(name, Dense())
        nonzero = int(torch.count_nonzero(weight))
        rows.append(
            LayerSparsity(
                name, choice.text, weight.numel(), nonzero, storage_bits(weight, choice), _nominal(name, weight, choice)
            )
        )
    removed = sum(row.weights - row.nonzero for row in rows)
    pruned = [row for row in rows if row.choice != Dense.kind]
    conv = [row for row in rows if weights[row.name].dim() == 4]
    counted = sum(row.weights for row in rows)
    bits = sum(row.storage_bits for row in rows) + (parameters - counted) * VALUE_BITS
    densities = {row.name: row.nonzero / row.weights for row in rows}
    return SparsityReport(
        layers=tuple(rows),
        prunable_sparsity=1.0 - _ratio(sum(r.nonzero for r in pruned), sum(r.weights for r in pruned)),
        global_sparsity=removed / parameters,
        conv_compression=_ratio(sum(row.weights for row in conv), sum(row.nonzero for row in conv)),
        all_compression=_ratio(parameters, parameters - removed),
        storage_ratio=_ratio(parameters * VALUE_BITS, bits),
        inference_macs_saved=None if layers is None else inference_macs_saved(layers, densities),
    )


def inference_macs_saved(layers: Sequence[LayerSpec], densities: Mapping[str, float]) -> float:
    """Return ``1 − Σ nnz·H·W / Σ N·H·W`` over conv and linear layers at batch 1.

    Args:
        layers: As traced; H and W are of the output.
        densities: Name → fraction of non-zero weights; absent means dense.
    """
    total = sum(layer.macs for layer in layers)
    return 1.0 - sum(layer.macs * densities.get(layer.name, 1.0) for layer in layers) / total


def training_macs_saved(
    layers: Sequence[LayerSpec], density_steps: Mapping[str, float], steps: int, scoring_passes: float = 0.0
) -> float:
    """Return the fraction of a dense training's MACs that the real masks made unnecessary.

    A step is forward, input gradient and weight gradient: three times the layer's MACs, two for the first layer, whose
    input needs no gradient. All three scale with the mask's density, as the sparse products of METHODS §2 do.

    Args:
        layers: As traced, in execution order.
        density_steps: Name → Σ over steps of the mask's density; absent means dense in every step.
        steps: Optimizer steps taken.
        scoring_passes: Dense forward and backward passes spent on scores beside the training steps.
    """
    if steps == 0:
        return 0.0
    spent = total = 0.0
    for index, layer in enumerate(layers):
        step_macs = layer.macs * (2 if index == 0 else 3)
        total += step_macs * steps
        spent += step_macs * (density_steps.get(layer.name, float(steps)) + scoring_passes)
    return 1.0 - spent / total


def storage_bits(weight: Tensor, choice: Choice, value_bits: int = VALUE_BITS) -> int:
    """Return the bits of a layer's weight in the format of its choice, indices included.

    Formats: dense — values only. fine — CSR rows of single weights. block — per filter group the kept positions' index
    and ``filters`` values each. pattern — per filter group the kept channel groups' index, the pattern's number and its
    values, plus the pool. ck — per filter the kept channels' index and whole kernels. window — per kernel the positions
    in the window. combined — channel index and positions. tile — the kept tiles' index and whole tiles. nm — values and
    their place in the group. channels — the filters that stay. Every row of the first five carries one pointer.

    Args:
        weight: (K, C, R, S) or (O, I), pruned.
        choice: Decides the format; a layer without any zero is dense whatever its choice.
        value_bits: Bits of one value.
    """
    nonzero_KCP = (weight.detach() != 0).reshape(weight.shape[0], weight.shape[1], -1)
    k, c, p = nonzero_KCP.shape
    dense_bits = weight.numel() * value_bits
    if isinstance(choice, Dense) or bool(nonzero_KCP.all()):
        return dense_bits
    nonzero = int(nonzero_KCP.sum())
    kernels = int(nonzero_KCP.any(-1).sum())
    channel_bits, position_bits = _bits(c), _bits(p)
    if isinstance(choice, Fine):
        return nonzero * (value_bits + _bits(c * p)) + _pointers(k, nonzero)
    if isinstance(choice, Block | Tile):
        share = (choice.filters, 1) if isinstance(choice, Block) else (choice.size, choice.size)
        return _group_bits(nonzero_KCP, share, value_bits)
    if isinstance(choice, Pattern):
        return _pattern_bits(nonzero_KCP, choice, value_bits)
    if isinstance(choice, NM):
        return nonzero * (value_bits + _bits(choice.m))
    if isinstance(choice, Channels):
        filters = int(nonzero_KCP.flatten(1).any(1).sum())
        return filters * c * p * value_bits
    if isinstance(choice, CK):
        return kernels * (p * value_bits + channel_bits) + _pointers(k, kernels)
    if isinstance(choice, Window):
        return nonzero * (value_bits + position_bits) + _pointers(k, nonzero)
    if isinstance(choice, Combined):
        return nonzero * (value_bits + position_bits) + kernels * channel_bits + _pointers(k, kernels)
    return dense_bits


def _group_bits(nonzero_KCP: Tensor, share: tuple[int, int], value_bits: int) -> int:
    k, c, p = nonzero_KCP.shape
    kept_BDP = group_mean(nonzero_KCP.float(), share) > 0
    device = nonzero_KCP.device
    sizes_BD = _group_sizes(k, share[0], device)[:, None] * _group_sizes(c, share[1], device)
    groups = int(kept_BDP.sum())
    values = int((kept_BDP.sum(-1) * sizes_BD).sum())
    places = math.ceil(c / share[1]) * p
    return values * value_bits + groups * _bits(places) + _pointers(kept_BDP.shape[0], groups)


def _pattern_bits(nonzero_KCP: Tensor, choice: Pattern, value_bits: int) -> int:
    k, c, p = nonzero_KCP.shape
    filters, channels = choice.share
    kept_BDP = group_mean(nonzero_KCP.float(), choice.share) > 0
    sizes_BD = _group_sizes(k, filters, kept_BDP.device)[:, None] * _group_sizes(c, channels, kept_BDP.device)
    groups = int(kept_BDP.any(-1).sum())
    values = int((kept_BDP.sum(-1) * sizes_BD).sum())
    index_bits = _bits(math.ceil(c / channels)) + _bits(choice.count)
    return values * value_bits + groups * index_bits + choice.count * p + _pointers(kept_BDP.shape[0], groups)


def _nominal(name: str, weight: Tensor, choice: Choice) -> float:
    shape = tuple(int(size) for size in weight.shape)
    return 1.0 - choice.density(LayerSpec(name, "conv" if len(shape) == 4 else "linear", shape))


def _group_sizes(length: int, size: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, size, device=device)
    return (length - starts).clamp_max(size)


def _bits(values: int) -> int:
    """Bits that tell ``values`` possibilities apart."""
    return max(1, math.ceil(math.log2(values))) if values > 1 else 0


def _pointers(rows: int, entries: int) -> int:
    return (rows + 1) * _bits(entries + 1)


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return 1.0 if numerator == 0 else math.inf
    return numerator / denominator
