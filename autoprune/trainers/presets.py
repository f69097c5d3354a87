"""Named recipes: what the sources trained with, beside the one for the data inside the package.

A preset names the recipe, and for the method that it was published with that method's settings too. Given another
number of epochs, every epoch in it moves in proportion. What a source does not say is marked [ours].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoprune.core.registry import Registry
from autoprune.trainers.recipe import Recipe, scaled_epoch


@dataclass(frozen=True, slots=True)
class Preset:
    """A published training.

    Attributes:
        summary: One line for the help.
        recipe: How a network is trained.
        trainer: The method that it was published with; None for none.
        settings: Of that method.
        epoch_settings: Names of the settings that are epochs or lengths in epochs.
    """

    summary: str
    recipe: Recipe
    trainer: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    epoch_settings: tuple[str, ...] = ("warmup_epochs", "hard_epoch", "era_start", "era_length")

    def settings_for(self, trainer: str, epochs: int) -> dict[str, object]:
        """Return the settings for a training of ``epochs``; none for another method than the preset's."""
        if trainer != self.trainer:
            return {}
        return {
            name: scaled_epoch(value, self.recipe.epochs, epochs)
            if name in self.epoch_settings and isinstance(value, int)
            else value
            for name, value in self.settings.items()
        }


PRESETS: Registry[Preset] = Registry("recipe")

# Milestones, mixing and regularisation as in the released configurations; the mixing begins with the hard pruning.
_CLICKTRAIN_CIFAR = Recipe(
    epochs=190, batch_size=128, peak_lr=0.1, weight_decay=5e-4, shift=4, schedule="steps", drops=(55, 130),
    mixup=0.3, mixup_start=141,
)  # fmt: skip
_CLICKTRAIN_VGG = Recipe(
    epochs=190, batch_size=128, peak_lr=0.1, weight_decay=5e-4, shift=4, schedule="steps", drops=(55, 131),
    mixup=0.3, mixup_start=143,
)  # fmt: skip
_CLICKTRAIN_IMAGENET = Recipe(
    epochs=95, batch_size=256, peak_lr=0.1, weight_decay=1e-4, shift=0, schedule="steps", drops=(31, 61, 75),
    mixup=0.3, mixup_start=78,
)  # fmt: skip
# METHODS §1; the weight decay and the era inside the published range are [ours].
_CAMPFIRE_TINY = Recipe(
    epochs=40, batch_size=64, peak_lr=1e-3, weight_decay=0.0, shift=0, optimizer="adam", schedule="steps", drops=(30,)
)
_CAMPFIRE_V1 = Recipe(
    epochs=90, batch_size=128, peak_lr=0.1, weight_decay=1e-4, shift=0, schedule="steps", drops=(30, 60)
)
_CAMPFIRE_V15 = Recipe(
    epochs=90, batch_size=64, peak_lr=0.05, weight_decay=1e-4, shift=0, schedule="steps", drops=(30, 60)
)
_CAMPFIRE_V15_LONG = Recipe(
    epochs=100, batch_size=64, peak_lr=0.05, weight_decay=1e-4, shift=0, schedule="steps", drops=(30, 60, 90)
)


def _clicktrain(warmup: int, hard: int, lasso: float) -> dict[str, object]:
    return {"warmup_epochs": warmup, "hard_epoch": hard, "lasso": lasso, "pool": "generic", "batches": 1}


def _campfire(start: int, length: int) -> dict[str, object]:
    return {"era_start": start, "era_length": length}


for _name, _preset in {
    "default": Preset("SGD under one learning-rate cycle, as the checkpoint inside the package", Recipe(epochs=12)),
    "clicktrain-cifar-resnet": Preset(
        "190 epochs, drops at 55 and 130, Mixup once pruned", _CLICKTRAIN_CIFAR, "clicktrain",
        _clicktrain(61, 141, 2.5e-4),
    ),
    "clicktrain-cifar-vgg": Preset(
        "190 epochs, drops at 55 and 131, Mixup once pruned", _CLICKTRAIN_VGG, "clicktrain",
        _clicktrain(65, 143, 3.5e-4),
    ),
    "clicktrain-imagenet": Preset(
        "95 epochs, drops at 31, 61 and 75, Mixup once pruned", _CLICKTRAIN_IMAGENET, "clicktrain",
        _clicktrain(35, 78, 2.5e-4),
    ),
    "campfire-tiny-imagenet": Preset(
        "ResNet-50: Adam, 40 epochs, drop at 30, era 0 to 10", _CAMPFIRE_TINY, "campfire", _campfire(0, 10)
    ),
    "campfire-imagenet-v1": Preset(
        "ResNet-50 v1: 90 epochs, drops at 30 and 60, era 30 to 50", _CAMPFIRE_V1, "campfire", _campfire(30, 20)
    ),
    "campfire-imagenet-v1.5-90": Preset(
        "ResNet-50 v1.5: 90 epochs, drops at 30 and 60, era 30 to 60", _CAMPFIRE_V15, "campfire", _campfire(30, 30)
    ),
    "campfire-imagenet-v1.5-100": Preset(
        "the same and ten epochs after a further drop at 90", _CAMPFIRE_V15_LONG, "campfire", _campfire(30, 30)
    ),
}.items():  # fmt: skip
    PRESETS.register(_name)(_preset)
