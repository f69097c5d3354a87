"""Weights of the layers that read channels under a policy: removed inputs zero, the others making up for them.

Which units stay is decided once per group, by a ranking: a narrower choice keeps a part of what a wider one keeps. A
reader's weights depend on the widths of all groups that it reads, so they are made when they are first asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.core.choices import Choice
from autoprune.envs.store import Moments
from autoprune.sparsity.channels import ChannelGroups, Criterion, best_units, channel_scores
from autoprune.sparsity.compensate import damped

# Beyond this many inputs (a linear layer behind large maps) the system to solve takes more than the gain is worth.
_MOST_INPUTS = 8192


class ChannelWeights:
    """Compensated weights of readers, by the units that stay.

    Args:
        model: Dense network.
        groups: Of the model.
        leaders: Groups that are searched.
        moments: Inputs of every reader of them.
        criterion: Ranks a group's units.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        leaders: Sequence[str],
        moments: Mapping[str, Moments],
        criterion: Criterion = "input",
    ) -> None:
        self.groups = groups
        self._moments = moments
        self._scores = {leader: channel_scores(model, groups, leader, criterion) for leader in leaders}
        names = dict.fromkeys(name for leader in leaders for name in groups.readers(leader))
        self.readers = tuple(names)
        self._dense = {name: _weight(model, name).detach().clone() for name in names}
        self._made: dict[tuple[str, tuple[tuple[str, int], ...]], Tensor] = {}
        self._lock = threading.Lock()

    def kept(self, choices: Mapping[str, Choice]) -> dict[str, Tensor]:
        """Return leader → the units that stay, (U,) boolean, of the groups that a policy prunes.

        Raises:
            PolicyError: The policy does not fit the groups.
        """
        counts = self.groups.coupling.kept(choices)
        return {leader: best_units(self._scores[leader], count) for leader, count in counts.items()}

    def weights(self, choices: Mapping[str, Choice]) -> dict[str, Tensor]:
        """Return reader → compensated weight, float32 in its own shape, of every reader of a pruned group."""
        kept = self.kept(choices)
        found = {}
        for name in self.readers:
            sides = self.groups.coupling.layers[name]
            own = tuple((s.leader, int(kept[s.leader].sum())) for s in sides.inputs.shares if s.leader in kept)
            if not own:
                continue
            with self._lock:
                if (name, own) not in self._made:
                    self._made[name, own] = self._make(name, kept)
                found[name] = self._made[name, own]
        return found

    def _make(self, name: str, kept: Mapping[str, Tensor]) -> Tensor:
        stay_C = self.groups.staying((name, "in"), kept)
        assert stay_C is not None
        weight = self._dense[name]
        stay_C = stay_C.to(weight.device)
        positions = weight[0, 0].numel()
        stay_D = stay_C.repeat_interleave(positions)
        flat_KD = weight.flatten(1)
        made_KD = flat_KD * stay_D
        if flat_KD.shape[1] <= _MOST_INPUTS and name in self._moments:
            moments_DD = damped(self._moments[name].second_DD.to(weight.device))
            # Least squares: the outputs of all inputs, from those that stay.
            index = stay_D.nonzero().flatten()
            target_KS = flat_KD.to(moments_DD.dtype) @ moments_DD[:, index]
            solved_SK = torch.linalg.solve(moments_DD[index][:, index], target_KS.T)
            made_KD = torch.zeros_like(flat_KD).index_copy_(1, index, solved_SK.T.to(flat_KD.dtype))
        return made_KD.reshape(weight.shape).contiguous().cpu()


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
