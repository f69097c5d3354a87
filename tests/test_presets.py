"""The search spaces that come with the package: what they offer, and that each goes through a whole search."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_task import quick_measurements, small_task

import autoprune
from autoprune.cli.main import run as cli
from autoprune.core.choices import CK, NM, Channels, Combined, Dense, Fine, Pattern, Window
from autoprune.core.errors import SpaceError, UnknownName
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.core.rundir import RunDir
from autoprune.search_spaces.space import load_space, presets
from autoprune.tasks.task import Task

NAMES = {
    "amc-channels", "campfire-ck", "campfire-combined", "campfire-window", "clicktrain-patterns", "cpu-default",
    "mixed", "nm",
}  # fmt: skip


def conv(name: str, filters: int, channels: int, window: int = 3) -> LayerSpec:
    return LayerSpec(name, "conv", (filters, channels, window, window), input_hw=(8, 8), output_hw=(8, 8))


LAYERS = (
    conv("stem", 16, 1),
    conv("wide", 32, 16),
    conv("point", 32, 32, 1),
    LayerSpec("hidden", "linear", (64, 32)),
    LayerSpec("fc", "linear", (10, 64)),
)


def kinds(name: str, layer: str) -> set[type]:
    return {type(choice) for choice in load_space(name, LAYERS).choices[layer]} - {Dense}


def test_every_preset_is_known_and_says_what_it_is() -> None:
    assert set(presets()) >= NAMES
    for name in presets():
        text = (Path(autoprune.__file__).parent / "search_spaces" / "presets" / f"{name}.yaml").read_text()
        assert text.startswith("# "), name
        assert f"name: {name}\n" in text


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_first_convolution_stays_dense_everywhere(name: str) -> None:
    space = load_space(name, LAYERS)
    assert space.choices["stem"] == (Dense(),)
    assert space.name == name
    assert space.searched


def test_each_preset_offers_its_papers_scheme() -> None:
    assert kinds("amc-channels", "wide") == kinds("amc-channels", "point") == {Channels}
    assert kinds("clicktrain-patterns", "wide") == {Pattern}
    assert kinds("clicktrain-patterns", "point") == kinds("campfire-ck", "point") == {Fine}
    assert kinds("campfire-window", "wide") == {Window}
    assert kinds("campfire-ck", "wide") == {CK}
    assert kinds("campfire-combined", "wide") == {Combined}
    assert kinds("nm", "wide") == kinds("nm", "point") == kinds("nm", "hidden") == {NM}
    assert kinds("mixed", "wide") > {Pattern, Fine, CK, Window, Combined, NM}


def test_classifiers_are_pruned_where_the_paper_does_and_dense_elsewhere() -> None:
    pruned = {name for name in NAMES if len(load_space(name, LAYERS).choices["fc"]) > 1}
    assert pruned == {"campfire-window", "campfire-ck", "campfire-combined"}


def test_channel_widths_go_down_to_a_fifth() -> None:
    choices = load_space("amc-channels", LAYERS).choices["wide"]
    widths = [choice.width(32) if isinstance(choice, Channels) else 32 for choice in choices]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == 7


def test_a_layer_whose_channels_make_no_groups_stays_dense_in_nm() -> None:
    odd = (*LAYERS[:1], conv("odd", 32, 18), *LAYERS[1:])
    assert load_space("nm", odd).choices["odd"] == (Dense(),)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{kind: nm, n: 4, m: 4}", r"rules\.0\.choices\.0'.*nm\(n=4,m=4\)"),
        ("{kind: nm, n: [1, two], m: 4}", r"rules\.0\.choices\.0\.nm\.n\.1"),
        ("{kind: nm, n: 1}", r"rules\.0\.choices\.0\.nm\.m"),
        ("{kind: channels, keep: [0.5, 1.5]}", r"rules\.0\.choices\.0\.channels\.keep\.1"),
        ("{kind: channels, ratio: 0.5}", r"rules\.0\.choices\.0\.channels\.(keep|ratio)"),
        ("{kind: window, entries: 50}", r"rules\.0\.choices\.0'.*1 to 49"),
        ("{kind: combined, keep: 0.5, fraction: 0}", r"rules\.0\.choices\.0\.combined\.fraction"),
    ],
)
def test_a_users_wrong_grid_is_named_with_its_path(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"name: own\nrules: [{{choices: [{text}]}}]\n", encoding="utf-8")
    with pytest.raises(SpaceError, match=where):
        load_space(path, LAYERS)


def test_help_and_error_list_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["search", "--help"]) == 0
    # the table of the help breaks lines anywhere
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    with pytest.raises(UnknownName) as error:
        load_space("mixd", LAYERS)
    for name in NAMES:
        assert name in shown
        assert name in str(error.value)


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


@pytest.mark.parametrize("name", sorted(NAMES - {"amc-channels", "cpu-default"}))
def test_a_whole_search_ends_with_a_deployed_policy_of_the_preset(name: str, task: Task, tmp_path: Path) -> None:
    with quick_measurements():
        result = autoprune.search(
            task.model, task, budget="params=90%", space=name, agent="knapsack", evaluations=3, runs_dir=tmp_path,
            run="one",
        )  # fmt: skip
    policy = Policy.load(RunDir(tmp_path / "one").policy)
    assert result.met
    pruned = {choice for choice in policy.choices.values() if not isinstance(choice, Dense)}
    offered = {choice for choices in load_space(name, _layers(task)).choices.values() for choice in choices}
    assert pruned
    assert pruned <= offered
    chosen = result.row("chosen")
    assert chosen is not None
    assert chosen.measured is not None
    assert chosen.measured.latency_us > 0.0
    assert chosen.measured.params_ratio <= 0.9005


def _layers(task: Task) -> tuple[LayerSpec, ...]:
    from autoprune.search_spaces.trace import trace

    return trace(task.model, task.example)
