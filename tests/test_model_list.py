"""A dozen networks of torchvision and timm through every stage of ``benchmarks/models.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from model_list import MODELS
from model_stages import COLUMNS, STAGES, build, convert_stage, outcomes, parity

A_DOZEN = {
    "torchvision:mnasnet0_5@3x64x64": "plan",
    "timm:regnetx_002@3x32x32": "plan",
    "torchvision:mobilenet_v3_small@3x64x64": "plan",
    "torchvision:googlenet@3x32x32": "plan",
    "torchvision:squeezenet1_1@3x32x32": "plan",
    "torchvision:shufflenet_v2_x0_5@3x32x32": "nested",
    "timm:poolformer_s12@3x32x32": "nested",
    "timm:convnext_atto@3x32x32": "nested",
    "timm:efficientnet_lite0@3x64x64": "plan",
    "timm:mixnet_s@3x64x64": "nested",
    "timm:ghostnet_100@3x32x32": "nested",
    'timm:vit_tiny_patch16_224@3x32x32{"img_size":32}': "nested",
}


# What torch-pruning's graph cannot follow, and no other stage minds.
NO_CHANNELS = {"torchvision:shufflenet_v2_x0_5@3x32x32": "torch-pruning cannot follow this network"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", A_DOZEN)
def test_a_network_passes_every_stage(name: str) -> None:
    found = outcomes(build(name))
    if name in NO_CHANNELS:
        assert NO_CHANNELS[name] in found.pop("channels")
    assert {stage: text for stage, text in found.items() if not text.startswith("pass")} == {}
    assert set(found) | {"channels"} == set(COLUMNS)
    assert found["convert"].startswith(f"pass: {A_DOZEN[name]}")


def test_the_list_holds_sixty_networks_of_both_packages_each_once() -> None:
    assert len(set(MODELS)) == len(MODELS)
    outside = [name for name in MODELS if name.startswith(("torchvision:", "timm:"))]
    assert len(outside) >= 60


def test_a_stage_that_fails_is_a_line_and_ends_the_way() -> None:
    subject = build("resnet20@3x16x16")
    subject.model.get_submodule("fc").weight.data[0] = torch.nan  # type: ignore[operator,union-attr]
    found = outcomes(subject)
    assert found["masks"] == "refused: the masked network's outputs are not finite"
    assert found["convert"] == found["backward"] == "not tried"


def test_parity_sees_a_wrong_network() -> None:
    subject = build("resnet20@3x16x16")
    for name in ("trace", "space", "masks"):
        STAGES[name](subject)
    convert_stage(subject)
    assert subject.deployed is not None
    state = {key: 1.01 * tensor for key, tensor in subject.deployed.state_dict().items()}
    subject.deployed.load_state_dict(state)
    with pytest.raises(ValueError, match="outputs differ"):
        parity(subject)
