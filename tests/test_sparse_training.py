"""Training on the CPU's sparse kernels: right in every direction, chosen by measurement, and the same training."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.cli.train import _savings_text
from autoprune.core.choices import Choice, parse_choice
from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.trained import Kernels, PassKernel, TrainedConv
from autoprune.kernels.reference import conv2d as reference
from autoprune.kernels.training import SparseConv, _backward, _forward
from autoprune.trainers.execution import FrozenLayer
from autoprune.trainers.loop import Epoch
from autoprune.trainers.result import Savings
from autoprune.trainers.savings import final_time_saved, trained_on
from autoprune.trainers.session import Session, attach
from autoprune.trainers.steps import (
    DIRECTIONS,
    STEP,
    StepChooser,
    StepRow,
    StepSettings,
    block_share,
    decide_step,
    load_steps,
    save_steps,
)

ALL: dict[PassKernel, Kernels] = {
    "block": Kernels("block", "block", "block"),
    "csr": Kernels("csr", "csr", "csr"),
}


def layer_of(k: int, c: int, hw: tuple[int, int], window: int = 3, stride: int = 1, padding: int = 1) -> LayerSpec:
    out = tuple((size + 2 * padding - window) // stride + 1 for size in hw)
    return LayerSpec(
        "layer", "conv", (k, c, window, window), (stride, stride), (padding, padding), input_hw=hw,
        output_hw=(out[0], out[1]),
    )  # fmt: skip


def case_of(layer: LayerSpec, share: int, dtype: torch.dtype, batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(layer.weights + share)
    rows = -(-layer.filters // share)
    mask = (torch.rand((rows, *layer.weight_shape[1:]), generator=generator) < 0.3).repeat_interleave(share, 0)
    mask = mask[: layer.filters]
    x = torch.randn((batch, layer.channels, *layer.input_hw), generator=generator).to(dtype)
    dy = torch.randn((batch, layer.filters, *layer.output_hw), generator=generator).to(dtype)
    weight = torch.randn(layer.weight_shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), dy, weight, mask


def truth(layer: LayerSpec, x: Tensor, dy: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x64, w64 = x.double().requires_grad_(), (weight * mask).double().requires_grad_()
    y = F.conv2d(x64, w64, None, layer.stride, layer.padding, layer.dilation)
    y.backward(dy.double())
    assert x64.grad is not None
    assert w64.grad is not None
    return y.detach(), x64.grad, w64.grad


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


LAYERS = [
    layer_of(16, 16, (28, 28)), layer_of(32, 16, (9, 7)), layer_of(24, 20, (5, 11)), layer_of(16, 64, (7, 7)),
    layer_of(48, 16, (6, 6), window=1, padding=0), layer_of(16, 8, (11, 9), window=5, padding=2),
    layer_of(17, 3, (8, 8), padding=2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["block", "csr"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.signature)
def test_every_direction_is_the_float64_gradient(layer: LayerSpec, kernel: PassKernel, dtype: torch.dtype) -> None:
    x, dy, weight, mask = case_of(layer, 16 if kernel == "block" else 1, dtype)
    y64, dx64, dw64 = truth(layer, x, dy, weight, mask)
    conv = TrainedConv(layer, mask, ALL[kernel])
    rough = 5e-3 if dtype == torch.bfloat16 else 2e-6
    assert_near(conv.forward(x, weight, dtype), y64, rough)
    dx, dw = conv.backward(dy, x, weight, True, True)
    assert dx is not None
    assert dw is not None
    assert dx.dtype == x.dtype
    assert_near(dx, dx64, rough)
    assert_near(dw * mask, dw64 * mask, 5e-6)
    assert not dw[~mask].any()


@pytest.mark.parametrize("kernel", ["block", "csr"])
@pytest.mark.parametrize("stride", [2, 3])
def test_strided_layers_run_forward_and_weight_gradient(stride: int, kernel: PassKernel) -> None:
    layer = layer_of(32, 16, (13, 10), stride=stride)
    x, dy, weight, mask = case_of(layer, 16, torch.float32)
    y64, _, dw64 = truth(layer, x, dy, weight, mask)
    conv = TrainedConv(layer, mask, Kernels(kernel, None, kernel))
    assert_near(conv.forward(x, weight, torch.float32), y64, 2e-6)
    assert_near(conv.backward(dy, x, weight, False, True)[1], dw64 * mask, 5e-6)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="stride"):
        TrainedConv(layer, mask, ALL["csr"])


def test_the_forward_pass_is_the_reference() -> None:
    layer = layer_of(16, 16, (6, 5))
    x, _, weight, mask = case_of(layer, 1, torch.float32)
    want = reference(x.numpy(), (weight * mask).numpy(), padding=(1, 1))
    got = TrainedConv(layer, mask, ALL["csr"]).forward(x, weight, torch.float32)
    np.testing.assert_allclose(got.numpy(), want, atol=2e-5)


def test_threads_and_any_memory_format_change_nothing_but_rounding() -> None:
    layer = LAYERS[0]
    x, dy, weight, mask = case_of(layer, 16, torch.float32, batch=5)
    one, three = TrainedConv(layer, mask, ALL["csr"]), TrainedConv(layer, mask, ALL["csr"], threads=3)
    assert torch.equal(one.forward(x, weight, torch.float32), three.forward(x.contiguous(), weight, torch.float32))
    (dx, dw), (dx3, dw3) = (conv.backward(dy, x, weight, True, True) for conv in (one, three))
    assert dx is not None
    assert dw is not None
    assert torch.equal(dx, dx3)  # type: ignore[arg-type]
    torch.testing.assert_close(dw, dw3, rtol=1e-4, atol=1e-4)


def test_bfloat16_maps_are_rounded_as_torch_rounds_and_nan_stays() -> None:
    layer = layer_of(16, 16, (2, 8), window=1, padding=0)
    mask = torch.eye(16, dtype=torch.bool).reshape(16, 16, 1, 1)
    values = torch.randn(1, 16, 2, 8, generator=torch.Generator().manual_seed(3)) * 1e3
    values[0, 5, 0, :5] = torch.tensor([float("nan"), float("inf"), 1.00390625, 1.01171875, -3e38])
    got = TrainedConv(layer, mask, Kernels("csr")).forward(values, mask.float(), torch.bfloat16)
    torch.testing.assert_close(got, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def operator(kernels: Kernels, share: int = 16) -> tuple[SparseConv, Tensor, Tensor, Tensor]:
    layer = layer_of(16, 16, (6, 6))
    x, _, weight, mask = case_of(layer, share, torch.float32)
    return SparseConv(layer, mask, kernels), x, weight * mask, mask


@pytest.mark.parametrize("kernels", [ALL["block"], ALL["csr"], Kernels("csr"), Kernels(weight_gradient="csr")])
def test_the_operator_differentiates_as_the_dense_one(kernels: Kernels) -> None:
    run, x, weight, mask = operator(kernels)
    bias = torch.randn(16)
    found = []
    for function in (run, lambda x, w, b: F.conv2d(x, w, b, padding=1)):
        tensors = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        y = function(*tensors)
        (y.square().sum() / 100).backward()
        found.append((y.detach(), [tensor.grad for tensor in tensors]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for number, (got, want) in enumerate(zip(found[0][1], found[1][1], strict=True)):
        assert got is not None
        assert want is not None
        factor = mask if number == 1 else 1
        torch.testing.assert_close(got * factor, want * factor, rtol=1e-3, atol=1e-3)


# The checks themselves look at gradients of views.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_pass_torchs_own_checks_and_compile() -> None:
    run, x, weight, _ = operator(ALL["csr"])
    inputs = (x.requires_grad_(), weight.requires_grad_(), run.number, False)
    torch.library.opcheck(_forward, inputs)
    dy = torch.randn(3, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(_backward, (dy, x.detach(), weight.detach(), run.number, True, True))
    compiled = torch.compile(lambda a, b: run(a, b, None).sum(), backend="aot_eager", fullgraph=True)
    compiled(x, weight).backward()
    assert x.grad is not None
    want = torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), x)[0]
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)


def test_autocast_gives_bfloat16_and_another_size_runs_dense() -> None:
    run, x, weight, _ = operator(ALL["block"])
    with torch.autocast("cpu", torch.bfloat16):
        assert run(x, weight, None).dtype == torch.bfloat16
    larger = torch.randn(1, 16, 9, 9)
    assert torch.equal(run(larger, weight, None), F.conv2d(larger, weight, padding=1))


def test_the_fastest_kernel_of_each_direction_runs_a_layer() -> None:
    rows = [
        StepRow("a", "forward", "dense", 100), StepRow("a", "forward", "block", 40), StepRow("a", "forward", "csr", 60),
        StepRow("a", "input gradient", "dense", 100), StepRow("a", "input gradient", "csr", 99),
        StepRow("a", "weight gradient", "dense", 100),
    ]  # fmt: skip
    run = decide_step("a", rows)
    assert run.kernels == {"forward": "block", "input gradient": "dense", "weight gradient": "dense"}
    assert (run.dense_us, run.chosen_us) == (300, 240)
    assert run.why.startswith("sparse because it takes 0.80 of a dense step: forward block 40 us against 100 us dense")
    slow = decide_step("a", [row if row.kernel == "dense" else replace(row, us=200) for row in rows])
    assert not slow.sparse
    assert slow.why.startswith("dense because no sparse kernel is faster: forward dense 100 us, block 200 us")


def test_a_layer_whose_whole_step_gains_nothing_stays_dense() -> None:
    rows = [StepRow("a", direction, "dense", 100) for direction in DIRECTIONS]
    rows += [StepRow("a", direction, "csr", 80) for direction in DIRECTIONS]
    whole = [StepRow("a", STEP, "dense", 300), StepRow("a", STEP, "chosen", 295)]
    run = decide_step("a", rows + whole)
    assert not run.sparse
    assert set(run.kernels.values()) == {"dense"}
    assert run.dense_us == run.chosen_us == 300
    assert "a whole step takes 295 us on sparse kernels against 300 us" in run.why
    run = decide_step("a", [*rows, whole[0], replace(whole[1], us=200)])
    assert run.sparse
    assert (run.dense_us, run.chosen_us) == (300, 200)
    assert run.why.startswith("sparse because it takes 0.67 of a dense step")


def test_shared_masks_are_found_by_their_blocks() -> None:
    mask = torch.zeros(32, 4, 3, 3, dtype=torch.bool)
    mask[:16, 1, 0, 0] = True
    assert block_share(mask) == pytest.approx(1 / 72)
    mask[20, 2, 2, 2] = True
    assert block_share(mask) == pytest.approx(2 / 72)


CHOICES: dict[str, Choice] = {
    "0": parse_choice("pattern(count=4,entries=4,kernels=0.5,share=16x1)"),
    "3": parse_choice("fine(keep=0.2)"),
    "6": parse_choice("fine(keep=0.3)"),
    "10": parse_choice("fine(keep=0.2)"),
}
STEPS, EPOCHS = 3, 4


def make() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 3),
        ).to(memory_format=torch.channels_last)  # fmt: skip


def winning(names: dict[str, str] | None = None) -> StepChooser:
    """A table in which a sparse kernel wins wherever there is one."""
    rows: dict[str, list[StepRow]] = {}
    for signature, text, density in (
        ("conv-k32-c16-3x3-in8x8-s1x1-p1x1", CHOICES["0"].text, None),
        ("conv-k16-c32-3x3-in8x8-s2x2-p1x1", CHOICES["3"].text, None),
    ):
        kept = {True: "0.2222", False: "0.2001"}[text.startswith("pattern")] if density is None else density
        made = [StepRow("t", direction, "dense", 100) for direction in DIRECTIONS]
        made += [StepRow("t", "forward", "csr", 10), StepRow("t", "weight gradient", "block", 10)]
        if "s1x1" in signature:
            made.append(StepRow("t", "input gradient", "csr", 10))
        rows[f"{signature} {text} {kept}"] = made
    return StepChooser(StepSettings(batch=4), rows)


def start(chooser: StepChooser | None) -> tuple[nn.Sequential, torch.optim.Optimizer, Session]:
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    session = attach(
        net, optimizer, CHOICES, steps_per_epoch=STEPS, epochs=EPOCHS, method="clicktrain",
        example=torch.zeros(1, 16, 8, 8),
    )  # fmt: skip
    if chooser is not None:
        session.run_sparse(chooser)
    return net, optimizer, session


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        images = torch.randn(4, 16, 8, 8, generator=generator)
        F.cross_entropy(net(images), torch.randint(0, 3, (4,), generator=generator)).backward()
        optimizer.step()


def test_a_training_on_the_kernels_is_the_training_under_masks() -> None:
    plain, optimizer, session = start(None)
    train(plain, optimizer, 0, STEPS * EPOCHS)
    wanted = session.finalize()
    net, optimizer, session = start(winning())
    train(net, optimizer, 0, STEPS * 2)
    assert session.sparse_layers == ()
    train(net, optimizer, STEPS * 2, STEPS * EPOCHS)
    assert session.sparse_layers == ("0", "3")
    report = session.finalize()
    assert replace(report, layers_run=()) == wanted
    assert [run.sparse for run in report.layers_run] == [True, True, False, False]
    assert report.layers_run[2].why == "dense because it pads by reflect"
    assert report.layers_run[3].why == "dense because it is no convolution"
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_a_resumed_training_runs_on_the_same_kernels_bit_for_bit() -> None:
    net, optimizer, session = start(winning())
    train(net, optimizer, 0, 8)
    state = session.state_dict()
    weights, moments = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 8, STEPS * EPOCHS)
    again, optimizer, session = start(StepChooser(StepSettings(batch=4)))
    session.load_state_dict(state)
    again.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    assert session.sparse_layers == ("0", "3")
    train(again, optimizer, 8, STEPS * EPOCHS)
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_measured_choice_has_a_row_for_every_direction_and_leaves_layers_dense_where_nothing_wins() -> None:
    layer = layer_of(16, 16, (8, 8))
    module = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    mask = torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.05
    chooser = StepChooser(StepSettings(batch=8, threads=1))
    run = chooser(FrozenLayer("layer", module, parse_choice("fine(keep=0.05)"), mask, layer))
    (rows,) = chooser.rows.values()
    assert {(row.direction, row.kernel) for row in rows} >= {(name, "dense") for name in DIRECTIONS}
    assert {(row.direction, row.kernel) for row in rows} >= {(name, "csr") for name in DIRECTIONS}
    assert all(row.us > 0 for row in rows)
    assert (run is not None) == chooser.runs["layer"].sparse
    (key,) = chooser.rows
    slow = [row if row.kernel == "dense" else replace(row, us=1e9) for row in rows]
    never = StepChooser(StepSettings(batch=8), {key: slow})
    assert never(FrozenLayer("layer", module, parse_choice("fine(keep=0.05)"), mask, layer)) is None


def test_a_stored_table_is_read_back_and_a_damaged_one_is_measured_anew(tmp_path: Path) -> None:
    path, table = tmp_path / "steps.json", winning().rows
    save_steps(path, table)
    assert load_steps(path) == table
    path.write_text(path.read_text()[:-20])
    assert load_steps(path) == {}
    assert load_steps(tmp_path / "absent.json") == {}


def test_a_table_is_of_one_batch_precision_and_number_of_threads() -> None:
    settings = [
        StepSettings(8, False, 1),
        StepSettings(16, False, 1),
        StepSettings(8, True, 1),
        StepSettings(8, False, 2),
    ]
    assert len({one.key for one in settings}) == len(settings)
    assert settings[0].key == StepSettings(8, False, 1).key


def test_the_closing_text_lists_what_every_layer_was_trained_on() -> None:
    dense = [StepRow("layer", direction, "dense", 10) for direction in DIRECTIONS]
    faster = [StepRow("layer", direction, "csr", 5) for direction in DIRECTIONS]
    runs = [decide_step("a", dense), decide_step("b", dense + faster)]
    savings = Savings(
        sparsity={}, prunable_sparsity=0.5, global_sparsity=0.5, conv_compression=2.0, all_compression=2.0,
        storage_ratio=2.0, inference_macs_saved=0.5, training_macs_saved=0.25, training_time_saved=0.1,
        final_time_saved=0.2, phases=[], trained_on=[trained_on(run) for run in runs],
    )  # fmt: skip
    lines = _savings_text(savings).splitlines()
    assert lines[0].endswith("training time saved (measured) 10.0 %; of an epoch under final masks 20.0 %")
    assert lines[1] == "trained on sparse kernels: 1 of 2 pruned layers"
    assert lines[2].startswith("  a: dense because no sparse kernel is faster")
    assert lines[3].startswith("  b: sparse because it takes 0.50 of a dense step")


def test_time_saved_under_final_masks_leaves_the_epoch_that_measures_out() -> None:
    dense = [Epoch(number, 1.0, 0.5, 0.1, 10.0) for number in range(5)]
    pruned = [
        Epoch(number, 1.0, 0.5, 0.1, seconds, "pruned", sparsity)
        for number, (seconds, sparsity) in enumerate([(10, 0.0), (11, 0.0), (99, 0.8), (6, 0.8), (6, 0.8)])
    ]
    assert final_time_saved(pruned, dense) == pytest.approx(0.4)
    assert final_time_saved(pruned[:3], dense) is None


def test_a_compiled_model_and_a_copy_train_on_the_kernels_too() -> None:
    plain, optimizer, session = start(winning())
    train(plain, optimizer, 0, STEPS * EPOCHS)
    net, optimizer, session = start(winning())
    compiled = torch.compile(net, backend="aot_eager")
    assert isinstance(compiled, nn.Module)
    train(compiled, optimizer, 0, STEPS * EPOCHS)
    assert session.sparse_layers == ("0", "3")
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    images = torch.randn(2, 16, 8, 8)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(images), net(images))
    with torch.no_grad():
        twin[0].weight.zero_()
    assert not torch.allclose(twin(images), net(images))
