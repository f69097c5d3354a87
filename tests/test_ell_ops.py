"""The operators of the Block-ELL convolution on the CPU: right, registered, compilable."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.core.choices import Pattern
from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.formats.ell import BlockELL, Tile
from autoprune.kernels.triton.configs import (
    Config,
    Launch,
    Work,
    all_configs,
    candidates,
    default_config,
    default_tile,
)
from autoprune.kernels.triton.convolution import ELLLayout, ell_conv2d
from autoprune.kernels.triton.layers import ELLConv2d, ELLOptions, best_transpose
from autoprune.kernels.triton.ops import ell_conv, ell_pad, ell_repack
from autoprune.kernels.triton.shapes import EllShape
from autoprune.sparsity.masks import make_mask

_TILE = Tile(32, 32)


def _conv(filters: int = 40, channels: int = 20, window: int = 3, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, filters, window, stride=stride, padding=padding)


def _mask(conv: nn.Conv2d, share: tuple[int, int] = (32, 8)) -> Tensor:
    k, c, r, s = conv.weight.shape
    coarse = torch.rand(-(-k // share[0]), -(-c // share[1]), r, s) < 0.4
    return coarse.repeat_interleave(share[0], 0)[:k].repeat_interleave(share[1], 1)[:, :c]


def _pair(conv: nn.Conv2d, mask: Tensor, options: ELLOptions) -> tuple[nn.Conv2d, ELLConv2d]:
    with torch.no_grad():
        conv.weight.mul_(mask)
    return conv, ELLConv2d.from_conv(conv, mask, options)


_SHAPES = [(40, 20, 3, 1, 1), (64, 16, 3, 2, 1), (33, 3, 7, 2, 3), (16, 24, 1, 1, 0), (8, 8, 5, 1, 2), (24, 8, 1, 1, 1)]


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("master", ["packed", "dense"])
def test_module_is_the_masked_convolution_with_its_gradients(shape: tuple[int, ...], master: str) -> None:
    conv = _conv(*shape)
    mask = _mask(conv)
    options = ELLOptions(tile=_TILE, master=master, relu=True, ring=(1, 2))  # type: ignore[arg-type]
    conv, ell = _pair(conv, mask, options)
    x = torch.randn(3, conv.in_channels, 9, 11, dtype=torch.float32)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    plain = conv(xs[0])
    residual = torch.randn_like(plain)
    want = F.pad(F.relu(plain + residual), (2, 2, 1, 1))
    got = ell(xs[1], residual)
    torch.testing.assert_close(got, want)
    gradient = torch.randn_like(want)
    want.backward(gradient)
    got.backward(gradient)
    torch.testing.assert_close(xs[1].grad, xs[0].grad)
    assert ell.bias is not None and conv.bias is not None  # noqa: PT018
    torch.testing.assert_close(ell.bias.grad, conv.bias.grad)
    assert conv.weight.grad is not None
    masked = conv.weight.grad * mask
    packed = BlockELL.pack(conv.weight, mask, _TILE)
    torch.testing.assert_close(ell.weight.grad, masked if master == "dense" else packed.with_weight(masked).weight)
    torch.testing.assert_close(ell.dense_weight(), conv.weight.detach())


@pytest.mark.parametrize("share", [(32, 8), (1, 1)])
def test_packed_training_never_wakes_a_pruned_weight(share: tuple[int, int]) -> None:
    conv = _conv()
    mask = _mask(conv, share)
    conv, ell = _pair(conv, mask, ELLOptions(tile=_TILE, master="packed"))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for m in (conv, ell)]
    for _ in range(3):
        x = torch.randn(2, 20, 6, 6)
        for module, optimizer in zip((conv, ell), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if module is conv:
                assert conv.weight.grad is not None
                conv.weight.grad.mul_(mask)
            optimizer.step()
    torch.testing.assert_close(ell.dense_weight(), conv.weight.detach())
    assert not ell.dense_weight()[~mask].any()


def test_chain_reads_the_ring_its_producer_wrote() -> None:
    first, second = _conv(24, 8), _conv(16, 24, 3, 2, 1)
    x = torch.randn(2, 8, 7, 7)
    want = second(first(x).relu())
    ring = ELLConv2d.from_conv(first, options=ELLOptions(tile=_TILE, relu=True, ring=(1, 1)))
    reader = ELLConv2d.from_conv(second, options=ELLOptions(tile=_TILE, prepadded=True))
    torch.testing.assert_close(reader(ring(x)), want)


def test_frozen_module_folds_a_batchnorm_and_has_no_parameters() -> None:
    conv, norm = _conv(), nn.BatchNorm2d(40).eval()
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: PT018
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    mask = _mask(conv)
    conv, ell = _pair(conv, mask, ELLOptions(tile=_TILE, norm=norm, relu=True))
    x = torch.randn(1, 20, 5, 5)
    torch.testing.assert_close(ell(x), norm(conv(x)).relu(), rtol=1e-5, atol=1e-5)
    assert list(ell.parameters()) == []
    assert ell.nbytes == ell.weight.nbytes + ell.groups.nbytes + 160
    copy = ELLConv2d.from_conv(conv, mask, ELLOptions(tile=_TILE, norm=norm, relu=True))
    copy.load_state_dict(ell.state_dict())
    torch.testing.assert_close(copy(x), ell(x))


def _operator_calls() -> dict[str, tuple[Callable[..., object], tuple[object, ...]]]:
    conv = _conv()
    mask = _mask(conv)
    pack, back = BlockELL.pack(conv.weight, mask, _TILE), BlockELL.pack(conv.weight, mask, _TILE).transpose()
    shape = EllShape(40, 20, (3, 3), halo=(1, 1), ring=(1, 1), relu=True)
    strided = EllShape(40, 20, (3, 3), (2, 2), (1, 1))
    x = F.pad(torch.randn(2, 24, 5, 5), (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    residual, bias = torch.randn(2, 40, 5, 5, requires_grad=True), torch.randn(40, requires_grad=True)
    weight, extra = pack.weight.clone().requires_grad_(), [pack.scatter_index(), back.groups, back.index_into(pack)]
    x.requires_grad_()
    return {
        "conv": (ell_conv, (x, weight, pack.groups, bias, residual, extra, shape.integers + Launch().integers)),
        "strided": (ell_conv, (x, weight, pack.groups, None, None, [], strided.integers + Launch().integers)),
        "pad": (ell_pad, (torch.randn(2, 20, 5, 5, requires_grad=True), [1, 2])),
        "repack": (ell_repack, (conv.weight, pack.gather_index(), pack.scatter_index())),
    }


@pytest.mark.parametrize("name", ["conv", "strided", "pad", "repack"])
def test_operator_passes_opcheck(name: str) -> None:
    operator, arguments = _operator_calls()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own tracing
        torch.library.opcheck(operator, arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [1, 2])
def test_compiled_forward_and_backward_are_the_eager_ones(stride: int) -> None:
    conv = _conv(16, 8, 3, stride)
    mask = _mask(conv, (1, 1))
    _, ell = _pair(conv, mask, ELLOptions(tile=_TILE, master="packed", relu=True))
    torch._dynamo.reset()
    compiled = torch.compile(ell, fullgraph=True)
    results = []
    for module in (ell, compiled):
        x = torch.linspace(-1, 1, 2 * 8 * 5 * 5).reshape(2, 8, 5, 5).requires_grad_()
        ell.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own compiler
            y = module(x)
            y.square().sum().backward()
        assert x.grad is not None
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in ell.parameters() if p.grad is not None)))
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gradients_return_in_the_masters(dtype: torch.dtype) -> None:
    conv = _conv()
    conv, ell = _pair(conv, _mask(conv), ELLOptions(tile=_TILE, master="packed"))
    x = torch.randn(2, 20, 5, 5)
    with torch.autocast("cpu", dtype=dtype):
        y = ell(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), conv(x), rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert ell.weight.grad is not None
    assert ell.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("share", "kernels", "tile"),
    [((64, 8), 1.0, None), ((64, 8), 0.5, None), ((64, 64), 1.0, 128), ((64, 64), 0.5, 128), ((32, 32), 0.25, 32)],
)
def test_input_gradient_is_sparse_where_the_mask_is_shared_by_enough_channels(
    share: tuple[int, int], kernels: float, tile: int | None
) -> None:
    """By count: an unshared tile of the transposed pack multiplies nearly all of the layer."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256, 3, 3)
    mask = make_mask(weight, Pattern(count=8, entries=4, kernels=kernels, share=share), balance="filter")
    packed = BlockELL.pack(weight.bfloat16(), mask, Tile(64, 64))
    back = best_transpose(packed)
    assert (None if back is None else back.tile.filters) == tile
    if back is None:
        # Seven to nine times in ten some channel of a tile keeps what the others drop.
        assert all(packed.transpose(Tile(bn, 64)).density > 0.7 for bn in (32, 64, 128))
    else:
        assert back.density < 0.62
        assert torch.equal(back.unpack(), packed.unpack().flip(2, 3).transpose(0, 1))


