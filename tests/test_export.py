"""Exported files give the network's outputs in their own runtime, and a shrunk network is smaller and faster there."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
import torch_pruning
from networks import settled
from torch import Tensor, nn

from autoprune.core.choices import Fine
from autoprune.core.errors import MeasurementError, ModelError
from autoprune.export.compare import compare
from autoprune.export.forms import apply_policy
from autoprune.export.onnx_file import export_onnx
from autoprune.export.program import check_outputs, export_program
from autoprune.export.report import zeros_note
from autoprune.kernels.convert import convert
from autoprune.tasks.models import build_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return settled(build_model("vgg11", 1, 10))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def smaller(model: nn.Module, images: Tensor) -> nn.Module:
    """The network without half of its channels."""
    shrunk = copy.deepcopy(model).requires_grad_(True)  # the tool follows gradients
    pruner = torch_pruning.pruner.MagnitudePruner(
        shrunk, images, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[shrunk.fc], round_to=8,
    )  # fmt: skip
    pruner.step()
    return shrunk.eval()


def test_onnx_file_gives_the_outputs_for_any_number_of_images(
    smaller: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    made = export_onnx(smaller, images, tmp_path / "net.onnx")
    assert made.any_batch
    assert made.difference <= 1e-4
    assert made.size_bytes == made.path.stat().st_size
    onnx.checker.check_model(onnx.load(made.path))


def test_program_file_gives_the_outputs(smaller: nn.Module, images: Tensor, tmp_path: Path) -> None:
    made = export_program(smaller, images, tmp_path / "net.pt2")
    assert made.any_batch
    assert made.difference <= 1e-4
    loaded = torch.export.load(made.path).module()
    assert torch.allclose(loaded(images[:3]), smaller(images[:3]), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]


class FixedBatch(nn.Module):
    """Reads its batch size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(1, 784)) if int(x.shape[0]) == 1 else self.fc(x.reshape(int(x.shape[0]), -1))


def test_a_network_of_one_batch_size_is_exported_for_one_image(images: Tensor, tmp_path: Path) -> None:
    made = export_onnx(FixedBatch().eval(), images, tmp_path / "net.onnx")
    assert made.difference <= 1e-4


def test_channels_that_left_make_the_file_smaller_and_onnxruntime_faster(
    model: nn.Module, smaller: nn.Module, images: Tensor
) -> None:
    found = compare(model, smaller, images[:1], seconds=1.0)
    assert found.runtime == "onnxruntime"
    assert found.pruned_bytes < 0.35 * found.dense_bytes
    # A quarter of the MACs.
    assert found.pruned.p50 < 0.7 * found.dense.p50


def test_zeros_alone_leave_the_file_as_large_and_it_is_said(model: nn.Module, images: Tensor) -> None:
    applied = apply_policy(model, {"features.4": Fine(keep=0.1)}, "compact")
    found = compare(model, applied.network, images[:1], seconds=0.2, onnx=False)
    assert found.pruned_bytes == pytest.approx(found.dense_bytes, rel=0.02)
    assert "1 sparse layers (first: features.4, fine(keep=0.1)) are dense with zeros in ONNX" in zeros_note(
        applied.sparse, "ONNX"
    )
    assert zeros_note({}, "ONNX") == ""


def test_a_converted_network_is_refused(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    deployed = convert(model, {}, images[:1])
    with pytest.raises(ModelError, match="ONNX cannot hold a converted network"):
        export_onnx(deployed, images, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"torch\.export cannot hold a converted network"):
        export_program(nn.Sequential(deployed), images, tmp_path / "net.pt2")


def test_other_outputs_are_an_error(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        right = model(images).numpy()
    assert check_outputs(model, images, right, "x") == 0.0
    with pytest.raises(MeasurementError, match="differ from the network's by"):
        check_outputs(model, images, right + 1.0, "x")
    with pytest.raises(MeasurementError, match="differ from the network's by nan"):
        check_outputs(model, images, right * float("nan"), "x")


class Unexportable(nn.Module):
    """Does on values what no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) * (2 if x.sum() > 0 else 3)


def test_what_cannot_be_exported_is_one_line(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a name that ends in \.pt2"):
        export_program(model, images, tmp_path / "net.bin")
    for write, name in ((export_onnx, "net.onnx"), (export_program, "net.pt2")):
        with pytest.raises(ModelError, match="cannot be exported") as caught:
            write(Unexportable().eval(), images, tmp_path / name)
        assert str(caught.value).isprintable()
        assert "data-dependent" in str(caught.value)
        with pytest.raises(ModelError, match="cannot write"):
            write(model, images, tmp_path / "absent" / name)
    assert list(tmp_path.iterdir()) == []
