"""Forward passes that write into their own maps: the same results, and only where nothing else reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from autoprune.envs.network import Recalibrator, StitchedNetwork, recalibrate
from autoprune.envs.overwriting import overwriting
from autoprune.envs.prefix import PrefixCache


class _Net(nn.Module):
    """Two convolutions with norms, and a way to join them."""

    def __init__(self, join: Callable[[_Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn_a, self.bn_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x).mean((2, 3))


def _residual(net: _Net, x: Tensor) -> Tensor:
    y = net.relu(net.bn_a(net.a(x)))
    return net.relu(net.bn_b(net.b(y)) + y)


def _read_twice(net: _Net, x: Tensor) -> Tensor:
    y = net.bn_a(net.a(x))
    return net.bn_b(net.b(torch.relu(y))) + y


def _added_to_itself(net: _Net, x: Tensor) -> Tensor:
    y = net.bn_a(net.a(x))
    return net.bn_b(net.b(y + y))


def _broadcast(net: _Net, x: Tensor) -> Tensor:
    y = net.bn_a(net.a(x)).mean((2, 3), keepdim=True)
    return net.relu(net.bn_b(net.b(y))) + net.a(x)


def _input_kept(net: _Net, x: Tensor) -> Tensor:
    return net.bn_a(net.a(torch.relu(x))) + x


def _branching(net: _Net, x: Tensor) -> Tensor:
    return net.relu(net.bn_a(net.a(x))) if x.sum() > -1e9 else x


JOINS = (_residual, _read_twice, _added_to_itself, _broadcast, _input_kept, _branching)


def _made(join: Callable[[_Net, Tensor], Tensor]) -> _Net:
    torch.manual_seed(0)
    net = _Net(join).eval().requires_grad_(False)
    for norm in (net.bn_a, net.bn_b):
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return net


@pytest.mark.parametrize("join", JOINS)
def test_the_same_to_the_last_bit_and_the_input_is_left_alone(join: Callable[[_Net, Tensor], Tensor]) -> None:
    net, x = _made(join), torch.randn(3, 1, 8, 8)
    before = x.clone()
    with torch.inference_mode():
        want = net(x)
        assert torch.equal(overwriting(net)(x), want)
        assert torch.equal(overwriting(net)(x), want)
    assert torch.equal(x, before)


def test_a_residual_block_overwrites_all_it_can() -> None:
    targets = [node.target for node in overwriting(_made(_residual)).graph.nodes]  # type: ignore[union-attr]
    assert targets.count(torch.relu_) == 2
    assert nn.functional.relu not in targets
    read_twice = [node.target for node in overwriting(_made(_read_twice)).graph.nodes]  # type: ignore[union-attr]
    assert torch.relu_ not in read_twice


def test_weights_are_shared() -> None:
    net, x = _made(_residual), torch.randn(3, 1, 8, 8)
    fast = overwriting(net)
    net.a.weight.mul_(2.0)
    with torch.inference_mode():
        assert torch.equal(fast(x), net(x))


@pytest.mark.parametrize("join", JOINS[:-1])
def test_values_kept_before_a_layer_survive_runs_that_write_in_place(join: Callable[[_Net, Tensor], Tensor]) -> None:
    net, x = _made(join), torch.randn(4, 1, 8, 8)
    cache = PrefixCache(overwriting(net), x, ["a", "b"], part=4)
    with torch.inference_mode():
        for layer in ("a", "b"):
            want = net(x)
            for _ in range(2):
                assert torch.equal(cache.logits(layer), want)
            own = net.get_submodule(layer)
            branches = cache.branches(layer, 0, [(own.weight, own.bias)] * 2)  # type: ignore[list-item]
            for branch in branches or ():
                torch.testing.assert_close(branch, want)


def test_copies_share_no_weights_with_the_original() -> None:
    net, x = _made(_residual), torch.randn(3, 1, 8, 8)
    first = StitchedNetwork(net, x)
    second = copy.deepcopy(first)
    want = first.logits(x)
    second.load({"a": 2.0 * net.a.weight})
    second.fold()
    assert torch.equal(first.logits(x), want)
    assert not torch.equal(second.logits(x), want)
    with torch.inference_mode():
        assert torch.equal(second.logits(x), second.folded(second.to_native(x)).float())


@pytest.mark.parametrize("join", JOINS)
def test_recalibrated_statistics_are_those_of_a_norm_in_training(join: Callable[[_Net, Tensor], Tensor]) -> None:
    net, x = _made(join), torch.randn(10, 1, 8, 8)
    seen = []
    for part in torch.split(x, 5):
        trained = copy.deepcopy(net)
        for norm in (trained.bn_a, trained.bn_b):
            norm.momentum = 1.0
            norm.train()
        trained(part)
        seen.append([(norm.running_mean, norm.running_var) for norm in (trained.bn_a, trained.bn_b)])
    recalibrator = Recalibrator(net, traced=True)
    for _ in range(2):
        recalibrator.run(x, batch=5)
        for index, norm in enumerate((net.bn_a, net.bn_b)):
            for which, got in enumerate((norm.running_mean, norm.running_var)):
                want = torch.stack([batch[index][which] for batch in seen]).mean(0)  # type: ignore[misc]
                assert got is not None
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # a mean is summed in another order
    assert not any(module.training for module in net.modules())


def test_networks_are_recalibrated_side_by_side() -> None:
    call, x = nn.Module.__call__, torch.randn(10, 1, 8, 8)
    nets = [_made(_residual) for _ in range(8)]
    wanted = [copy.deepcopy(net) for net in nets]
    for net in wanted:
        recalibrate(net, x)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            list(pool.map(lambda net: recalibrate(net, x), nets))
    assert nn.Module.__call__ is call
    for net, want in zip(nets, wanted, strict=True):
        torch.testing.assert_close(net.bn_b.running_var, want.bn_b.running_var, rtol=1e-6, atol=1e-7)


def test_a_trace_that_goes_another_way_than_the_network_is_not_used() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.calls = nn.Conv2d(1, 2, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y: Tensor = self.conv(x).mean((2, 3))
            return y if self.calls > 3 else -y

    net = Sized().eval()
    images = torch.randn(4, 1, 8, 8)
    stitched = StitchedNetwork(net, images)
    stitched.load({})
    stitched.fold()
    with torch.inference_mode():
        want = stitched.folded(stitched.to_native(images)).float()
    assert torch.equal(stitched.logits(images), want)
