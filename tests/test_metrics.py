"""Sparsity figures follow the definitions, counted on the weights."""

from __future__ import annotations

import math

import pytest
import torch

from autoprune.core.choices import CK, Block, Choice, Dense, Fine, Pattern, Window
from autoprune.core.layers import LayerSpec
from autoprune.sparsity.masks import make_mask
from autoprune.sparsity.metrics import (
    inference_macs_saved,
    storage_bits,
    summarise,
    training_macs_saved,
    true_sparsity,
)

CONV1 = LayerSpec("a", "conv", (16, 1, 3, 3), output_hw=(8, 8))
CONV2 = LayerSpec("b", "conv", (32, 16, 3, 3), output_hw=(4, 4))
LINEAR = LayerSpec("c", "linear", (10, 32))


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {layer.name: torch.randn(layer.weight_shape, generator=generator) for layer in (CONV1, CONV2, LINEAR)}


def test_true_sparsity_counts_exact_zeros_of_either_sign() -> None:
    assert true_sparsity(torch.tensor([0.0, -0.0, 1e-30, 2.0])) == 0.5


def test_ratios_follow_their_scopes() -> None:
    tensors = weights()
    choice = Fine(0.25)
    tensors["b"] = tensors["b"] * make_mask(tensors["b"], choice)
    report = summarise(tensors, {"b": choice}, parameters=144 + 4608 + 320 + 58, layers=[CONV1, CONV2, LINEAR])
    assert report.prunable_sparsity == pytest.approx(0.75)
    assert report.conv_compression == pytest.approx((144 + 4608) / (144 + 1152))
    assert report.all_compression == pytest.approx(5130 / (5130 - 3456))
    assert report.global_sparsity == pytest.approx(3456 / 5130)
    dense_macs = 144 * 64 + 4608 * 16 + 320
    assert report.inference_macs_saved == pytest.approx(3456 * 16 / dense_macs)


def test_storage_counts_values_and_indices_of_each_format() -> None:
    weight = weights()["b"]
    pointer = math.ceil

    def bits(choice: Choice) -> int:
        return storage_bits(weight * make_mask(weight, choice), choice)

    assert bits(Dense()) == 4608 * 32
    assert bits(Fine(0.25)) == 1152 * (32 + 8) + 33 * pointer(math.log2(1153))
    assert bits(Block(0.25, 16)) == 72 * (16 * 32 + 8) + 3 * pointer(math.log2(73))
    assert bits(Pattern(8, 4, 0.5, (16, 1))) == 16 * (64 * 32 + 4 + 3) + 8 * 9 + 3 * pointer(math.log2(17))
    assert bits(CK(0.5)) == 256 * (9 * 32 + 4) + 33 * pointer(math.log2(257))
    assert bits(Window(2)) == 1024 * (32 + 4) + 33 * pointer(math.log2(1025))


def test_storage_of_an_unpruned_layer_is_dense_whatever_its_choice() -> None:
    assert storage_bits(torch.ones(16, 16, 3, 3), Fine(0.5)) == 16 * 16 * 9 * 32


def test_training_saves_what_inference_saves_for_the_share_of_steps_after_pruning() -> None:
    layers = [CONV1, CONV2, LINEAR]
    saved = training_macs_saved(layers, {"b": 60 + 40 * 0.25, "c": 100.0}, steps=100)
    full = CONV1.macs * 2 + CONV2.macs * 3 + LINEAR.macs * 3
    assert saved == pytest.approx(0.4 * 0.75 * CONV2.macs * 3 / full)
    without_first = training_macs_saved([LINEAR, CONV2], {"b": 70.0}, steps=100)
    assert without_first == pytest.approx(
        (1 - 0.7) * inference_macs_saved([CONV2], {"b": 0.0}) * CONV2.macs * 3 / (CONV2.macs * 3 + LINEAR.macs * 2)
    )


def test_scoring_passes_are_paid_for() -> None:
    base = training_macs_saved([CONV1, CONV2], {"b": 50.0}, steps=100)
    assert training_macs_saved([CONV1, CONV2], {"b": 50.0}, steps=100, scoring_passes=10) == pytest.approx(base - 0.1)


def test_a_layer_pruned_to_nothing_has_infinite_compression() -> None:
    report = summarise({"b": torch.zeros(4, 4, 3, 3)}, {"b": Fine(0.5)}, parameters=144)
    assert math.isinf(report.conv_compression)
    assert report.inference_macs_saved is None
