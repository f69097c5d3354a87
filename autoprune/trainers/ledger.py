"""What a session counts: steps by phase, and how many weights every layer kept in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoprune.trainers.method import PrunedLayer, State
from autoprune.trainers.session_report import Phase


class Ledger:
    """Counts of one training.

    Args:
        layers: Their sizes at the start count: a method may take dead channels out on the way.
    """

    def __init__(self, layers: Sequence[PrunedLayer]) -> None:
        self.sizes = {layer.name: layer.parameter.numel() for layer in layers}
        self.kept = dict(self.sizes)
        self.phases: list[Phase] = []
        self._kept_steps: dict[str, int] = dict.fromkeys(self.kept, 0)
        # Steps since the counts last changed: they are added layer by layer only when they do.
        self._pending = 0

    @property
    def sparsity(self) -> float:
        """Fraction of the policy's weights that are removed by now."""
        weights = sum(self.sizes.values())
        return 1.0 - sum(self.kept.values()) / weights if weights else 0.0

    def step(self, phase: str, epoch: int) -> None:
        """Count one step in a phase, with the weights that are kept now."""
        self._pending += 1
        if self.phases and self.phases[-1].name == phase:
            last = self.phases[-1]
            self.phases[-1] = Phase(phase, last.first_epoch, last.steps + 1)
        else:
            self.phases.append(Phase(phase, epoch, 1))

    def keep(self, counts: Mapping[str, int]) -> None:
        """Take layer → weights kept from now on."""
        self._settle()
        self.kept.update(counts)

    def density_steps(self) -> dict[str, float]:
        """Return layer → the sum of its density over all steps."""
        self._settle()
        return {name: self._kept_steps[name] / size for name, size in self.sizes.items()}

    def _settle(self) -> None:
        if self._pending:
            for name, kept in self.kept.items():
                self._kept_steps[name] += kept * self._pending
            self._pending = 0

    def state_dict(self) -> State:
        """Return the counts as plain values."""
        self._settle()
        return {
            "kept_steps": dict(self._kept_steps),
            "phases": [(phase.name, phase.first_epoch, phase.steps) for phase in self.phases],
        }

    def load_state_dict(self, state: State) -> None:
        """Take ``state_dict``'s answer; what is kept now follows by ``keep``."""
        self._pending = 0
        self.kept = dict(self.sizes)
        self._kept_steps = {name: int(value) for name, value in state["kept_steps"].items()}
        self.phases = [Phase(str(name), int(first), int(steps)) for name, first, steps in state["phases"]]

    def covers(self, state: State) -> bool:
        """Whether a state is of the same layers."""
        return set(state["kept_steps"]) == set(self.sizes)
