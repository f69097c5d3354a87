"""policy.json: readable for ever, refused when it is not what it claims to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.choices import Block, Choice, Dense, Fine, Pattern, parse_choice
from autoprune.core.errors import PolicyError, RunError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import SCHEMA_VERSION, Policy, macs_ratio, model_fingerprint, params_ratio
from autoprune.core.result import Result

_GOLDEN = Path(__file__).parent / "golden" / "policy-v1.json"
_SOME: st.SearchStrategy[Choice] = st.one_of(
    st.just(Dense()),
    st.builds(Block, keep=st.floats(0.01, 1.0)),
    st.builds(Fine, keep=st.floats(0.01, 1.0)),
    st.builds(Pattern, count=st.sampled_from([4, 8, 12]), kernels=st.floats(0.01, 1.0)),
)
_NAMES = st.text(min_size=1, max_size=20)


def _edited(tmp_path: Path, **fields: object) -> Path:
    data = {**json.loads(_GOLDEN.read_text()), **fields}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not Ellipsis}))
    return path


@given(choices=st.dictionaries(_NAMES, _SOME, min_size=1, max_size=4))
def test_saved_policy_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, choices: dict[str, Choice]) -> None:
    layers = [LayerSpec(name, "conv", (16, 16, 3, 3), input_hw=(9, 9), output_hw=(7, 7)) for name in choices]
    policy = Policy.make(choices, layers, model="small")
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    policy.save(path)
    again = Policy.load(path)
    assert again == policy
    assert list(again.choices) == list(choices)
    again.check_model(layers)


def test_golden_policy_of_version_1_stays_readable() -> None:
    policy = Policy.load(_GOLDEN)
    assert policy.choice("layer1.0.conv2") == Pattern(count=8, entries=4, kernels=0.5, share=(16, 1))
    assert policy.choice("not.in.it") == Dense()
    assert policy.file.measured is not None
    assert policy.file.measured.latency_us == 490.25
    assert policy.file.accuracy.test == 0.9231
    assert {name: parse_choice(text) for name, text in policy.file.choices.items()} == policy.choices


def test_golden_policy_of_version_2_stays_readable() -> None:
    policy = Policy.load(_GOLDEN.with_name("policy-v2.json"))
    assert policy.file.metric == "agreement"
    assert policy.file.splits is not None
    assert (policy.file.splits.search, policy.file.splits.validation) == (500, 500)
    assert policy.file.splits.seed == 20260101
    assert Policy.load(_GOLDEN).file.splits is None


def test_fields_with_defaults_may_be_absent(tmp_path: Path) -> None:
    absent = dict.fromkeys(("measured", "accuracy", "context", "seed", "versions", "trials", "seconds", "table"), ...)
    policy = Policy.load(_edited(tmp_path, **absent))
    assert policy.file.measured is None
    assert policy.file.accuracy.dense is None


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, f"newer than {SCHEMA_VERSION}, the newest this autoprune reads; upg"),
        ({"colour": "blue"}, "field 'colour'"),
        ({"predicted": {"macs_ratio": 0.5, "params_ratio": 0.5, "extra": 1}}, "field 'predicted.extra'"),
        ({"model": ...}, "field 'model'"),
        ({"choices": {"conv1": "blok(keep=0.5)"}}, "Did you mean 'block'?"),
        ({"choices": {"conv1": 3}}, "field 'choices.conv1'"),
        ({"schema_version": "x"}, "field 'schema_version'"),
    ],
)
def test_broken_policy_names_file_and_field(tmp_path: Path, fields: dict[str, object], part: str) -> None:
    path = _edited(tmp_path, **fields)
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 200, -3])
def test_truncated_policy_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "policy.json"
    path.write_text(_GOLDEN.read_text()[:size])
    with pytest.raises(PolicyError, match="not complete JSON"):
        Policy.load(path)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match="want an object"):
        Policy.load(path)


def test_absent_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load(tmp_path / "absent.json")
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load(tmp_path)


def test_policy_refuses_a_model_without_its_layer(policy: Policy, layers: tuple[LayerSpec, ...]) -> None:
    policy.check_model(layers)
    with pytest.raises(PolicyError, match=r"layer 'layer3\.2\.conv1' is not in this model"):
        policy.check_model([layer for layer in layers if layer.name != "layer3.2.conv1"])


def test_policy_refuses_a_layer_that_cannot_take_its_choice(policy: Policy, layers: tuple[LayerSpec, ...]) -> None:
    name = next(name for name, choice in policy.choices.items() if isinstance(choice, Pattern))
    other = [replace(layer, weight_shape=(16, 16, 1, 1)) if layer.name == name else layer for layer in layers]
    with pytest.raises(PolicyError, match=rf"layer '{name}' here cannot take pattern"):
        policy.check_model(other)


def test_policy_refuses_a_model_of_other_shapes(policy: Policy, layers: tuple[LayerSpec, ...]) -> None:
    other = (*layers[:-1], replace(layers[-1], weight_shape=(100, 64)))
    with pytest.raises(PolicyError, match="other layer shapes"):
        policy.check_model(other)


def test_fingerprint_sees_names_shapes_and_order(layers: tuple[LayerSpec, ...]) -> None:
    prints = {
        model_fingerprint(layers),
        model_fingerprint(layers[::-1]),
        model_fingerprint((replace(layers[0], name="stem"), *layers[1:])),
        model_fingerprint((replace(layers[0], stride=(2, 2)), *layers[1:])),
    }
    assert len(prints) == 4


def test_ratios_weigh_each_layer_by_its_own_cost(layers: tuple[LayerSpec, ...]) -> None:
    assert macs_ratio(layers, {}) == params_ratio(layers, {}) == 1.0
    halved = {layer.name: Fine(keep=0.5) for layer in layers}
    assert macs_ratio(layers, halved) == pytest.approx(0.5)
    last = {layers[-1].name: Fine(keep=0.5)}
    assert params_ratio(layers, last) == pytest.approx(1 - 320 / sum(layer.weights for layer in layers))
    assert macs_ratio(layers, last) > params_ratio(layers, last)


def test_result_reads_back_the_same(tmp_path: Path, result: Result) -> None:
    path = tmp_path / "result.json"
    result.save(path)
    assert Result.load(path) == result
    assert result.fastest_reference == ("plan", 1000.0)


@pytest.mark.parametrize("text", ["", "{}", '{"model": 3}', "\xff"])
def test_damaged_result_says_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match="damaged; delete it"):
        Result.load(path)
