"""Least-squares compensation against a solve of each row on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune.sparsity.compensate import SLACK, Hessian, compensate

FILTERS, INPUTS = 24, 45


def _moments(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator)
    rows = torch.randn(2000, INPUTS, generator=generator) @ mixing
    return rows.T @ rows / len(rows)


def _output_error(new: torch.Tensor, dense: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    difference = (new - dense).double()
    return ((difference @ matrix) * difference).sum(1)


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
    hessian = Hessian(_moments())
    got = compensate(weight, mask, hessian)
    torch.testing.assert_close(got.double(), _naive(weight, mask, hessian.matrix_DD), rtol=2e-4, atol=2e-4)
    assert not got[~mask].any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("density", [0.45, 0.75])
@pytest.mark.parametrize("spread", [1e1, 1e3, 1e9])  # of the eigenvalues, before damping
def test_large_systems_come_as_close_to_the_least_error_as_they_are_told(
    spread: float, density: float, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a row was solved on its own")

    for direct in ("_solve_kept", "_solve_pruned", "_solve_rows"):
        monkeypatch.setattr(f"autoprune.sparsity.compensate.{direct}", refuse)
    generator = torch.Generator().manual_seed(3)
    inputs = 1200
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q.double()
    scales = torch.logspace(0, -np.log10(spread), inputs, dtype=torch.float64)
    hessian = Hessian((basis * scales) @ basis.T)
    weight = torch.randn(6, inputs, generator=generator)
    mask = torch.rand(6, inputs, generator=generator) < density
    mask[5] = True
    if shared:
        mask = mask[[0, 0, 1, 1, 2, 5]]
    least = _output_error(_naive(weight, mask, hessian.matrix_DD), weight, hessian.matrix_DD)
    for start in (None, weight * 0.5):
        got = compensate(weight, mask, hessian, start_KD=start)
        assert not got[~mask].any()
        reached = _output_error(got, weight, hessian.matrix_DD)
        assert (reached <= (1 + SLACK) * least + 1e-9).all()
    loose = _output_error(compensate(weight, mask, hessian, 0.1), weight, hessian.matrix_DD)
    assert (loose <= 1.1 * least + 1e-9).all()


def test_rows_that_do_not_descend_far_enough_are_solved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.sparsity.compensate._MOST_STEPS", 1)
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(2000, 600, generator=generator) @ torch.randn(600, 600, generator=generator)
    hessian = Hessian(rows.T @ rows / len(rows))
    weight = torch.randn(3, 600, generator=generator)
    mask = torch.rand(3, 600, generator=generator) < 0.5
    got = compensate(weight, mask, hessian)
    torch.testing.assert_close(got.double(), _naive(weight, mask, hessian.matrix_DD), rtol=1e-4, atol=1e-5)


def test_compensation_lowers_the_output_error_of_plain_masking() -> None:
    weight = torch.randn(FILTERS, INPUTS, generator=torch.Generator().manual_seed(2))
    mask = weight.abs() > weight.abs().median()
    hessian = Hessian(_moments())
    got = _output_error(compensate(weight, mask, hessian), weight, hessian.matrix_DD)
    assert got.sum() < 0.5 * _output_error(weight * mask, weight, hessian.matrix_DD).sum()


def test_dead_inputs_do_not_break_the_solve() -> None:
    moments = _moments()
    moments[3] = 0.0
    moments[:, 3] = 0.0
    weight = torch.randn(FILTERS, INPUTS, generator=torch.Generator().manual_seed(4))
    mask = torch.rand(FILTERS, INPUTS, generator=torch.Generator().manual_seed(5)) < 0.4
    assert torch.isfinite(compensate(weight, mask, Hessian(moments))).all()
