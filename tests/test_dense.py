"""What the dense references promise: the same outputs in every form, or a reason why a form is absent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import Concatenated, resnet, settled
from torch import Tensor, nn

from autoprune.core.errors import ModelError
from autoprune.kernels.dense import (
    REFERENCES,
    dense_references,
    runners,
    to_onnx,
    torch_threads,
)
from autoprune.kernels.fold import fold_batchnorm

FORMS = tuple(name for name in REFERENCES if name != "torch-compile")


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, dict[str, Callable[[], object] | str], dict[str, float]]:
    model = resnet()
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, float] = {}
    return model, x, dense_references(model, x, compile=False, built=seconds.__setitem__), seconds


@pytest.mark.parametrize("name", FORMS)
def test_every_form_computes_the_model(
    name: str, case: tuple[nn.Module, Tensor, dict[str, Callable[[], object] | str], dict[str, float]]
) -> None:
    model, x, references, seconds = case
    run = references[name]
    assert not isinstance(run, str), run
    result = run()
    got = np.asarray(result[0] if isinstance(result, list) else result)
    want = model(x).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert seconds[name] > 0.0


def test_form_left_out_says_so(
    case: tuple[nn.Module, Tensor, dict[str, Callable[[], object] | str], dict[str, float]],
) -> None:
    _, _, references, seconds = case
    assert references["torch-compile"] == "left out on request"
    assert "torch-compile" not in seconds
    assert tuple(references) == REFERENCES
    assert tuple(runners(references)) == FORMS


def test_form_that_fails_is_a_reason_and_the_others_remain() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y if float(y.detach().sum()) > 1e9 else -y

    found = dense_references(Branching().eval(), torch.randn(1, 3, 8, 8), only=("plan", "torch-folded"))
    assert "not one flat plan: 'forward': it cannot be traced" in str(found["plan"])
    assert "cannot be traced to fold" in str(found["torch-folded"])
    assert tuple(found) == ("plan", "torch-folded")
    plain = dense_references(settled(Concatenated()), torch.randn(1, 3, 8, 8), only=("plan", "torch-folded"))
    assert "'gelu'" in str(plain["plan"])
    assert not isinstance(plain["torch-folded"], str)


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = dense_references(resnet(), torch.randn(1, 1, 12, 12), only=("torch-compile",))
    assert "no C++ compiler" in str(found["torch-compile"])


@pytest.mark.filterwarnings("ignore")  # of the compiler's own modules, at import
def test_torch_compile_computes_the_model_at_two_batch_sizes() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)))
    for batch in (1, 2):
        x = torch.randn(batch, 3, 6, 6)
        run = dense_references(model, x, only=("torch-compile",))["torch-compile"]
        if isinstance(run, str):
            assert "no C++ compiler" in run
            return
        result = run()
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result, model(x), rtol=0, atol=1e-4)


def test_references_leave_the_model_and_the_threads_alone() -> None:
    model = resnet().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    x = torch.randn(2, 1, 12, 12)
    dense_references(model, x, threads + 1, only=("plan", "torch-folded", "torch-channels-last"))
    assert torch.get_num_threads() == threads
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch_threads(threads + 2):
        assert torch.get_num_threads() == threads + 2
    assert torch.get_num_threads() == threads


def test_folding_removes_every_batchnorm_after_a_layer() -> None:
    model = resnet()
    folded = fold_batchnorm(model)
    assert not any("bn" in str(node.target) for node in folded.graph.nodes)  # type: ignore[union-attr]
    x = torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-4)


def test_batchnorm_on_a_layer_with_two_readers_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    model, x = settled(Twice()), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fold_batchnorm(model)(x), model(x), rtol=0, atol=1e-5)


def test_model_that_cannot_be_exported_is_named_so() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("nothing to export")

    with pytest.raises(ModelError, match="cannot be exported to ONNX"):
        to_onnx(Odd(), torch.randn(1, 3))
