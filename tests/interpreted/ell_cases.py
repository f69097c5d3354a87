"""Block-ELL kernels in Triton's interpreter against the definition in float64; run by ``test_triton_ell``.

The process needs ``TRITON_INTERPRET=1`` before Triton is imported, so these cases are no part of the ordinary run. The
interpreter's bfloat16 arithmetic is not bfloat16's: float32 and float16 only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from autoprune.kernels import reference
from autoprune.kernels.formats.ell import BlockELL, Tile
from autoprune.kernels.triton import copies, ell_run
from autoprune.kernels.triton.configs import Config, Launch
from autoprune.kernels.triton.shapes import EllShape

_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """A convolution; ``size`` is (batch, height, width)."""

    filters: int
    channels: int
    window: tuple[int, int]
    size: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    ring: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    epilogue: bool = True
    density: float = 0.3

    @property
    def shape(self) -> EllShape:
        return EllShape(
            self.filters, self.channels, self.window, self.stride, self.padding, self.ring, relu=self.epilogue
        )


_CASES = {
    "3x3": Case(40, 24, (3, 3), (1, 7, 5), padding=(1, 1), ring=(1, 1)),
    "3x3 half": Case(40, 24, (3, 3), (3, 7, 5), padding=(1, 1), ring=(2, 1), dtype=torch.float16),
    "3x3 dense mask": Case(32, 8, (3, 3), (3, 5, 4), padding=(1, 1), density=1.0, epilogue=False),
    "3x3 nothing kept": Case(16, 8, (3, 3), (1, 4, 4), padding=(1, 1), density=0.0),
    "channels not of 8": Case(20, 13, (3, 3), (1, 6, 6), padding=(1, 1), ring=(1, 1)),
    "1x1": Case(72, 40, (1, 1), (3, 3, 5)),
    "1x1 padding": Case(16, 16, (1, 1), (1, 3, 4), padding=(2, 1), ring=(3, 0)),
    "5x5 stride 2 half": Case(32, 16, (5, 5), (3, 9, 7), (2, 2), (2, 2), dtype=torch.float16),
    "7x7 stride 2": Case(16, 8, (7, 7), (1, 13, 11), (2, 2), (3, 3)),
    "3x3 stride 3": Case(16, 16, (3, 3), (1, 10, 8), (3, 2), (1, 0)),
    "stride 4": Case(16, 8, (3, 3), (3, 9, 9), (4, 4), (1, 1)),
    "1x3": Case(16, 16, (1, 3), (1, 4, 9), padding=(0, 1)),
    "no padding": Case(32, 16, (3, 3), (3, 6, 5)),
    "one pixel": Case(32, 16, (3, 3), (1, 1, 1), padding=(1, 1), ring=(1, 1)),
}


@pytest.fixture(autouse=True)
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh buffer with NaN: outputs, halos, rings and workspaces must all be written."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        out: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


class Problem:
    """Random tensors of a case, its pack, and its truth in float64."""

    def __init__(self, case: Case, tile: Tile) -> None:
        torch.manual_seed(0)
        k, c, (r, s) = case.filters, case.channels, case.window
        groups = torch.rand(-(-k // tile.filters), -(-c // 8), r, s) < case.density
        mask = groups.repeat_interleave(tile.filters, 0)[:k].repeat_interleave(8, 1)[:, :c]
        n, h, w = case.size
        self.case, self.shape = case, case.shape
        self.x = torch.randn(n, c, h, w).to(case.dtype)
        weight = (torch.randn(k, c, r, s) * mask / (c * r * s) ** 0.5).to(case.dtype)
        self.pack = BlockELL.pack(weight, mask, tile)
        self.transposed = self.pack.transpose()
        self.bias = torch.randn(k).to(case.dtype) if case.epilogue else None
        self.x_padded = ell_run.pad(self.x, case.padding)
        p, q = self.shape.out_hw(*self.x_padded.shape[2:])
        self.residual = torch.randn(n, k, p, q).to(case.dtype) if case.epilogue else None
        self.dy = torch.randn(n, k, p, q).to(case.dtype)
        self.weight = weight

    def truth(self) -> np.ndarray:
        return reference.conv2d(
            self.x, self.weight, self.bias, stride=self.case.stride, padding=self.case.padding,
            residual_NKHW=self.residual, relu=self.case.epilogue,
        )  # fmt: skip

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of x and weight of the convolution alone, float64."""
        x, weight = self.x.double().requires_grad_(), self.weight.double().requires_grad_()
        y = torch.nn.functional.conv2d(x, weight, None, self.case.stride, self.case.padding)
        return torch.autograd.grad(y, (x, weight), self.dy.double())

    def run(self, launch: Launch) -> Tensor:
        residual = None if self.residual is None else ell_run.pad(self.residual, (0, 0))
        return ell_run.forward(
            self.x_padded, self.pack.weight, self.pack.groups, self.bias, residual, self.shape, launch
        )

    def close(self, got: Tensor, want: np.ndarray | Tensor) -> None:
        truth = torch.as_tensor(want)
        limit = _TOLERANCE[self.case.dtype] * max(1.0, float(truth.abs().max()))
        assert got.shape == truth.shape
        assert float((got.double() - truth).abs().max()) <= limit


# Tiles of 16 have no configuration of their own, small ones keep the interpreter fast: the code is the same.
_TILE = Tile(16, 16)
_LAUNCH = Launch(
    Config("forward", 16, 16, 16, 4, 2), Config("forward", 16, 16, 16, 4, 2), Config("dweight", 32, 16, 16, 4, 2)
)