def test_wrong_inputs_are_refused() -> None:
    ell = ELLConv2d.from_conv(_conv(), options=ELLOptions(tile=_TILE))
    with pytest.raises(ModelError, match="want \\(N, 20, H, W\\)"):
        ell(torch.randn(1, 19, 5, 5))
    with pytest.raises(ModelError, match="cast one of them"):
        ell(torch.randn(1, 20, 5, 5).half())
    with pytest.raises(ModelError, match="smaller than its window"):
        ell_conv2d(torch.randn(1, 20, 2, 2), ell.weight, ELLLayout(ell.groups), EllShape(40, 20, (3, 3)))
    with pytest.raises(ModelError, match="groups 20"):
        ELLConv2d.from_conv(nn.Conv2d(20, 20, 3, groups=20))
    with pytest.raises(ModelError, match="cannot be folded"):
        ELLConv2d.from_conv(_conv(), options=ELLOptions(master="packed", norm=nn.BatchNorm2d(40)))
    with pytest.raises(ModelError, match="without running statistics"):
        ELLConv2d.from_conv(_conv(), options=ELLOptions(norm=nn.BatchNorm2d(40, track_running_stats=False)))


_LAYER = LayerSpec("conv", "conv", (256, 256, 3, 3), padding=(1, 1), input_hw=(14, 14), output_hw=(14, 14))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_forward_tile_has_a_configuration_of_both_kernels(dtype: torch.dtype) -> None:
    found = candidates(_LAYER, 128, dtype)
    assert found
    assert set(found) <= set(all_configs(dtype))
    for config in found:
        tile = Tile(config.bn, config.bk)
        packed = BlockELL.pack(torch.randn(8, 8, 1, 1), tile=tile)
        assert packed.weight.shape[2:] == (config.bk, config.bn)
        for kind in ("forward", "dweight"):
            chosen = Launch().choose(kind, tile, Work(1000, 256, dtype))  # type: ignore[arg-type]
            assert chosen.fits(tile)
            assert chosen.kind == kind
    assert default_tile(_LAYER, 128, dtype) == Tile(found[0].bn, found[0].bk)


