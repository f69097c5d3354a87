"""Row-tiled SpMM: kernels in the interpreter, operator, layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from spmm_cases import CASES, Case, tensors
from torch import Tensor, nn

from autoprune.core.choices import Fine, Pattern
from autoprune.core.errors import ModelError, UnknownName
from autoprune.core.layers import LayerSpec
from autoprune.kernels import reference
from autoprune.kernels.triton import spmm_launch, spmm_layers
from autoprune.kernels.triton.spmm_layers import SparseConv2d, SparseLinear, pack
from autoprune.kernels.triton.spmm_op import RowIndex, dense_weight, sparse_conv
from autoprune.sparsity.masks import make_mask

# Largest error over the largest value: rounding of inputs is in the reference too, so what is left is that of outputs.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@cache
def _figures() -> dict[str, dict[str, float]]:
    command = [sys.executable, str(Path(__file__).with_name("spmm_cases.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter_agree_with_float64(name: str) -> None:
    errors = _figures()[name]
    tolerance = TOLERANCE[torch.float16 if CASES[name].half else torch.float32]
    for part, error in errors.items():
        assert error <= tolerance, part


def _arguments(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, RowIndex, Tensor, Tensor]:
    data = tensors(case)
    index = RowIndex.of(pack(data.weight).rows())
    values = data.weight.flatten()[index.gather_index]
    x, values, bias, residual = (t.to(dtype).requires_grad_() for t in (data.x, values, data.bias, data.residual))
    return x, values, index, bias, residual


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_operator_and_its_gradients_agree_with_the_dense_layer(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x, values, index, bias, residual = _arguments(case, dtype)
    got = sparse_conv(x, values, index, case.shape, bias=bias, residual=residual)
    weight = dense_weight(values.detach(), index.gather_index, case.shape).double()
    doubles = [t.detach().double().requires_grad_() for t in (x, bias, residual)]
    weight.requires_grad_()
    want = torch.nn.functional.conv2d(doubles[0], weight, doubles[1], case.stride, case.padding) + doubles[2]
    want = want.relu() if case.epilogue else want
    plain = reference.conv2d(
        x.detach().double(), weight.detach(), bias.detach().double(), stride=case.stride, padding=case.padding,
        residual_NKHW=residual.detach().double(), relu=case.epilogue,
    )  # fmt: skip
    np.testing.assert_allclose(got.detach().double(), plain, atol=TOLERANCE[dtype] * np.abs(plain).max())
    # Where rounding decides whether a result is above 0, gradients may differ.
    dy = tensors(case).dy.to(dtype) * (want.detach().abs() > 0.1)
    got.backward(dy)
    want.backward(dy.double())
    assert weight.grad is not None
    pairs = [(t.grad, d.grad) for t, d in zip((x, bias, residual), doubles, strict=True)]
    for mine, true in [*pairs, (values.grad, weight.grad.flatten()[index.gather_index])]:
        assert mine is not None
        assert true is not None
        np.testing.assert_allclose(mine.double(), true, atol=TOLERANCE[dtype] * np.abs(true.numpy()).max(initial=1.0))


# The checks themselves look at gradients of views.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["3x3-pattern", "3x3-window-stride2", "3x3-no-epilogue"])
def test_operator_keeps_the_rules_of_operators(name: str) -> None:
    case = CASES[name]
    x, values, index, bias, residual = _arguments(case, torch.float32)
    extras = (bias, residual) if case.epilogue else (None, None)
    arguments = (x, values, *extras, index.tensors, case.shape.integers, index.rows.longest, "")
    torch.library.opcheck(torch.ops.autoprune.sparse_conv.default, arguments)
    dy = torch.randn(case.input[0], case.filters, *case.shape.out_hw(*case.input[2:]))
    rest = (index.tensors, case.shape.integers, index.rows.longest, [True, True])
    torch.library.opcheck(
        torch.ops.autoprune.sparse_conv_backward.default, (dy, x.detach(), values.detach(), *rest)
    )


def _layer(stride: int = 1) -> tuple[nn.Conv2d, SparseConv2d]:
    torch.manual_seed(3)
    conv = nn.Conv2d(6, 8, 3, stride=stride, padding=1)
    with torch.no_grad():
        conv.weight.mul_(make_mask(conv.weight, Pattern(count=4, entries=4, kernels=0.7)))
    return conv, SparseConv2d(conv)


@pytest.mark.parametrize("stride", [1, 2])
def test_compiled_graph_runs_whole_forward_and_backward(stride: int) -> None:
    conv, layer = _layer(stride)
    x = torch.randn(2, 6, 8, 8)
    step = torch.compile(lambda x: layer(x).relu().square().sum(), fullgraph=True, backend="aot_eager")
    step(x).backward()
    conv(x).relu().square().sum().backward()
    assert layer.values.grad is not None
    assert conv.weight.grad is not None
    torch.testing.assert_close(layer.values.grad, conv.weight.grad.flatten()[layer.index.gather_index])


def test_autocast_runs_the_layer_in_its_dtype_and_trains_full_weights() -> None:
    conv, layer = _layer()
    x = torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32
    torch.testing.assert_close(got.float(), conv(x), atol=0.05, rtol=0.05)


def test_layer_takes_the_weights_of_the_next_step_by_one_gather() -> None:
    conv, layer = _layer()
    with torch.no_grad():
        conv.weight.mul_(1.5)
    layer.set_weight(conv.weight)
    torch.testing.assert_close(layer.dense(), conv.weight.detach())
    x = torch.randn(1, 6, 5, 5)
    torch.testing.assert_close(layer(x), conv(x))
    assert layer.format == "fkw"
    assert layer.weight_bytes == 4 * (2 * layer.values.numel() + 8 + 9 + 8)


def test_layer_survives_a_state_dict() -> None:
    conv, layer = _layer()
    other = SparseConv2d(nn.Conv2d(6, 8, 3, padding=1), mask=conv.weight != 0)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, 5, 5)
    torch.testing.assert_close(other(x), conv(x))


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,)])
def test_linear_layer_takes_samples_of_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7)
    with torch.no_grad():
        linear.weight.mul_(make_mask(linear.weight, Fine(keep=0.3)))
    layer = SparseLinear(linear)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.format == "csr"
    with pytest.raises(ModelError, match="12"):
        layer(torch.randn(4, 11))


def test_pixels_of_an_empty_batch_are_none() -> None:
    _, layer = _layer()
    assert layer(torch.randn(0, 6, 5, 5)).shape == (0, 8, 5, 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SparseConv2d(nn.Conv2d(4, 4, 3, groups=2)), "groups=2"),
        (lambda: SparseConv2d(nn.Conv2d(4, 4, 3, dilation=2)), "dilation"),
        (lambda: SparseConv2d(nn.Conv2d(4, 4, 3, padding="same")), "padding='same'"),
        (lambda: SparseConv2d(nn.Conv2d(4, 4, 3))(torch.randn(1, 4, 2, 2)), "smaller than the window"),
        (lambda: SparseConv2d(nn.Conv2d(4, 4, 3))(torch.randn(1, 3, 4, 4)), r"\(N, 4, H, W\)"),
        (lambda: SparseConv2d(nn.Conv2d(4, 4, 3))(torch.randn(1, 4, 4, 4).half()), "torch.float16"),
    ],
)
def test_what_the_layer_cannot_run_is_told_in_words(make: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()  # type: ignore[operator]


def test_refusals_name_the_reason() -> None:
    layer = LayerSpec("conv", "conv", (8, 8, 3, 3), groups=1, dilation=(2, 2), input_hw=(8, 8), output_hw=(4, 4))
    assert "dilation" in (spmm_layers.refusal(layer) or "")
    assert spmm_layers.refusal(LayerSpec("fc", "linear", (8, 8))) is None


def test_small_maps_get_narrow_tiles_and_large_ones_wide() -> None:
    configs = spmm_launch.forward_configs(torch.float16)
    assert spmm_launch.pick(configs, 64, 49) is configs[-1]
    assert spmm_launch.pick(configs, 64, 128 * 56 * 56) is configs[0]


def test_configurations_are_named_and_read_back() -> None:
    for config in (*spmm_launch.forward_configs(torch.float16), *spmm_launch.dweight_configs(torch.float16)):
        assert spmm_launch.SpmmConfig.read(config.text) == config
    assert spmm_launch.SpmmConfig.read("") is None
    with pytest.raises(UnknownName, match="Did you mean '256x8-w4'"):
        spmm_launch.SpmmConfig.read("256x8-w2")


def test_importing_the_layers_does_not_import_the_kernels() -> None:
    code = "import sys; from autoprune.kernels.triton import spmm_layers as layers; "
    code += "sys.exit('autoprune.kernels.triton.spmm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
