"""The layer database: for every (layer, choice) the masked, compensated weights and what choosing them alone costs.

It is built once per model and data and kept by choice; a policy is then evaluated by stitching entries together,
without training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.core.progress import Progress, Silent
from autoprune.envs.channel_weights import ChannelWeights
from autoprune.envs.network import layer_of, side_by_side
from autoprune.envs.store import DatabaseStore, Moments
from autoprune.sparsity.channels import ChannelGroups, Criterion, parameter_masks
from autoprune.sparsity.compensate import SLACK, Hessian, compensate
from autoprune.sparsity.masks import make_mask

SAMPLES = 40_000
# Pixels of the images that pass the network together: 26 of 224 × 224, whose first maps are then 84 MB each.
_BATCH_PIXELS = 1_300_000
# Each step of a descent keeps at least this fraction of the one before.
STEP = 0.75
# What is only passed on the way need not be as close to the least error.
_PASSING_SLACK = 1e-2


class LayerDatabase:
    """Compensated weights by (layer name, choice text), and the statistics behind them.

    Attributes:
        weights: float32, zeros where pruned, in the module's own weight shape.
        moments: Inputs of every layer that is searched, or reads searched channels.
        channels: Weights under channel choices; None where none are searched.
    """

    def __init__(
        self,
        weights: Mapping[tuple[str, str], Tensor],
        moments: Mapping[str, Moments],
        channels: ChannelWeights | None = None,
    ) -> None:
        self.weights = dict(weights)
        self.moments = dict(moments)
        self.channels = channels

    def weight(self, layer: str, choice: Choice) -> Tensor:
        """Return the compensated weight of a layer under a choice other than dense."""
        return self.weights[layer, choice.text]

    def policy_weights(self, choices: Mapping[str, Choice]) -> dict[str, Tensor]:
        """Return layer → weight of every layer that is not as it was: its own choice, or channels it reads are gone."""
        found = {} if self.channels is None else self.channels.weights(choices)
        own = {name: choice for name, choice in choices.items() if not isinstance(choice, Dense | Channels)}
        return {**found, **{name: self.weight(name, choice) for name, choice in own.items()}}

    def changed_by(self, layer: str) -> tuple[str, ...]:
        """Return the layers whose weights depend on one layer's choice: itself, or what reads its group."""
        group = None if self.channels is None else self.channels.groups.coupling.group_of(layer)
        if self.channels is None or group is None:
            return (layer,)
        readers = set(self.channels.groups.readers(group.leader))
        return tuple(name for name in self.channels.readers if name in readers)

    def parameter_masks(self, model: nn.Module, choices: Mapping[str, Choice]) -> dict[str, Tensor]:
        """Return parameter name → which elements stay, of every parameter that a policy's channels touch."""
        if self.channels is None:
            return {}
        return parameter_masks(model, self.channels.groups, self.channels.kept(choices))


@dataclass(frozen=True, slots=True)
class Channelled:
    """What a database needs to know of channels.

    Attributes:
        groups: Of the model.
        layers: All layers of the model.
        criterion: Ranks the units of a group.
    """

    groups: ChannelGroups
    layers: Sequence[LayerSpec]
    criterion: Criterion = "input"

    def readers(self, leaders: Sequence[str]) -> list[LayerSpec]:
        """Return the layers that read any of some groups."""
        names = {name for leader in leaders for name in self.groups.readers(leader)}
        return [layer for layer in self.layers if layer.name in names]


