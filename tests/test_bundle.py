"""A pruned network leaves as safetensors and JSON, and the user's own code brings it back with the same outputs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_pruning
from hypothesis import given
from hypothesis import strategies as st
from networks import settled
from torch import Tensor, nn

import autoprune
from autoprune.core.choices import Block, Channels, Fine
from autoprune.core.errors import ModelError
from autoprune.export.architecture import describe, rebuild
from autoprune.export.bundle import ARCHITECTURE, WEIGHTS
from autoprune.export.forms import apply_policy, check_same_outputs
from autoprune.export.kept import kept_of, taken
from autoprune.sparsity.channel_graph import channel_groups
from autoprune.tasks.models import build_model


class Tied(nn.Module):
    """Two linear layers that share one weight, a depthwise convolution, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 16, 1)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.norm(self.depth(self.stem(x))).relu()).mean((2, 3))
        return self.scale * self.second(self.first(x).relu())


def half_the_channels(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy without half of the channels, by a tool that knows nothing of us."""
    smaller = copy.deepcopy(model).requires_grad_(True)  # the tool follows gradients
    last = [module for module in smaller.modules() if isinstance(module, nn.Linear)]
    pruner = torch_pruning.pruner.MagnitudePruner(
        smaller, example, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=last, round_to=4,
    )  # fmt: skip
    pruner.step()
    return smaller.eval()


def resnet() -> nn.Module:
    return settled(build_model("resnet20", 3, 10))


def tied() -> nn.Module:
    return settled(Tied())


def without_first(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``Tied`` in which every second channel of the stem is gone."""
    smaller = copy.deepcopy(model).requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(smaller, example_inputs=example)
    prune = torch_pruning.prune_conv_out_channels
    graph.get_pruning_group(smaller.stem, prune, idxs=[0, 2, 4, 6, 8]).prune()
    return smaller.eval()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], nn.Module]]] = {
    "resnet": (resnet, half_the_channels),
    "tied": (tied, without_first),
}


@pytest.mark.parametrize("case", CASES)
def test_a_network_shrunk_by_another_tool_comes_back_with_the_same_outputs(case: str, tmp_path: Path) -> None:
    make, shrink = CASES[case]
    model, x = make(), torch.randn(2, 3, 12, 12)
    smaller = shrink(model, x)
    assert sum(p.numel() for p in smaller.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    architecture = autoprune.save(model, smaller, tmp_path)
    fresh = autoprune.load(tmp_path, model=make)
    assert not fresh.training
    assert torch.equal(fresh(x), smaller(x))
    assert {p.name for p in tmp_path.iterdir()} == {ARCHITECTURE, WEIGHTS}
    for name, delta in architecture.shrunk.items():
        assert delta.kept is not None, name
        old, new = model.state_dict()[name], smaller.state_dict()[name]
        assert torch.equal(taken(old, tuple(None if k is None else tuple(k) for k in delta.kept)), new)


def test_kept_indices_are_those_that_were_not_removed() -> None:
    model, x = tied(), torch.randn(1, 3, 12, 12)
    delta = describe(model, without_first(model, x)).tensors
    left = [1, 3, 5, 7, 9, 10, 11, 12, 13, 14, 15]
    assert delta["stem.weight"].kept == [left, None, None, None]
    assert delta["depth.weight"].kept == [left, None, None, None]
    assert delta["norm.running_mean"].kept == [left]
    assert delta["point.weight"].kept == [None, left, None, None]
    assert delta["point.weight"].before == [16, 16, 1, 1]


def test_a_shared_weight_is_stored_once_and_stays_shared(tmp_path: Path) -> None:
    model = tied()
    architecture = autoprune.save(model, model, tmp_path, form="masked")
    assert architecture.aliases == {"second.weight": "first.weight"}
    fresh = autoprune.load(tmp_path, model=tied)
    assert fresh.get_submodule("second").weight is fresh.get_submodule("first").weight


@given(
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    zeros=st.floats(0.0, 0.6),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_kept_rows_and_columns_are_found_again(
    rows: int, columns: int, zeros: float, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, columns, 3, generator=generator)
    old *= torch.rand(rows, columns, 1, generator=generator) >= zeros
    index = [tuple(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))) for n in (rows, columns)]
    new = taken(old, (index[0], index[1], None))
    found = kept_of(old, new)
    # Where zeros leave two answers there is none; a wrong one never.
    if found is not None:
        assert torch.equal(taken(old, found), new)
    if zeros == 0.0:
        want = tuple(None if len(part) == n else part for part, n in zip(index, (rows, columns), strict=True))
        assert found == (*want, None)


def test_values_that_do_not_tell_give_no_indices() -> None:
    assert kept_of(torch.ones(6), torch.ones(3)) is None
    assert kept_of(torch.arange(6.0), torch.tensor([5.0, 1.0])) is None
    assert kept_of(torch.arange(3.0), torch.arange(6.0)) is None


def masked_policy() -> dict[str, Block | Fine]:
    return {"layer1.0.conv1": Block(keep=0.25), "layer2.0.conv2": Fine(keep=0.125), "layer3.2.conv1": Fine(keep=0.25)}


@pytest.mark.parametrize("form", ["masked", "packed"])
def test_dense_shapes_hold_the_masked_weights_to_the_bit(form: str, tmp_path: Path) -> None:
    model, x = resnet(), torch.randn(2, 3, 16, 16)
    applied = apply_policy(model, masked_policy(), form)  # type: ignore[arg-type]
    autoprune.save(model, applied.network, tmp_path, form=form)  # type: ignore[arg-type]
    fresh = autoprune.load(tmp_path, model=resnet)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in applied.masked.state_dict().items())
    assert check_same_outputs(fresh, applied.masked, x) == 0.0
    kept = torch.count_nonzero(fresh.get_submodule("layer2.0.conv2").weight)
    assert int(kept) == 32 * 32 * 9 // 8


