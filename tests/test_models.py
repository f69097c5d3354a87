"""The built-in networks and their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autoprune.core.errors import ModelError, UnknownName
from autoprune.tasks.metrics import accuracy
from autoprune.tasks.models import MODELS, build_model
from autoprune.tasks.task import load_task
from autoprune.tasks.weights import load_weights


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_maps_an_image_to_its_classes(name: str) -> None:
    model = build_model(name, channels=3, classes=7).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_resnet20_has_the_papers_number_of_layers() -> None:
    model = build_model("resnet20")
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    shortcuts = [m for m in weighted if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(weighted) - len(shortcuts) == 20
    assert len(shortcuts) == 2


def test_an_unknown_model_gets_a_proposal() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'resnet20'"):
        build_model("resnet-20")


def test_weights_survive_a_round_trip(tmp_path: Path) -> None:
    model, other = build_model("resnet20"), build_model("resnet20")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])


def test_wrong_weights_are_refused_by_the_first_key_that_differs(tmp_path: Path) -> None:
    state = build_model("resnet20").state_dict()
    path = tmp_path / "w.safetensors"
    save_file({**state, "fc.weight": torch.zeros(10, 32)}, path)
    with pytest.raises(ModelError, match=r"'fc\.weight' has shape \(10, 32\), this model wants \(10, 64\)"):
        load_weights(build_model("resnet20"), path)
    save_file({k: v for k, v in state.items() if k != "bn1.bias"}, path)
    with pytest.raises(ModelError, match=r"key 'bn1\.bias' is missing"):
        load_weights(build_model("resnet20"), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_weights(build_model("resnet20"), path)


def test_a_model_without_weights_in_the_package_says_how_to_get_them() -> None:
    with pytest.raises(ModelError, match="no trained weights of 'resnet56'"):
        load_task("resnet56", "fashion-mnist")


def test_the_embedded_checkpoint_keeps_its_promise_on_test_images() -> None:
    task = load_task("resnet20", "fashion-mnist")
    test = task.data.test.take(2_000)
    assert accuracy(task.model, task.data.normalize(test.images), test.labels) >= 0.925
