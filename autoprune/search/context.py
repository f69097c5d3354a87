"""What every stage of one search works with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from autoprune.core.budget import Budget
from autoprune.core.goal import Goal
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Splits
from autoprune.core.progress import Progress
from autoprune.core.rundir import Cache, RunDir
from autoprune.search.config import SearchConfig
from autoprune.search_spaces.space import SearchSpace
from autoprune.sparsity.channels import ChannelGroups
from autoprune.tasks.task import Task


@dataclass(slots=True)
class Clock:
    """Seconds spent in each stage of this session."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside under ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(slots=True)
class Context:
    """One search: what was asked, where it is kept, and whom to tell."""

    config: SearchConfig
    goal: Goal
    run: RunDir
    cache: Cache
    task: Task
    layers: tuple[LayerSpec, ...]
    space: SearchSpace
    progress: Progress
    clock: Clock
    groups: ChannelGroups = field(default_factory=ChannelGroups)
    splits: Splits | None = None

    @property
    def budget(self) -> Budget:
        """Limits that the deployed network must keep; none where only a constraint or objectives are given."""
        return self.goal.budget
