"""Stitching, recalibration, folding and prefix caching against plain runs of the same network."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.core.choices import Block, Choice, Dense, Fine, Pattern, parse_choice
from autoprune.core.progress import Silent
from autoprune.envs.database import LayerDatabase, build_database, measure_moments
from autoprune.envs.evaluator import Evaluator, divergence, divergences, telling_images
from autoprune.envs.network import BATCH, StitchedNetwork, norm_of_each_conv, recalibrate
from autoprune.envs.prefix import PrefixCache
from autoprune.envs.store import DatabaseStore
from autoprune.search.setup import RECALIBRATION_IMAGES
from autoprune.search_spaces.trace import trace
from autoprune.tasks.metrics import evaluate_logits, top1
from autoprune.tasks.precision import native_dtype
from autoprune.tasks.task import Task, load_task


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("resnet20", "fashion-mnist")


@pytest.fixture(scope="module")
def calibration(task: Task) -> torch.Tensor:
    return task.data.normalize(task.data.train.images[:250])


@pytest.fixture(scope="module")
def images(task: Task) -> torch.Tensor:
    return task.data.normalize(task.data.validation.images[:250])


@pytest.fixture(scope="module")
def options(task: Task) -> dict:
    layers = {layer.name: layer for layer in trace(task.model, task.example)}
    chosen = (Dense(), Block(0.5), Fine(0.25), Fine(0.0625), Pattern(8, 4, 0.5, (1, 1)))
    return {layers[name]: chosen for name in ("layer1.0.conv2", "layer2.1.conv1", "layer3.2.conv2")}


@pytest.fixture(scope="module")
def database(task: Task, options: dict, calibration: torch.Tensor) -> LayerDatabase:
    return build_database(task.model, options, calibration)


def test_every_convolution_is_paired_with_its_norm(task: Task) -> None:
    pairs = norm_of_each_conv(task.model, task.example)
    assert pairs["layer2.0.shortcut.0"] == "layer2.0.shortcut.1"
    assert len(pairs) == 21


def test_the_folded_network_gives_the_models_own_logits(
    task: Task, calibration: torch.Tensor, images: torch.Tensor
) -> None:
    network = StitchedNetwork(task.model, calibration)
    network.load({})
    network.fold()
    want = evaluate_logits(task.model, images)
    got = network.logits(images)
    # bfloat16 rounds logits to three digits
    assert float((got - want).abs().mean()) < 0.1
    assert float((got.argmax(1) == want.argmax(1)).float().mean()) > 0.98


def test_recalibration_sets_the_statistics_of_the_images_and_nothing_else(
    task: Task, calibration: torch.Tensor
) -> None:
    model = copy.deepcopy(task.model)
    recalibrate(model, calibration, batch=250)
    x = model.conv1(calibration)  # type: ignore[operator]
    torch.testing.assert_close(model.bn1.running_mean, x.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
    torch.testing.assert_close(model.bn1.running_var, x.var((0, 2, 3)), rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
    assert torch.equal(model.conv1.weight, task.model.conv1.weight)  # type: ignore[union-attr,arg-type]
    assert not model.training
    assert model.bn1.momentum == task.model.bn1.momentum  # type: ignore[union-attr]


def test_sampled_moments_are_those_of_all_positions(task: Task, images: torch.Tensor) -> None:
    layers = {layer.name: layer for layer in trace(task.model, task.example)}
    layer = layers["layer3.1.conv1"]
    got = measure_moments(task.model, [layer], images)[layer.name]
    seen: list[torch.Tensor] = []
    module = task.model.get_submodule(layer.name)
    handle = module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    evaluate_logits(task.model, images)
    handle.remove()
    rows = nn.functional.unfold(torch.cat(seen), 3, padding=1).transpose(1, 2).reshape(-1, layer.weights // 64)
    torch.testing.assert_close(got.second_DD, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.mean_D, rows.mean(0), rtol=1e-3, atol=1e-4)


def test_prefix_caching_gives_the_logits_of_a_whole_run(
    task: Task, database: LayerDatabase, options: dict, calibration: torch.Tensor, images: torch.Tensor
) -> None:
    network = StitchedNetwork(task.model, calibration)
    network.load({})
    network.fold()
    cache = PrefixCache(network.folded, network.to_native(images), [layer.name for layer in options])
    for layer in options:
        network.load({layer.name: database.weight(layer.name, Fine(0.25))})
        network.fold()
        assert torch.equal(cache.logits(layer.name), network.logits(images))


def test_prefix_caching_runs_untraceable_networks_whole(images: torch.Tensor) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean((2, 3)) if x.sum() > -1e9 else x

    model = Branching().eval()
    with torch.inference_mode():
        assert torch.allclose(PrefixCache(model, images, ["conv"]).logits("conv"), model(images), atol=1e-6)


def test_single_layer_errors_grow_with_sparsity_and_are_zero_for_dense(
    task: Task, database: LayerDatabase, options: dict, calibration: torch.Tensor, images: torch.Tensor
) -> None:
    labels = task.data.validation.labels[:250]
    evaluator = Evaluator(StitchedNetwork(task.model, calibration), database, images, labels)
    for row in evaluator.single_errors(options, 250):
        assert row[0] == 0.0
        assert (row[1:] > 0.0).all()
        assert row[3] > row[2]


def test_quality_of_the_dense_policy_is_near_dense_and_of_a_pruned_one_deterministic(
    task: Task, database: LayerDatabase, calibration: torch.Tensor, images: torch.Tensor
) -> None:
    labels = task.data.validation.labels[:250]
    evaluator = Evaluator(StitchedNetwork(task.model, calibration), database, images, labels)
    dense = evaluator.quality({})
    assert abs(dense.accuracy - top1(evaluate_logits(task.model, images), labels)) <= 0.02
    policy = {"layer2.1.conv1": Fine(0.0625), "layer3.2.conv2": Block(0.5)}
    first, second = evaluator.quality(policy), evaluator.quality(policy)
    assert first.error == second.error
    assert first.error > dense.error


def test_a_killed_build_goes_on_where_it_was_and_a_later_one_reuses_it(
    task: Task, database: LayerDatabase, options: dict, calibration: torch.Tensor, tmp_path: Path
) -> None:
    store = DatabaseStore(tmp_path / "database")

    class Killed(Silent):
        """Ends at the first layer whose weights are made."""

        name = ""

        def stage(self, name: str, total: int | None = None) -> None:
            self.name = name

        def advance(self, n: int = 1) -> None:
            if self.name == "layer database":
                raise KeyboardInterrupt

    class Counted(Silent):
        """Counts the steps of each stage."""

        def __init__(self) -> None:
            self.steps: dict[str, int] = {}

        def stage(self, name: str, total: int | None = None) -> None:
            self.steps[name] = 0

        def advance(self, n: int = 1) -> None:
            self.steps[list(self.steps)[-1]] += n

    with pytest.raises(KeyboardInterrupt):
        build_database(task.model, options, calibration, Killed(), store)
    made = {path: path.stat().st_mtime_ns for path in store._folder.iterdir()}
    assert any(path.name.startswith("weights-") for path in made)
    counted = Counted()
    again = build_database(task.model, options, calibration, counted, store)
    assert counted.steps == {"layer database": len(options)}  # no image passed the network again
    assert again.weights.keys() == database.weights.keys()
    assert all(torch.equal(tensor, again.weights[key]) for key, tensor in database.weights.items())
    # What was finished was not made again, and a space that shares schemes takes them from here.
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    files = set(store._folder.iterdir())
    fewer = {layer: (Dense(), Block(0.5)) for layer in options}
    assert build_database(task.model, fewer, calibration, store=store).weights.keys() < database.weights.keys()
    assert set(store._folder.iterdir()) == files


def test_a_damaged_part_of_a_database_is_made_again(
    task: Task, database: LayerDatabase, options: dict, calibration: torch.Tensor, tmp_path: Path
) -> None:
    store = DatabaseStore(tmp_path)
    build_database(task.model, options, calibration, store=store)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:500])
    again = build_database(task.model, options, calibration, store=store)
    assert all(torch.equal(tensor, again.weights[key]) for key, tensor in database.weights.items())


def test_branches_side_by_side_are_what_each_gives_alone(
    task: Task, database: LayerDatabase, options: dict, calibration: torch.Tensor, images: torch.Tensor
) -> None:
    network = StitchedNetwork(task.model, calibration)
    network.load({})
    network.fold()
    cache = PrefixCache(network.folded, network.to_native(images), [layer.name for layer in options], part=50)
    for layer in options:
        weights = [database.weight(layer.name, choice) for choice in (Fine(0.25), Block(0.5))]
        statistics = network.norm_statistics(layer.name)
        found = cache.branches(layer.name, 1, [network.changed(layer.name, w, statistics) for w in weights])
        assert found is not None
        for weight, logits in zip(weights, found, strict=True):
            network.load({layer.name: weight})
            network.fold()
            want = network.logits(images[50:100])
            assert float((logits - want).abs().max()) <= 0.02 * float(want.abs().max())
        network.load({})
        network.fold()


def test_a_layer_that_runs_twice_is_not_branched(images: torch.Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, padding=1)
            self.both = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.both(self.both(self.first(x))).mean((2, 3))

    model = Twice().eval().requires_grad_(False)
    cache = PrefixCache(model, images[:20], ["first", "both"])
    parameters = [(model.both.weight, model.both.bias)]
    assert cache.branches("both", 0, parameters) is None
    assert torch.allclose(cache.logits("both"), model(images[:20]), atol=1e-6)


def test_divergence_is_zero_for_equal_and_the_textbook_value_otherwise() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    assert divergence(logits, logits) == pytest.approx(0.0, abs=1e-12)
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    want = float((p * np.log(p / q)).sum())
    assert divergence(torch.tensor(np.log(p))[None], torch.tensor(np.log(q))[None]) == pytest.approx(want)


def _disturbed_logits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of mostly decided images, and the same with noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1_000, 10, generator=generator)
    logits[:, 0] += 14.0 * torch.rand(1_000, generator=generator)
    return logits, logits + 0.2 * torch.randn(1_000, 10, generator=generator)


def test_few_telling_images_estimate_the_error_better_than_the_first_ones() -> None:
    off, off_first = [], []
    for seed in range(20):
        dense, found = _disturbed_logits(seed)
        whole = divergence(dense, found)
        drawn, scales = telling_images(dense, 100)
        off.append(float((divergences(dense[drawn], found[drawn]) * scales).mean()) / whole - 1.0)
        off_first.append(divergence(dense[:100], found[:100]) / whole - 1.0)
    assert np.std(off) < 0.6 * np.std(off_first)
    assert abs(np.mean(off)) < 0.05


@pytest.mark.parametrize("count", [4, 96, 999])
def test_telling_images_are_distinct(count: int) -> None:
    dense, _ = _disturbed_logits(1)
    drawn, scales = telling_images(dense, count)
    assert len(drawn) == len(scales) == count
    assert len(set(drawn.tolist())) == count


def test_all_images_are_taken_as_they_are() -> None:
    dense, found = _disturbed_logits(2)
    drawn, scales = telling_images(dense, 1_000)
    assert drawn.tolist() == list(range(1_000))
    assert float((divergences(dense, found) * scales).mean()) == pytest.approx(divergence(dense, found))


def test_one_evaluation_costs_little_more_than_a_forward_of_the_same_images(
    task: Task, database: LayerDatabase
) -> None:
    """The bar is 1.2 on a quiet core (``benchmarks/evaluation.py``); this machine may be busy."""
    data = task.data
    scored = data.validation.take(500)
    images = data.normalize(scored.images)
    network = StitchedNetwork(task.model, data.normalize(data.train.images[: RECALIBRATION_IMAGES // 2]))
    evaluator = Evaluator(network, database, images, scored.labels)
    plain = copy.deepcopy(task.model).to(native_dtype(), memory_format=torch.channels_last)
    parts = torch.split(network.to_native(images), BATCH)
    policy = {layer: Fine(0.25) for layer, _ in database.weights}
    seconds: dict[str, list[float]] = {"plain": [], "evaluation": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            started = time.process_time()
            with torch.inference_mode():
                for part in parts:
                    plain(part)
            seconds["plain"].append(time.process_time() - started)
            started = time.process_time()
            evaluator.quality(policy)
            seconds["evaluation"].append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds["evaluation"]) < 1.6 * min(seconds["plain"])


def test_single_layer_errors_run_each_choice_on_the_drawn_images_once(
    task: Task, database: LayerDatabase, options: dict, calibration: torch.Tensor, images: torch.Tensor
) -> None:
    network = StitchedNetwork(task.model, calibration)
    evaluator = Evaluator(network, database, images, task.data.validation.labels[:250])
    passed: list[int] = []
    first: list[int] = []
    network.folded.fc.register_forward_hook(lambda module, inputs, output: passed.append(len(inputs[0])))  # type: ignore[union-attr]
    network.folded.conv1.register_forward_hook(lambda module, inputs, output: first.append(len(inputs[0])))  # type: ignore[union-attr]
    evaluator.single_errors(options, 20)
    assert sum(passed) == 20 * sum(len(choices) - 1 for choices in options.values())
    assert sum(first) <= 20 * torch.get_num_threads()


def test_scores_on_drawn_images_estimate_those_on_all(
    task: Task, database: LayerDatabase, calibration: torch.Tensor, images: torch.Tensor
) -> None:
    labels = task.data.validation.labels[:250]
    network = StitchedNetwork(task.model, calibration)
    whole, drawn = (Evaluator(network, database, images, labels, count) for count in (None, 125))
    policies = [{layer: choice} for layer, choice in _pruned_pairs(database)]
    want = [whole.quality(policy) for policy in policies]
    got = [drawn.quality(policy) for policy in policies]
    assert np.corrcoef([np.log(q.error) for q in want], [np.log(q.error) for q in got])[0, 1] > 0.95
    assert max(abs(w.accuracy - g.accuracy) for w, g in zip(want, got, strict=True)) < 0.05
    all_of_them = Evaluator(network, database, images, labels, 250)
    assert all_of_them.quality(policies[0]).error == want[0].error


def _pruned_pairs(database: LayerDatabase) -> list[tuple[str, Choice]]:
    return [(layer, parse_choice(text)) for layer, text in database.weights]
