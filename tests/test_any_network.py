"""Any network can be named on the command line, with its arguments and weights; what cannot be is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from user_networks import small

from autoprune.cli.bench import _Subject as Subject
from autoprune.cli.bench import _untrained as untrained_subject
from autoprune.cli.main import run as cli
from autoprune.core.errors import AutopruneError, ModelError, UnknownName
from autoprune.lut.bench import bench
from autoprune.tasks.data import load_data
from autoprune.tasks.metrics import accuracy
from autoprune.tasks.names import ModelName, parse_args, parse_model, split_names, with_args
from autoprune.tasks.networks import make_network, network_for, standalone, untrained
from autoprune.tasks.task import load_task
from autoprune.tasks.weights import load_weights

_WORDS = st.text("abcdefgh_", min_size=1, max_size=6)
_LISTS = st.lists(st.integers(), max_size=3)
_VALUES = st.one_of(st.integers(-99, 99), st.booleans(), st.none(), st.text(max_size=8), _LISTS)


@given(
    base=st.sampled_from(["resnet20", "torchvision:resnet18", "timm:vit_tiny", "a.b:c"]),
    size=st.none() | st.tuples(*[st.integers(1, 512)] * 3),
    args=st.dictionaries(_WORDS, _VALUES, max_size=3),
)
def test_a_models_text_survives_a_round_trip(
    base: str, size: tuple[int, int, int] | None, args: dict[str, object]
) -> None:
    name = ModelName(base, size, args)
    assert parse_model(name.text) == name
    assert split_names(f"{name.text},vgg11") == [name.text, "vgg11"]


def test_arguments_are_pairs_or_json() -> None:
    assert parse_args("depth=2, width=64,act=relu,sizes=[1,2],on=True") == {
        "depth": 2, "width": 64, "act": "relu", "sizes": [1, 2], "on": True,
    }
    assert parse_args('{"depth": 2}') == {"depth": 2}
    assert with_args('m.n:f{"a":1}', "b=2") == 'm.n:f{"a":1,"b":2}'
    for text, why in (("depth", "no name=value"), ("a=1,a=2", "given twice"), ("{a: 1}", "not JSON")):
        with pytest.raises(ModelError, match=why):
            parse_args(text)


@pytest.mark.parametrize(
    "name",
    [
        "resnet20", "resnet50-cifar", "mobilenetv2-cifar", "torchvision:squeezenet1_1", "timm:mobilenetv3_small_050",
        'user_networks:small{"width":24}', "user_networks:Dictionary",
    ],
)
def test_every_source_builds_a_network_for_the_datas_images(name: str) -> None:
    data = load_data("fashion-mnist")
    example = data.normalize(data.validation.images[:2])
    if name.startswith(("torchvision", "timm")):
        example = nn.functional.interpolate(example, size=64)
    model = network_for(name, example, 10)
    part = data.normalize(data.validation.images[:2]) if example.shape[-1] == 28 else example
    assert 0.0 <= accuracy(model, part, data.validation.labels[:2]) <= 1.0


def test_a_name_builds_the_same_network_twice_and_its_arguments_reach_it() -> None:
    (first, x), (second, y) = (untrained("torchvision:resnet18@1x40x40", "fashion-mnist") for _ in range(2))
    assert x.shape == (1, 1, 40, 40)
    assert torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
    wide = make_network(parse_model('torchvision:resnet18{"width_per_group":64,"num_classes":3}'), 3, 10)
    assert wide.get_submodule("fc").out_features == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("resnet_20", UnknownName, "Did you mean 'resnet20'"),
        ("torchvision:resnet51", UnknownName, r"Did you mean 'resnet50'\?.*are known"),
        ("timm:vit_smal_patch16_224", UnknownName, "Did you mean 'vit_small_patch16_224'"),
        ("user_networks:smal", UnknownName, "Did you mean 'small'"),
        ("user_network:small", ModelError, "no module 'user_network'"),
        ("user_networks:not_callable", ModelError, "is a int; name a function"),
        ("user_networks:no_network", ModelError, "returned a int, want an nn.Module"),
        ("user_networks:failing", ModelError, "cannot be built: ValueError: no such depth"),
        ('user_networks:small{"wdth":3}', ModelError, "unexpected keyword argument 'wdth'"),
        ('resnet20{"depth":3}', ModelError, "no argument 'depth'"),
        ("resnet20@32x32", ModelError, "CHANNELSxHEIGHTxWIDTH"),
        ("resnet20@3x32x32", ModelError, "the data has 1x28x28"),
        ("no module:f", ModelError, "must be a built-in name"),
        ("user_networks:Pair", ModelError, "missing 1 required positional argument.*one batch of images alone"),
        ("user_networks:Broken", ModelError, "NaN or infinite"),
        ('user_networks:small{"classes":3}', ModelError, r"returns \(1, 3\).*want \(N, 10\)"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_in_one_line(
    name: str, error: type[AutopruneError], match: str
) -> None:
    data = load_data("fashion-mnist")
    with pytest.raises(error, match=match) as caught:
        network_for(name, data.normalize(data.validation.images[:1]), 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_weights_of_torch_save_load_with_their_wrappers(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source, target = small(), nn.Sequential(*small(classes=10).children())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    state: object = {f"{prefix}{key}": tensor for key, tensor in source.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


class _Evil:
    """Anything but a tensor."""


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for content, match in (
        (_Evil(), "holds more than tensors"),
        ([1], "holds a list, want a state dict"),
        ({"a": 3}, "'a' is a int, not a tensor"),
        ({}, "want a state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ModelError, match=match):
            load_weights(small(), path)
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"cannot be read as a file of torch\.save"):
        load_weights(small(), path)
    with pytest.raises(ModelError, match="No such file"):
        load_weights(small(), tmp_path / "absent.pt")


def test_a_task_takes_a_factorys_own_weights_or_a_files(tmp_path: Path) -> None:
    own = load_task("user_networks:small", "fashion-mnist")
    assert torch.equal(own.model.get_submodule("0").weight, small().get_submodule("0").weight)  # type: ignore[arg-type]
    other = small()
    nn.init.ones_(other.get_submodule("0").weight)  # type: ignore[arg-type]
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    loaded = load_task("user_networks:small", "fashion-mnist", weights=tmp_path / "w.safetensors")
    assert float(loaded.model.get_submodule("0").weight.detach().mean()) == 1.0  # type: ignore[operator]
    with pytest.raises(ModelError, match="no trained weights of 'torchvision:resnet18'"):
        load_task("torchvision:resnet18", "fashion-mnist")


def test_bench_takes_a_named_network_under_one_choice(capsys: pytest.CaptureFixture[str]) -> None:
    name = with_args("user_networks:small@1x12x12", "width=32")
    subject = Subject(None, None, "fashion-mnist", 2, 1)
    network, images, policy = untrained_subject(name, ["block(keep=0.25)"], subject, None, 0)
    assert policy.file.model == 'user_networks:small@1x12x12{"width":32}'
    result = bench(network, policy, images, 1, 0.1, compile=False)
    assert [decision.kernel for decision in result.decisions] == ["dense", "block", "dense"]
    assert result.batch == 2
    argv = ["bench", "--model", "user_networks:small", "--uniform", "block(keep=0.25)"]
    assert cli([*argv, "--run", "x"]) == 2
    assert "--uniform and --run: got both" in capsys.readouterr().err
    assert cli(argv[:1] + argv[3:]) == 2
    assert "give --model too" in capsys.readouterr().err


def test_commands_evaluate_a_users_network_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": small(8).state_dict()}, tmp_path / "w.pt")
    weights = str(tmp_path / "w.pt")
    argv = ["evaluate", "--model", "user_networks:small", "--weights", weights, "--images", "20", "--json"]
    assert cli([*argv, "--model-args", "width=8"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 20
    assert cli(argv) == 2
    error = capsys.readouterr().err
    assert "'0.weight' has shape (8, 1, 3, 3), this model wants (16, 1, 3, 3)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("torchvision:mobilenet_v2", 'torchvision:mobilenet_v2@1x28x28{"num_classes":4}'),
        ("timm:resnet18", 'timm:resnet18@1x28x28{"num_classes":4}'),
        ("resnet20", 'resnet20@1x28x28{"classes":4}'),
        ("user_networks:small", "user_networks:small@1x28x28"),
    ],
)
def test_a_stored_name_builds_the_network_without_its_data(name: str, full: str) -> None:
    assert standalone(name, torch.zeros(1, 1, 28, 28), 4) == full
    model, example = untrained(full, "imagefolder:absent")
    assert example.shape == (1, 1, 28, 28)
    with torch.no_grad():
        assert model(example).shape == (1, 10 if name.startswith("user") else 4)