def test_narrow_layers_are_not_offered_wide_tiles() -> None:
    narrow = replace(_LAYER, weight_shape=(16, 16, 3, 3))
    assert {c.bn for c in candidates(narrow, 128, torch.bfloat16)} == {32}
    assert candidates(replace(_LAYER, dilation=(2, 2)), 1, torch.bfloat16) == []
    assert candidates(replace(_LAYER, groups=2), 1, torch.bfloat16) == []
    with pytest.raises(ModelError, match="dilation"):
        default_tile(replace(_LAYER, dilation=(2, 2)), 1, torch.bfloat16)


def test_launch_survives_an_operator_schema() -> None:
    forward, dweight = all_configs(torch.bfloat16)[0], Config("dweight", 64, 64, 64, 4, 3)
    shape = EllShape(40, 20, (3, 5), (2, 1), (1, 2), (0, 3), True)
    for launch in (Launch(), Launch(forward, None, dweight), Launch(forward, forward, dweight)):
        integers = shape.integers + launch.integers
        assert (EllShape.read(integers), Launch.read(integers)) == (shape, launch)
    with pytest.raises(ModelError, match="its tile must be the pack's"):
        Launch(forward).choose("forward", Tile(32, 32), Work(1000, 256))
    with pytest.raises(ModelError, match="pack with one of"):
        default_config("forward", Tile(16, 16), Work(1000, 256))