def build_database(
    model: nn.Module,
    options: Mapping[LayerSpec, Sequence[Choice]],
    images: Tensor,
    progress: Progress | None = None,
    store: DatabaseStore | None = None,
    channels: Channelled | None = None,
) -> LayerDatabase:
    """Return the database of a dense model.

    Args:
        model: Dense network in eval mode, float32; the work is done on its device.
        options: Choices of each searched layer.
        images: Normalised calibration images ``(N, C, H, W)`` float32.
        progress: Told of two stages: the images that passed the network, the layers whose weights are made.
        store: Files of this model and these images: what they hold is not made again, what is made is kept at once.
        channels: Where channels are searched.
    """
    leaders = [layer.name for layer in options if any(isinstance(c, Channels) for c in options[layer])]
    readers = [] if channels is None else channels.readers(leaders)
    sparse = [layer for layer in options if layer.name not in leaders]
    progress = progress or Silent()
    moments = _moments(model, list(dict.fromkeys([*sparse, *readers])), images, progress, store)
    progress.stage("layer database", len(options))

    def solve(layer: LayerSpec) -> dict[tuple[str, str], Tensor]:
        if layer.name in leaders:
            return {}
        weight = layer_of(model, layer.name).weight.detach()
        pruned = [choice for choice in options[layer] if not isinstance(choice, Dense | Channels)]
        made = compensated_weights(weight, pruned, moments[layer.name], layer, store)
        return {(layer.name, choice.text): tensor for choice, tensor in made.items()}

    weights: dict[tuple[str, str], Tensor] = {}
    with side_by_side() as pool:
        # Largest first, so that all workers end together.
        jobs = [pool.submit(solve, layer) for layer in sorted(options, key=lambda layer: -layer.weights)]
        for job in as_completed(jobs):
            weights.update(job.result())
            progress.advance()
    if channels is None or not leaders:
        return LayerDatabase(weights, moments)
    own = ChannelWeights(model, channels.groups, leaders, moments, channels.criterion)
    return LayerDatabase(weights, moments, own)


def _moments(
    model: nn.Module, layers: Sequence[LayerSpec], images: Tensor, progress: Progress, store: DatabaseStore | None
) -> dict[str, Moments]:
    known = {layer.name: store.moments(layer) if store is not None else None for layer in layers}
    absent = [layer for layer in layers if known[layer.name] is None]
    measured = {}
    if absent:
        progress.stage("layer inputs", len(images))
        measured = measure_moments(model, absent, images, progress.advance)
    for layer in absent:
        if store is not None:
            store.save_moments(layer, measured[layer.name])
            measured[layer.name] = store.moments(layer) or measured[layer.name]  # in the file, not in memory
    return {layer.name: known[layer.name] or measured[layer.name] for layer in layers}


def compensated_weights(
    weight: Tensor,
    choices: Sequence[Choice],
    moments: Moments,
    layer: LayerSpec | None = None,
    store: DatabaseStore | None = None,
) -> dict[Choice, Tensor]:
    """Return choice → masked and compensated weight on the CPU, each in the shape of ``weight``.

    The choices of one scheme are made from dense to sparse, each from the compensated weights of the one before, with
    further densities in between where they lie far apart: a weight's magnitude says most about its worth when its
    neighbours have already taken over what was removed. Ours; on ResNet-20 it lifts the accuracy of all layers at
    density .11 (fine) from 90 to 92.5 % before any training, against one-shot magnitude.

    Args:
        weight: Dense weight, float32; the work is done on its device.
        choices: None of them dense.
        moments: Of the layer's inputs.
        layer, store: Where schemes that were made before are found, and new ones kept.
    """
    made: dict[Choice, Tensor] = {}
    absent = []
    for family in _families(choices).values():
        known = store.weights(layer, family) if store is not None and layer is not None else None
        if known is None:
            absent.append(family)
        made |= known or {}
    if not absent:
        return made
    hessian = Hessian(moments.second_DD.to(weight.device))
    for family in absent:
        new = _family_weights(weight, family, hessian)
        if store is not None and layer is not None:
            store.save_weights(layer, new)
            new = store.weights(layer, family) or new  # in the file, not in memory
        made |= new
    return made


def _family_weights(weight: Tensor, family: Sequence[Choice], hessian: Hessian) -> dict[Choice, Tensor]:
    flat_KD = now_KD = weight.flatten(1)
    scale_D = hessian.matrix_DD.diagonal().sqrt().float()
    made = {}
    for choice, wanted in _descent(family):
        score = (now_KD.square() * scale_D).reshape(weight.shape)
        mask = make_mask(weight, choice, score)
        now_KD = compensate(flat_KD, mask.flatten(1), hessian, SLACK if wanted else _PASSING_SLACK, now_KD)
        if wanted:
            made[choice] = now_KD.reshape(weight.shape).contiguous().cpu()
    return made


