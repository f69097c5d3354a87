"""What a training under a policy saved: weights and MACs counted, time measured, and what its layers ran on."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from autoprune.core.choices import CK, Block, Channels, Choice, Fine, Tile
from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.kernels.convert import is_masked
from autoprune.trainers.dead_channels import eliminate_dead_channels
from autoprune.trainers.execution import LayerRun
from autoprune.trainers.loop import Epoch, Trained
from autoprune.trainers.result import Savings, TrainedOn


def final_time_saved(pruned: list[Epoch], dense: list[Epoch]) -> float | None:
    """Return the share of time that an epoch under final masks saves; the first one, which also measures, left out."""
    final = [entry for entry in pruned if entry.sparsity == pruned[-1].sparsity][1:]
    if not final:
        return None
    beside = float(np.median([dense[entry.epoch].seconds for entry in final]))
    return 1.0 - float(np.median([entry.seconds for entry in final])) / beside if beside > 0 else None


def count_savings(trained: Trained, model: nn.Module) -> Savings | None:
    """Return what a training removed and saved, on the weights as they are; None of a dense one."""
    report = trained.report
    if report is None:
        return None
    counts = report.sparsity
    return Savings(
        nominal_sparsity={layer.name: layer.nominal for layer in counts.layers},
        sparsity={layer.name: layer.sparsity for layer in counts.layers},
        prunable_sparsity=counts.prunable_sparsity,
        global_sparsity=counts.global_sparsity,
        conv_compression=counts.conv_compression,
        all_compression=counts.all_compression,
        storage_ratio=counts.storage_ratio,
        inference_macs_saved=counts.inference_macs_saved,
        training_macs_saved=report.training_macs_saved,
        scoring_passes=report.scoring_passes,
        dead_channels=_dead_channels(model),
        phases=[(phase.name, phase.first_epoch, phase.steps) for phase in report.phases],
        trained_on=[trained_on(run) for run in report.layers_run],
    )


def trained_on(run: LayerRun) -> TrainedOn:
    """Return a session's record of a layer in the form that is stored."""
    return TrainedOn(
        layer=run.layer, kernels=dict(run.kernels), why=run.why, dense_us=run.dense_us, chosen_us=run.chosen_us
    )


def _dead_channels(model: nn.Module) -> dict[str, int] | None:
    """Return layer → channels that can leave losslessly; None where the model cannot be traced for them."""
    try:
        _, eliminated = eliminate_dead_channels(copy.deepcopy(model).cpu())
    except ModelError:
        return None
    counts: dict[str, int] = {}
    for found in eliminated:
        counts[found.layer] = counts.get(found.layer, 0) + len(found.channels)
    return counts


def as_trained(model: nn.Module, policy: Policy) -> dict[str, Choice]:
    """Return a policy's choices with the density reached in each layer, where a method learnt the split over layers.

    Args:
        model: Trained under the policy.
        policy: Its choices of equal units are adjusted where a layer kept more than its own.
    """
    found = dict(policy.choices)
    for name, choice in found.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        weight = layer.weight.detach()
        shape = tuple(int(size) for size in weight.shape)
        spec = LayerSpec(name, "conv" if len(shape) == 4 else "linear", shape)
        if isinstance(choice, Fine | Block | Tile | CK) and not is_masked(weight, spec, choice):
            found[name] = replace(choice, keep=int(torch.count_nonzero(weight)) / weight.numel())
        elif isinstance(choice, Channels):
            # Input weights of channels that other layers lost are zero too: only whole filters count.
            alive = int((weight.flatten(1) != 0).any(1).sum())
            found[name] = replace(choice, keep=alive / len(weight)) if alive > choice.width(len(weight)) else choice
    return found
