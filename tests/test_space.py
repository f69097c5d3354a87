"""Search spaces from rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.core.choices import CK, Block, Dense, Fine, Pattern
from autoprune.core.errors import ChoiceError, SpaceError, UnknownName
from autoprune.core.layers import LayerSpec
from autoprune.search_spaces.space import SearchSpace, load_space, presets


def conv(name: str, filters: int, channels: int, window: int = 3, groups: int = 1) -> LayerSpec:
    shape = (filters, channels // groups, window, window)
    return LayerSpec(name, "conv", shape, input_hw=(8, 8), output_hw=(8, 8), groups=groups)


LAYERS = (
    conv("stem", 16, 3),
    conv("block1.conv", 16, 16),
    conv("block1.short", 32, 16, 1),
    conv("block2.conv", 32, 32),
    conv("block2.depth", 32, 32, groups=32),
    conv("block2.tiny", 8, 32),
    conv("block2.wide", 32, 32, 5),
    LayerSpec("fc1", "linear", (64, 32), bias=True),
    LayerSpec("fc", "linear", (10, 64), bias=True),
)


def space_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_default_space_leaves_first_conv_and_classifier_dense() -> None:
    space = load_space("cpu-default", LAYERS)
    assert space.choices["stem"] == space.choices["fc"] == (Dense(),)
    searched = [layer.name for layer in space.searched]
    assert searched == ["block1.conv", "block1.short", "block2.conv", "block2.tiny", "fc1"]


def test_default_space_offers_a_wide_3x3_conv_every_kernel_family() -> None:
    choices = load_space("cpu-default", LAYERS).choices["block2.conv"]
    assert len(choices) == 1 + 2 * 9 + 3 * 3 * 2 + 9 + 6
    kinds = {choice.kind for choice in choices}
    assert kinds == {"dense", "block", "pattern", "fine", "ck"}
    assert Block(0.333, 32) in choices
    assert Pattern(12, 4, 0.25, (16, 1)) in choices
    assert {choice.kernel for choice in choices} == {"dense", "block", "csr"}


def test_default_space_drops_what_a_layer_cannot_take() -> None:
    choices = load_space("cpu-default", LAYERS).choices
    assert not any(isinstance(c, Block) and c.filters == 32 for c in choices["block1.conv"])
    assert {c.kind for c in choices["block2.tiny"]} == {"dense", "pattern", "fine", "ck"}
    assert {c.kind for c in choices["block1.short"]} == {"dense", "block", "fine"}
    assert choices["block2.depth"] == choices["block2.wide"] == (Dense(),)
    assert {c.kind for c in choices["fc1"]} == {"dense", "block", "fine", "nm"}


def test_choices_are_ordered_dense_then_by_density_then_by_text() -> None:
    space = load_space("cpu-default", LAYERS)
    for layer in space.layers:
        choices = space.choices[layer.name]
        keys = [(-choice.density(layer), choice.text) for choice in choices[1:]]
        assert choices[0] == Dense()
        assert keys == sorted(keys)
        assert len(set(choices)) == len(choices)


def test_the_first_matching_rule_decides(tmp_path: Path) -> None:
    path = space_file(
        tmp_path,
        """
name: own
rules:
  - match: {name: "block1.*", op: conv}
    choices: [{kind: fine, keep: 0.5}]
  - match: {op: linear, position: last}
    choices: [{kind: dense}]
  - match: {op: linear}
    choices: [{kind: fine, keep: [0.5, 0.25]}]
  - choices: [{kind: ck, keep: 0.5}]
""",
    )
    space = load_space(path, LAYERS)
    assert space.name == "own"
    assert space.choices["block1.conv"] == space.choices["block1.short"] == (Dense(), Fine(0.5))
    assert space.choices["fc1"] == (Dense(), Fine(0.5), Fine(0.25))
    assert space.choices["fc"] == (Dense(),)
    assert space.choices["stem"] == (Dense(), CK(0.5))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("rules: [{match: {opp: conv}, choices: [{kind: dense}]}]\nname: x", r"rules\.0\.match\.opp"),
        ("rules: [{choices: [{kind: block, keep: [1.5]}]}]\nname: x", r"rules\.0\.choices\.0\.block\.keep\.0"),
        ("rules: [{choices: [{kind: dense}, {kind: blok}]}]\nname: x", r"rules\.0\.choices\.1'.*blok"),
        ("rules: [{choices: [{kind: block, keep: 0.5, filters: 24}]}]\nname: x", r"rules\.0\.choices\.0'.*16 and 32"),
        ("rules: [{choices: [{kind: pattern, count: 8, share: 16}]}]\nname: x", r"choices\.0\.pattern\.share"),
        ("rules: []\nname: x", "rules"),
        ("rules: [{choices: [{kind: dense}]}]", "name"),
        ("[1, 2]", "whole file"),
        ("rules: [", "not YAML at line"),
    ],
)
def test_a_wrong_field_is_named_with_its_path_and_the_file(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(SpaceError, match=where) as error:
        load_space(space_file(tmp_path, text), LAYERS)
    assert "own.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_tags_are_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "made"
    path = space_file(tmp_path, f"name: !!python/object/apply:pathlib.Path.touch [{mark}]")
    with pytest.raises(SpaceError, match="not YAML"):
        load_space(path, LAYERS)
    assert not mark.exists()


def test_unknown_presets_and_absent_files_are_told_apart(tmp_path: Path) -> None:
    assert "cpu-default" in presets()
    with pytest.raises(UnknownName, match="Did you mean 'cpu-default'"):
        load_space("cpu-defualt", LAYERS)
    with pytest.raises(SpaceError, match="cannot be read"):
        load_space(tmp_path / "none.yaml", LAYERS)


def test_fingerprint_changes_with_layers_and_choices_only() -> None:
    space = load_space("cpu-default", LAYERS)
    assert space.fingerprint == load_space("cpu-default", LAYERS).fingerprint
    assert len(space.fingerprint) == 16
    wider = tuple(replace(layer, input_hw=(9, 9)) if layer.name == "stem" else layer for layer in LAYERS)
    assert load_space("cpu-default", wider).fingerprint != space.fingerprint
    fewer = {name: choices[:2] for name, choices in space.choices.items()}
    assert SearchSpace(LAYERS, fewer).fingerprint != space.fingerprint


def test_a_space_refuses_what_breaks_its_order() -> None:
    layer = LAYERS[3]
    with pytest.raises(SpaceError, match="no layer"):
        SearchSpace((), {})
    with pytest.raises(SpaceError, match="by falling density"):
        SearchSpace((layer,), {layer.name: (Fine(0.5), Dense())})
    with pytest.raises(SpaceError, match="by falling density"):
        SearchSpace((layer,), {layer.name: (Dense(), Fine(0.25), Fine(0.5))})
    with pytest.raises(SpaceError, match="same layers"):
        SearchSpace((layer,), {"other": (Dense(),)})
    with pytest.raises(ChoiceError, match="cannot take"):
        SearchSpace((LAYERS[1],), {LAYERS[1].name: (Dense(), Block(0.5, 32))})
