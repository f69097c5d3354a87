"""The lines of the studies of the trainers: what is trained, by which method and recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from autoprune.core.choices import Fine, parse_choice
from autoprune.core.errors import RunError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.lut.table import LatencyTable
from autoprune.search_spaces.uniform import uniform_policy
from autoprune.trainers.campfire import window_entries
from autoprune.trainers.recipe import Recipe
from autoprune.trainers.schedule import make_era, make_stages

REFERENCE = Path(__file__).parent.parent / "runs" / "reference"


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of a study: what is trained, and how.

    Attributes:
        study: Part of the row's case.
        name: The row's choice.
        texts: Choices of the uniform policy.
        trainer, settings: The method.
        recipe: How.
        dense_recipe: Of the dense training that it is compared with.
        attack: Whether FGSM is measured too.
        policy: Instead of a uniform one.
        latency: Measured, of the deployed network over the fastest dense one; None where nobody measured it.
    """

    study: str
    name: str
    texts: tuple[str, ...]
    trainer: str
    recipe: Recipe
    dense_recipe: Recipe
    settings: Mapping[str, object] = field(default_factory=dict)
    attack: bool = False
    policy: Policy | None = None
    latency: float | None = None


def kernels_for(layers: Sequence[LayerSpec], ratio: float, entries: int = 4) -> float:
    """Return the share of kernels to keep for ``ratio`` times fewer convolution weights; the first layer is dense.

    At most 1: 2.25 is what patterns of 4 alone give where every convolution is 3×3 and pruned.
    """
    convs = [layer for layer in layers if layer.op == "conv"]
    rest = [layer for layer in convs[1:] if layer.groups == 1]
    scale = sum(layer.weights * (entries / 9 if layer.window == (3, 3) else 1.0) for layer in rest)
    fixed = sum(layer.weights for layer in convs) - sum(layer.weights for layer in rest)
    kept = sum(layer.weights for layer in convs) / ratio - fixed
    return round(min(1.0, max(0.01, kept / scale)), 4)


def clicktrain_cells(layers: Sequence[LayerSpec], recipe: Recipe) -> Iterator[Cell]:
    """Study 1: patterns by compression and share."""
    for ratio in (2.25, 4.5, 8.6, 10.7):
        kernels = kernels_for(layers, ratio)
        for share in ("1x1", "16x1"):
            texts = [f"pattern(count=8,entries=4,kernels={kernels},share={share})"]
            texts += [f"fine(keep={kernels})"] if kernels < 1.0 else []
            yield Cell("clicktrain", f"{ratio}x share {share}", tuple(texts), "clicktrain", recipe, recipe)


def campfire_cells(layers: Sequence[LayerSpec], recipe: Recipe) -> Iterator[Cell]:
    """Study 2: schemes by sparsity, the era's start, ten more epochs in a hundred; FGSM at 60 %."""
    for percent in (40, 60, 70, 80):
        keep = round(1.0 - percent / 100, 2)
        schemes = {
            "window": f"window(entries={window_entries(percent / 100)})",
            "ck": f"ck(keep={keep})",
            "combined": f"combined(keep={keep})",
        }
        for name, text in schemes.items():
            texts = (text, f"fine(keep={keep})")
            yield Cell(
                "campfire", f"{name} {percent}%", texts, "campfire", recipe, recipe,
                attack=percent == 60,
            )  # fmt: skip
    texts = ("ck(keep=0.4)", "fine(keep=0.4)")
    length = max(1, round(0.3 * recipe.epochs))
    for name, share in (("early", 0.0), ("middle", 0.3), ("late", 0.5)):
        settings = {"era_start": int(share * recipe.epochs), "era_length": length}
        yield Cell("campfire era", f"ck 60% {name}", texts, "campfire", recipe, recipe, settings)
    drops = tuple(round(recipe.epochs * part / 9) for part in (3, 6))
    short = replace(recipe, schedule="steps", drops=drops, peak_lr=0.1)
    more = max(1, round(recipe.epochs / 9))
    long = replace(short, epochs=recipe.epochs + more, drops=(*drops, recipe.epochs))
    settings = {"era_start": drops[0], "era_length": max(1, min(length, recipe.epochs - 1 - drops[0]))}
    for name, chosen in (("without", short), (f"with {more}", long)):
        yield Cell("campfire more epochs", f"ck 60% {name}", texts, "campfire", chosen, chosen, settings)