def test_packed_weights_take_what_their_values_and_a_bit_a_place_take(tmp_path: Path) -> None:
    model = resnet()
    network = apply_policy(model, masked_policy(), "packed").network
    autoprune.save(model, network, tmp_path / "masked", form="masked")
    autoprune.save(model, network, tmp_path / "packed", form="packed")
    sizes = [(tmp_path / form / WEIGHTS).stat().st_size for form in ("masked", "packed")]
    weights = {name: network.get_submodule(name).weight for name in masked_policy()}
    saved = sum(4 * (w.numel() - int(torch.count_nonzero(w))) - w.numel() // 8 for w in weights.values())
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=1_000)


def test_a_compact_network_has_lost_its_dead_channels_and_nothing_else(tmp_path: Path) -> None:
    model, x = resnet(), torch.randn(2, 3, 16, 16)
    for name in ("layer1.0.conv1", "layer3.1.conv1"):
        with torch.no_grad():
            model.get_submodule(name).weight[::2] = 0.0
            # What a BatchNorm makes of a channel of zeros must be zero for a padded reader.
            model.get_submodule(name.replace("conv", "bn")).bias[::2] = -5.0
            model.get_submodule(name.replace("conv", "bn")).running_mean[::2] = 0.0
    applied = apply_policy(model, {"layer1.0.conv1": Fine(keep=0.5)}, "compact")
    assert applied.removed == {"layer1.0.conv1": 8, "layer3.1.conv1": 32}
    autoprune.save(applied.masked, applied.network, tmp_path)
    fresh = autoprune.load(tmp_path, model=resnet)
    assert fresh.get_submodule("layer1.0.conv1").weight.shape == (8, 16, 3, 3)
    assert fresh.get_submodule("layer3.1.conv2").weight.shape == (64, 32, 3, 3)
    assert check_same_outputs(fresh, applied.masked, x) <= 1e-5


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    model = tied()
    autoprune.save(model, without_first(model, torch.randn(1, 3, 12, 12)), tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = folder / ARCHITECTURE
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda r: r.update(schema_version=99), "schema version 99 is newer"),
        (lambda r: r.update(colour="red"), "field 'colour'"),
        (lambda r: r["tensors"].pop("stem.bias"), "this model has 'stem.bias', the stored network has not"),
        (lambda r: r["tensors"].update(more={"shape": [3]}), "the stored network has 'more', this model has not"),
        (lambda r: r["tensors"]["stem.weight"].update(before=[9, 3, 3, 3]), "'stem.weight' is (16, 3, 3, 3) in this"),
        (lambda r: r["modules"]["stem"].update(colour=3), "has no attribute 'colour'"),
        (lambda r: r["modules"]["stem"].update(_parameters=3), "has no attribute '_parameters'"),
        (lambda r: r["modules"]["stem"].update(forward="x"), "has no attribute 'forward'"),
        (lambda r: r["modules"].update(gone={"a": 1}), "has a module 'gone'"),
        (lambda r: r["tensors"]["stem.bias"].update(shape=[12]), "does not fit"),
        (lambda r: r.update(weights_sha256="0" * 64), "is not the file that architecture.json was written with"),
    ],
)
def test_a_damaged_architecture_is_one_line(
    stored: Path, change: Callable[[dict[str, object]], None], part: str
) -> None:
    edit(stored, change)
    with pytest.raises(ModelError) as caught:
        autoprune.load(stored, model=tied)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_and_other_networks_are_one_line(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"in this model|this model has"):
        autoprune.load(stored, model=resnet)
    with pytest.raises(ModelError, match="the factory returned a int"):
        autoprune.load(stored, model=lambda: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(ModelError, match="saved without a name; give model="):
        autoprune.load(stored)
    (stored / WEIGHTS).write_bytes((stored / WEIGHTS).read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        autoprune.load(stored, model=tied)
    (stored / ARCHITECTURE).unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        autoprune.load(stored, model=tied)


def test_exchanged_modules_are_refused_by_name() -> None:
    model = tied()
    other = copy.deepcopy(model)
    other.norm = nn.Identity()
    with pytest.raises(ModelError, match="module 'norm' is BatchNorm2d in the network and Identity"):
        describe(model, other)
    grown = copy.deepcopy(model)
    grown.stem.weight = nn.Parameter(torch.zeros(20, 3, 3, 3))
    with pytest.raises(ModelError, match="a shrunk network only loses parts"):
        describe(model, grown)


def test_rebuilding_leaves_the_users_network_as_it_was() -> None:
    model = tied()
    architecture = describe(model, without_first(model, torch.randn(1, 3, 12, 12)))
    before = {name: value.shape for name, value in model.state_dict().items()}
    assert rebuild(model, architecture).get_submodule("stem").out_channels == 11  # type: ignore[union-attr]
    assert {name: value.shape for name, value in model.state_dict().items()} == before


def test_channels_of_a_residual_network_leave_whole_groups_at_a_time(tmp_path: Path) -> None:
    model, x = resnet(), torch.randn(2, 3, 16, 16)
    groups = channel_groups(model, x)
    leaders = list(groups.coupling.groups)
    choices = groups.coupling.expanded({name: Channels(0.5) for name in leaders})
    applied = apply_policy(model, choices, "compact", x)
    assert set(choices) <= set(applied.removed)
    autoprune.save(applied.masked, applied.network, tmp_path)
    fresh = autoprune.load(tmp_path, model=resnet)
    assert check_same_outputs(fresh, applied.masked, x) <= 1e-5
    assert sum(p.numel() for p in fresh.parameters()) < 0.4 * sum(p.numel() for p in model.parameters())