def _amount(choice: Choice) -> str | None:
    """Return the field that says how much of a scheme's units stays, if it has one."""
    return next((field.name for field in fields(choice) if field.name in ("keep", "kernels")), None)


def _families(choices: Sequence[Choice]) -> dict[str, list[Choice]]:
    """Group choices that differ only in how much they keep."""
    families: dict[str, list[Choice]] = {}
    for choice in choices:
        amount = _amount(choice)
        scheme = choice.text if amount is None else replace(choice, **{amount: 1.0}).text
        families.setdefault(scheme, []).append(choice)
    return families


def _descent(family: Sequence[Choice]) -> list[tuple[Choice, bool]]:
    """Return a family from dense to sparse with steps of at most ``STEP``, and whether each was asked for."""
    amount = _amount(family[0])
    if amount is None:
        return [(choice, True) for choice in family]
    steps: list[tuple[Choice, bool]] = []
    now = 1.0
    for choice in sorted(family, key=lambda choice: -float(getattr(choice, amount))):
        target = float(getattr(choice, amount))
        while now * STEP > target * 1.05:
            now *= STEP
            steps.append((replace(choice, **{amount: now}), False))
        steps.append((choice, True))
        now = target
    return steps


def measure_moments(
    model: nn.Module, layers: Sequence[LayerSpec], images: Tensor, advance: Callable[[int], None] = lambda n: None
) -> dict[str, Moments]:
    """Return the input moments of each layer from at most ``SAMPLES`` random positions of the images.

    They lie on the model's device; the positions are drawn on the CPU, the same ones wherever it runs. ``advance`` is
    told how many more images have passed.
    """
    device = next(model.parameters()).device
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    # One each: which positions are drawn must not depend on which other layers are measured.
    generators = {layer.name: torch.Generator().manual_seed(0) for layer in layers}
    per_image = max(1, SAMPLES // len(images))

    def before(layer: LayerSpec, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = _input_rows(layer, _bordered(module, inputs[0]), per_image, generators[layer.name])
        if layer.name not in sums:
            size = rows.shape[1]
            sums[layer.name] = (rows.new_zeros(size), rows.new_zeros(size, size), 0)
        mean, second, count = sums[layer.name]
        # In place: of 4,608 inputs the moments alone are 85 MB.
        sums[layer.name] = (mean.add_(rows.sum(0)), second.addmm_(rows.T, rows), count + len(rows))

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(lambda m, i, s=layer: before(s, m, i))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            for part in torch.split(images, _images_a_batch(images)):
                model(part.to(device))
                advance(len(part))
    finally:
        for handle in handles:
            handle.remove()
    return {name: Moments(mean.div_(count), second.div_(count)) for name, (mean, second, count) in sums.items()}


def _images_a_batch(images: Tensor) -> int:
    """Return how many images pass the network together: 100 small ones, fewer of those whose maps are large."""
    return int(min(100, max(1, _BATCH_PIXELS // images[0, 0].numel())))


def _bordered(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's input with the border that its convolution puts around it."""
    if not isinstance(module, nn.Conv2d):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)


def _input_rows(layer: LayerSpec, x: Tensor, per_image: int, generator: torch.Generator) -> Tensor:
    """Return sampled input rows ``(samples, C·R·S)`` of one batch with its border, in the weight's order."""
    if layer.op == "linear":
        return x.reshape(-1, x.shape[-1])
    (height, width), (rows, columns) = layer.output_hw, layer.window
    padded = x.permute(0, 2, 3, 1)  # N H W C
    count = min(per_image, height * width)
    chosen = torch.rand(len(x), height * width, generator=generator).argsort(1)[:, :count].to(x.device)
    top, left = (chosen // width) * layer.stride[0], (chosen % width) * layer.stride[1]
    r = torch.arange(rows, device=x.device) * layer.dilation[0]
    s = torch.arange(columns, device=x.device) * layer.dilation[1]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    patches = padded[image, top[:, :, None, None] + r[:, None], left[:, :, None, None] + s]  # N P R S C
    return patches.permute(0, 1, 4, 2, 3).reshape(len(x) * count, -1)
