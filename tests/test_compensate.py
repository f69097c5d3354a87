"""Least-squares compensation against a solve of each row on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune.sparsity.compensate import compensate, damped

FILTERS, INPUTS = 24, 45


def _moments(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator)
    rows = torch.randn(2000, INPUTS, generator=generator) @ mixing
    return rows.T @ rows / len(rows)


def _naive(weight: torch.Tensor, mask: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(weight)):
        kept = mask[row].nonzero().squeeze(1)
        if len(kept):
            target = (weight[row].double() @ matrix)[kept]
            result[row, kept] = torch.linalg.solve(matrix[kept][:, kept], target)
    return result


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shared", [False, True])
def test_compensated_weights_are_the_least_squares_solution_of_every_row(density: float, shared: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(FILTERS, INPUTS, generator=generator)
    mask = torch.rand(FILTERS, INPUTS, generator=generator) < density
    if shared:
        mask = mask[::8].repeat_interleave(8, 0)
    matrix = damped(_moments())
    got = compensate(weight, mask, matrix, torch.linalg.inv(matrix))
    torch.testing.assert_close(got.double(), _naive(weight, mask, matrix), rtol=2e-4, atol=2e-4)
    assert not got[~mask].any()


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("density", [0.4, 0.6])
def test_large_systems_are_solved_to_float64_whatever_their_condition(condition: float, density: float) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = 700
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.logspace(0, -np.log10(condition), inputs, dtype=torch.float64)) @ basis.T
    matrix = (matrix + matrix.T) / 2
    weight = torch.randn(5, inputs, generator=generator)
    mask = torch.rand(5, inputs, generator=generator) < density
    got = compensate(weight, mask, matrix, torch.linalg.inv(matrix)).double()
    # By the residual: at 1e9 the solutions themselves agree to few digits.
    target = (weight.double() @ matrix) * mask
    assert ((got @ matrix) * mask - target).norm() < 1e-6 * target.norm() + 1e-7 * got.norm()
    if condition < 1e9:
        torch.testing.assert_close(got, _naive(weight, mask, matrix), rtol=1e-4, atol=1e-4)


def test_compensation_lowers_the_output_error_of_plain_masking() -> None:
    weight = torch.randn(FILTERS, INPUTS, generator=torch.Generator().manual_seed(2))
    mask = weight.abs() > weight.abs().median()
    matrix = damped(_moments())

    def error(new: torch.Tensor) -> float:
        difference = (new - weight).double()
        return float(((difference @ matrix) * difference).sum())

    got = compensate(weight, mask, matrix, torch.linalg.inv(matrix))
    assert error(got) < 0.5 * error(weight * mask)


def test_dead_inputs_do_not_break_the_solve() -> None:
    moments = _moments()
    moments[3] = 0.0
    moments[:, 3] = 0.0
    matrix = damped(moments)
    weight = torch.randn(FILTERS, INPUTS, generator=torch.Generator().manual_seed(4))
    mask = torch.rand(FILTERS, INPUTS, generator=torch.Generator().manual_seed(5)) < 0.4
    assert torch.isfinite(compensate(weight, mask, matrix, torch.linalg.inv(matrix))).all()