def trade_cells(layers: Sequence[LayerSpec], recipe: Recipe) -> Iterator[Cell]:
    """Study 3: what pruning afterwards costs for the accuracy of pruning meanwhile, at 8.6 times."""
    kernels = kernels_for(layers, 8.6)
    texts = (f"pattern(count=8,entries=4,kernels={kernels},share=1x1)", f"fine(keep={kernels})")
    yield Cell("trade", "clicktrain", texts, "clicktrain", recipe, recipe)
    epochs = recipe.epochs
    for part in (0.25, 0.5, 1.0, 1.3):
        tuned = max(1, round(part * epochs))
        settings = {"prune_epoch": epochs}
        name = f"train, prune, fine-tune {part:g}E"
        yield Cell("trade", name, texts, "magnitude", replace(recipe, epochs=epochs + tuned), recipe, settings)
    half = max(1, epochs // 2)
    settings = {"warmup_epochs": epochs, "hard_epoch": epochs + half}
    chosen = replace(recipe, epochs=epochs + 2 * half)
    yield Cell("trade", "train, ADMM 0.5E, retrain 0.5E", texts, "admm", chosen, recipe, settings)


def core_cells(layers: Sequence[LayerSpec], recipe: Recipe) -> Iterator[Cell]:
    """The short study: the claims one by one, the most telling first, sized for an afternoon of one core."""
    stages = make_stages(recipe.epochs)
    warm = {"warmup_epochs": max(1, stages.warmup), "hard_epoch": max(2, stages.hard)} if recipe.epochs > 2 else {}
    for ratio in (8.6, 4.5):
        kernels = kernels_for(layers, ratio)
        texts = (f"pattern(count=8,entries=4,kernels={kernels},share=1x1)", f"fine(keep={kernels})")
        yield Cell("core", f"clicktrain {ratio}x share 1x1", texts, "clicktrain", recipe, recipe, warm)
    settings = _short_era(recipe)
    for percent in (60, 80):
        keep = round(1.0 - percent / 100, 2)
        texts = (f"combined(keep={keep})", f"fine(keep={keep})")
        name = f"campfire combined {percent}%"
        yield Cell("core", name, texts, "campfire", recipe, recipe, settings, attack=percent == 60)
    yield from searched_cells(layers, recipe)


def _short_era(recipe: Recipe) -> dict[str, object]:
    """Return Campfire's settings for a few epochs, which are too coarse a grain for its era."""
    era = make_era(recipe.epochs)
    return {"era_start": era.start, "era_length": era.length, "schedule": "step", "every": 20}


def searched_cells(layers: Sequence[LayerSpec], recipe: Recipe, run: Path = REFERENCE) -> Iterator[Cell]:
    """A search's policy against single weights at one density, of the same latency by the search's own table.

    Args:
        layers: Of the network that was searched.
        recipe: Of both trainings, which Campfire prunes.
        run: The search's folder.
    """
    settings = _short_era(recipe)
    searched = Policy.load(run / "policy.json")
    table = LatencyTable.load(run / "table.json")
    dense_us = table.network_us(layers, {})
    target_us = table.network_us(layers, searched.choices)
    uniform = uniform_policy(layers, [f"fine(keep={equal_keep(table, layers, target_us)})"], model=searched.file.model)
    for name, policy in (("searched", searched), ("uniform", uniform)):
        yield Cell(
            "core", f"{name} {searched.file.budget}", (), "campfire", recipe, recipe, settings, policy=policy,
            latency=target_us / dense_us,
        )  # fmt: skip


def equal_keep(table: LatencyTable, layers: Sequence[LayerSpec], target_us: float) -> float:
    """Return the share of single weights at which a uniform network takes ``target_us``, between a table's rows.

    Raises:
        RunError: The target lies outside of what the table's rows of single weights span.
    """
    rows = {key[1] for key in table.rows}
    keeps = sorted(choice.keep for text in rows if isinstance(choice := parse_choice(text), Fine))
    times = []
    for keep in keeps:
        policy = uniform_policy(layers, [f"fine(keep={keep})"], model="")
        times.append(table.network_us(layers, policy.choices))
    for (low, fast), (high, slow) in pairwise(zip(keeps, times, strict=True)):
        if fast <= target_us <= slow:
            return round(low + (high - low) * (target_us - fast) / (slow - fast), 4)
    raise RunError(f"no uniform policy of single weights takes {target_us:.0f} us by this table.")


CELLS: Mapping[str, Callable[[Sequence[LayerSpec], Recipe], Iterator[Cell]]] = {
    "core": core_cells,
    "clicktrain": clicktrain_cells,
    "campfire": campfire_cells,
    "trade": trade_cells,
    "searched": searched_cells,
}