@pytest.fixture(params=_CASES.values(), ids=_CASES.keys())
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, _TILE)


def test_forward_is_the_convolution_in_a_ring_of_zeros(problem: Problem) -> None:
    out = problem.run(_LAUNCH)
    k, (rows, columns) = problem.case.filters, problem.case.ring
    inner = out[:, :, rows : out.shape[2] - rows, columns : out.shape[3] - columns]
    problem.close(inner[:, :k], problem.truth())
    rest = out.clone()
    rest[:, :k, rows : out.shape[2] - rows, columns : out.shape[3] - columns] = 0
    assert not rest.any()  # NaN would count as true


def test_weight_gradient_is_that_of_the_kept_places(problem: Problem) -> None:
    dy = ell_run.pad(problem.dy, (0, 0))
    got = ell_run.weight_gradient(dy, problem.x_padded, problem.pack.groups, _TILE, problem.shape, _LAUNCH)
    _, want = problem.gradients()
    problem.close(got, problem.pack.with_weight(want).weight)


def test_input_gradient_is_the_dense_one_with_a_halo_of_zeros(problem: Problem) -> None:
    case, dy = problem.case, ell_run.pad(problem.dy, (0, 0))
    if case.stride == (1, 1):
        transposed = (problem.transposed.groups, problem.transposed.index_into(problem.pack))
        got = ell_run.input_gradient(
            dy, problem.x_padded.shape, problem.pack.weight, transposed, problem.shape, _LAUNCH
        )
    else:
        scatter = problem.pack.scatter_index()
        dense = ell_run.dense_weight(problem.pack.weight, problem.pack.groups, scatter, problem.shape)
        assert torch.equal(dense, problem.weight)
        got = ell_run.dense_input_gradient(dy, problem.x_padded.shape, dense, problem.shape)
    assert got.shape == problem.x_padded.shape
    want = torch.zeros(got.shape, dtype=torch.float64)
    (rows, columns), (h, w) = case.padding, problem.x.shape[2:]
    want[:, : case.channels, rows : rows + h, columns : columns + w] = problem.gradients()[0]
    problem.close(got, want)


@pytest.mark.parametrize("config", [Config("dweight", 32, 16, 16, 4, 2), Config("dweight", 64, 16, 32, 4, 2)])
def test_weight_gradient_split_into_parts_is_the_same_every_time(config: Config) -> None:
    problem = Problem(replace(_CASES["3x3"], size=(3, 15, 13), epilogue=False), _TILE)
    dy, launch = ell_run.pad(problem.dy, (0, 0)), Launch(dweight=config)
    runs = [
        ell_run.weight_gradient(dy, problem.x_padded, problem.pack.groups, _TILE, problem.shape, launch)
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    problem.close(runs[0], problem.pack.with_weight(problem.gradients()[1]).weight)


@pytest.mark.parametrize("tile", [Tile(32, 32), Tile(64, 32), Tile(64, 64)])
def test_default_configurations_compute_it_too(tile: Tile) -> None:
    dtype = torch.float16 if tile.depth == 64 else torch.float32
    problem = Problem(Case(70, 24, (3, 3), (1, 9, 8), padding=(1, 1), epilogue=False, dtype=dtype), tile)
    problem.close(problem.run(Launch())[:, :70], problem.truth())
    dy = ell_run.pad(problem.dy, (0, 0))
    got = ell_run.weight_gradient(dy, problem.x_padded, problem.pack.groups, tile, problem.shape, Launch())
    problem.close(got, problem.pack.with_weight(problem.gradients()[1]).weight)


@pytest.mark.parametrize("tile", [Tile(32, 32), Tile(64, 64)])
def test_input_gradient_in_another_tile_than_the_forward_pass(tile: Tile) -> None:
    case = Case(40, 72, (3, 3), (1, 5, 6), padding=(1, 1), epilogue=False, dtype=torch.float16)
    problem = Problem(case, Tile(64, 32))
    back = problem.pack.transpose(tile)
    transposed = (back.groups, back.index_into(problem.pack))
    dy = ell_run.pad(problem.dy, (0, 0))
    got = ell_run.input_gradient(
        dy, problem.x_padded.shape, problem.pack.weight, transposed, problem.shape, Launch()
    )
    problem.close(got[:, :72, 1:6, 1:7], problem.gradients()[0])


def test_inputs_are_read_where_they_lie_when_they_can_be() -> None:
    problem = Problem(_CASES["no padding"], _TILE)
    n, c, h, w = problem.x.shape
    inside = torch.randn(n, h + 4, w + 2, c).permute(0, 3, 1, 2)[:, :, 2 : 2 + h, 1 : 1 + w]
    inside[:] = problem.x
    problem.x_padded = inside
    assert ell_run.readable(inside.permute(0, 2, 3, 1)).data_ptr() == inside.data_ptr()
    problem.close(problem.run(_LAUNCH), problem.truth())
    problem.x_padded = problem.x.contiguous()  # NCHW: copied
    problem.close(problem.run(_LAUNCH), problem.truth())


def test_take_gives_zero_one_past_the_end() -> None:
    source = torch.randn(5, 7)
    index = torch.tensor([[0, 35, 34], [35, 8, 1]], dtype=torch.int32)
    flat = torch.cat([source.flatten(), torch.zeros(1)])
    assert torch.equal(copies.launch_take(source, index), flat[index.long()])
