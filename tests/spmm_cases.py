"""Cases of the SpMM kernels, and the program that runs them apart from the test process.

``python spmm_cases.py`` needs ``TRITON_INTERPRET=1`` before Triton is imported. It prints one JSON object, case →
figures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from old_interpreter import repair
from torch import Tensor

from autoprune.core.choices import Choice, Fine, Pattern, Window
from autoprune.kernels import reference
from autoprune.kernels.triton.spmm_launch import (
    SpmmShape,
    dweight_configs,
    forward_configs,
    launch_dweight,
    launch_forward,
)
from autoprune.kernels.triton.spmm_layers import pack
from autoprune.kernels.triton.spmm_op import RowIndex
from autoprune.sparsity.masks import make_mask


@dataclass(frozen=True, slots=True)
class Case:
    """One convolution: N, C, H, W of the input; filters, window, stride, padding; its mask."""

    input: tuple[int, int, int, int]
    filters: int
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    choice: Choice = Fine(keep=0.4)  # noqa: RUF009
    half: bool = False
    epilogue: bool = True
    channels_last: bool = False

    @property
    def shape(self) -> SpmmShape:
        return SpmmShape(self.filters, self.input[1], self.window, self.stride, self.padding, self.epilogue)


PATTERN = Pattern(count=8, entries=4, kernels=0.6)
CASES = {
    "3x3-pattern": Case((2, 5, 7, 9), 6, (3, 3), padding=(1, 1), choice=PATTERN),
    "3x3-pattern-half": Case((2, 5, 7, 9), 6, (3, 3), padding=(1, 1), choice=PATTERN, half=True),
    "3x3-window-stride2": Case((1, 4, 9, 8), 5, (3, 3), (2, 2), (1, 1), choice=Window(entries=2)),
    "1x1-channels-last": Case((3, 17, 5, 3), 4, (1, 1), channels_last=True),
    "1x1-padding": Case((1, 6, 4, 4), 3, (1, 1), padding=(1, 2)),
    "1x1-stride2-half": Case((2, 12, 7, 7), 5, (1, 1), (2, 2), half=True),
    "5x5-padding2": Case((1, 3, 8, 11), 4, (5, 5), padding=(2, 2)),
    "7x7-stride2-padding3": Case((1, 3, 15, 13), 4, (7, 7), (2, 2), (3, 3)),
    "3x3-no-epilogue": Case((1, 3, 6, 5), 3, (3, 3), epilogue=False),
    "1x3-uneven-stride": Case((1, 4, 5, 10), 3, (1, 3), (1, 2), (0, 1)),
    "dense": Case((1, 3, 5, 5), 2, (3, 3), padding=(1, 1), choice=Fine(keep=1.0)),
    "few-weights": Case((1, 2, 4, 4), 3, (3, 3), padding=(1, 1), choice=Fine(keep=0.1)),
    "no-weight": Case((1, 2, 4, 4), 3, (3, 3), padding=(1, 1), choice=Fine(keep=0.02)),
}


@dataclass(frozen=True, slots=True)
class Tensors:
    """A case's data; weight, bias and gradients in float32, already rounded to the dtype of the case."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    dy: Tensor


def tensors(case: Case) -> Tensors:
    """Return random data of a case; one filter of several is empty."""
    generator = torch.Generator().manual_seed(7)

    def random(*sizes: int) -> Tensor:
        value = torch.randn(sizes, generator=generator)
        return value.half().float() if case.half else value

    weight = random(case.filters, case.input[1], *case.window)
    weight = weight * make_mask(weight, case.choice)
    if case.filters > 2:
        weight[1] = 0
    out = (case.input[0], case.filters, *case.shape.out_hw(*case.input[2:]))
    return Tensors(random(*case.input), weight, random(case.filters), random(*out), random(*out))


def _scaled(got: Tensor, want: np.ndarray) -> float:
    """Return the largest error over the largest value; NaN where anything was left unwritten."""
    return float(np.abs(got.double().numpy() - want).max(initial=0.0) / max(np.abs(want).max(initial=0.0), 1e-12))


def interpret(case: Case) -> dict[str, float]:
    """Run the kernels of a case on every configuration and return their largest scaled errors."""
    data, shape = tensors(case), case.shape
    dtype = torch.float16 if case.half else torch.float32
    index = RowIndex.of(pack(data.weight).rows())
    x = data.x.to(dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    values = data.weight.flatten()[index.gather_index].to(dtype)
    extra = {"bias": data.bias.to(dtype), "residual": data.residual.to(dtype)} if case.epilogue else {}
    names = {"bias_K": data.bias, "residual_NKHW": data.residual} if case.epilogue else {}
    want = reference.conv2d(
        data.x, data.weight, stride=case.stride, padding=case.padding, relu=case.epilogue, **names
    )
    errors = {"forward": 0.0, "dx": 0.0, "dweight": 0.0}

    def note(name: str, error: float) -> None:
        # max() would drop a NaN.
        errors[name] = error if not error <= errors[name] else errors[name]

    x64, weight64 = (t.double().requires_grad_() for t in (data.x, data.weight))
    torch.nn.functional.conv2d(x64, weight64, None, case.stride, case.padding).backward(data.dy.double())
    assert x64.grad is not None
    assert weight64.grad is not None
    dy = data.dy.to(dtype)
    for config in forward_configs(torch.float16):
        out = torch.full(want.shape, torch.nan, dtype=dtype)
        launch_forward(x, values, index.rows, shape, out, config=config, **extra)
        note("forward", _scaled(out, want))
    if case.stride == (1, 1):
        dx = torch.full(case.input, torch.nan, dtype=dtype)
        launch_forward(dy, values[index.permutation], index.transposed, shape.transposed, dx)
        note("dx", _scaled(dx, x64.grad.numpy()))
    for config in dweight_configs(torch.float16):
        dweight = launch_dweight(x, dy, index.rows, shape, config=config)
        note("dweight", _scaled(dweight, weight64.grad.flatten()[index.gather_index].numpy()))
        again = launch_dweight(x, dy, index.rows, shape, config=config)
        note("dweight", 0.0 if torch.equal(dweight, again) else float("nan"))
    return errors


def main() -> None:
    """Run all cases and print their figures."""
    repair()
    print(json.dumps({name: interpret(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
