"""Optuna's samplers as agents: TPE, NSGA-II, CMA-ES and Gaussian processes, over one set of genes (see ``genes``).

Each starts from knapsack solutions. The sampler sees what was asked, how far it exceeded the budget (as constraints)
and the logarithm of the error of what was executed. TPE and the Gaussian process take any trial, so that they learn
from the executed policy; the two evolutionary ones only know the individuals that they made.

Source: Bergstra et al. (2011), Watanabe (2023): TPE; Deb et al. (2002): NSGA-II; Hansen, Ostermeier (2001): CMA-ES;
SPDY (Frantar, Alistarh 2022): coefficients of the exact solver as search space.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autoprune.search.base import Account, Searcher
from autoprune.search.genes import Choices, Coefficients, Decoded, Genes
from autoprune.search.settings import check_setting

# Proposals in a row that are known already: the space is as good as exhausted, or the sampler has settled.
_PATIENCE = 40
# After so many known ones in a row a random start is put in: the sampler would go on proposing the same.
_STUCK = 4
_LEAST, _MOST = 1e-6, 20.0


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """What all of them have.

    Attributes:
        space: ``coefficients`` of the exact solver, or the layers' ``choices`` directly.
        warm_starts: Knapsack solutions evaluated first, at most a quarter of the evaluations.
        spread: Standard deviation of the logarithm of their random factors.
        reach: Largest absolute logarithm of a coefficient.
    """

    space: str = "coefficients"
    warm_starts: int = 16
    spread: float = 0.5
    reach: float = 1.5

    def __post_init__(self) -> None:
        spaces = ("coefficients", "choices")
        check_setting("sampler", "space", self.space, self.space in spaces, "'coefficients' or 'choices'")
        check_setting("sampler", "warm_starts", self.warm_starts, self.warm_starts >= 1, "1 or more")
        check_setting("sampler", "spread", self.spread, self.spread > 0, "above 0")
        check_setting("sampler", "reach", self.reach, self.reach > 0, "above 0")


@dataclass(frozen=True, slots=True)
class NSGA2Settings(SamplerSettings):
    """NSGA-II's.

    Attributes:
        population: Individuals of a generation; at most a fifth of the evaluations, at least 4.
    """

    population: int = 20

    def __post_init__(self) -> None:
        SamplerSettings.__post_init__(self)
        check_setting("nsga2", "population", self.population, self.population >= 4, "4 or more")


@dataclass(frozen=True, slots=True)
class GPSettings(SamplerSettings):
    """The Gaussian process's.

    Attributes:
        history: Most trials it is fitted to (the best half and the newest): a proposal's time grows with their number.
    """

    history: int = 100

    def __post_init__(self) -> None:
        SamplerSettings.__post_init__(self)
        check_setting("gp", "history", self.history, self.history >= 10, "10 or more")


class SamplerSearcher(Searcher):
    """The loop that the samplers share: ask, decode, evaluate, tell."""

    settings_class = SamplerSettings
    settings: SamplerSettings
    learns_executed: ClassVar[bool] = False
    """Whether trials that the sampler did not make itself teach it."""
    several: ClassVar[bool] = True
    """Whether it minimises several objectives at once."""
    constrained: ClassVar[bool] = True
    """Whether it has a use for constraints."""

    @abstractmethod
    def sampler(self, genes: Genes, evaluations: int, seed: int) -> BaseSampler:
        """Return the sampler of one trial."""

    def propose(self, account: Account, seed: int) -> None:
        self._run(account, seed, front=False)

    def propose_front(self, account: Account, seed: int) -> bool:
        if self.several:
            self._run(account, seed, front=True)
        return self.several

    def _run(self, account: Account, seed: int, *, front: bool) -> None:
        # Beside its own warnings Optuna logs which of its optional packages are absent.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        genes = self._genes(account, front=front)
        objectives = 1 + (len(account.problem.constraints) if front else 0)
        study = optuna.create_study(directions=["minimize"] * objectives)
        rng = np.random.default_rng(seed)
        warm_starts = max(1, min(self.settings.warm_starts, account.evaluations // 4))
        number = known = 0
        while known < _PATIENCE:
            if number < warm_starts or known % _STUCK == _STUCK - 1:
                study.enqueue_trial(genes.start(number, warm_starts, self.settings.spread, rng))
            # The storage does not keep a sampler's state: a seed per trial makes a resumed search the same one.
            own_seed = int(np.random.default_rng([seed, number]).integers(2**31))
            trial = self._ask(study, genes, account.evaluations, own_seed)
            decoded = genes.decode(trial.params)
            before = account.left
            error = account.evaluate(decoded.assignment).error
            values = [math.log(min(max(error, _LEAST), _MOST))]
            if front:
                values += [float(cost) for cost in account.problem.costs(decoded.assignment)]
            self._tell(study, trial, genes, decoded, values)
            known = known + 1 if account.left == before else 0
            number += 1

    def _genes(self, account: Account, *, front: bool) -> Genes:
        if self.settings.space == "choices":
            return Choices(account.problem, shares=front)
        return Coefficients(account.problem, self.settings.reach, shares=front)

    def _ask(self, study: optuna.Study, genes: Genes, evaluations: int, seed: int) -> optuna.Trial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.sampler = self.sampler(genes, evaluations, seed)
            return study.ask(genes.distributions)

    def _tell(
        self, study: optuna.Study, trial: optuna.Trial, genes: Genes, decoded: Decoded, values: Sequence[float]
    ) -> None:
        kinds = [constraint.kind for constraint in genes.problem.constraints]
        if self.learns_executed and decoded.executed != trial.params:
            study.tell(trial, state=TrialState.FAIL)
            within = dict.fromkeys(kinds, 0.0)
            study.add_trial(
                optuna.create_trial(
                    params=decoded.executed, distributions=genes.distributions, values=values, constraints=within
                )
            )
            return
        for kind, excess in zip(kinds if self.constrained else (), decoded.excess_D.tolist(), strict=False):
            trial.set_constraint(kind, excess if excess > 1e-9 else min(excess, 0.0))
        study.tell(trial, list(values))


class TPESearcher(SamplerSearcher):
    """Tree-structured Parzen estimator."""

    name = "tpe"
    learns_executed = True

    def sampler(self, genes: Genes, evaluations: int, seed: int) -> BaseSampler:
        return optuna.samplers.TPESampler(seed=seed)


class NSGA2Searcher(SamplerSearcher):
    """Non-dominated sorting genetic algorithm: the default for Pareto fronts."""

    name = "nsga2"
    settings_class = NSGA2Settings
    settings: NSGA2Settings

    def sampler(self, genes: Genes, evaluations: int, seed: int) -> BaseSampler:
        size = max(4, min(self.settings.population, evaluations // 5))
        return optuna.samplers.NSGAIISampler(population_size=size, seed=seed)


class CMAESSearcher(SamplerSearcher):
    """Covariance matrix adaptation, from the exact solution outwards; its state is pickled into memory only."""

    name = "cmaes"
    several = False
    constrained = False

    def sampler(self, genes: Genes, evaluations: int, seed: int) -> BaseSampler:
        # It starts in the middle of the ranges, which for coefficients is the exact solution, with a sixth of them as
        # first deviation.
        margin = self.settings.space == "choices"
        return optuna.samplers.CmaEsSampler(with_margin=margin, warn_independent_sampling=False, seed=seed)


class GPSearcher(SamplerSearcher):
    """Gaussian process with expected improvement."""

    name = "gp"
    settings_class = GPSettings
    settings: GPSettings
    learns_executed = True

    def sampler(self, genes: Genes, evaluations: int, seed: int) -> BaseSampler:
        starts = max(1, min(self.settings.warm_starts, evaluations // 4))
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=starts, warn_independent_sampling=False)

    def _ask(self, study: optuna.Study, genes: Genes, evaluations: int, seed: int) -> optuna.Trial:
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if len(finished) <= self.settings.history or waiting:
            return super()._ask(study, genes, evaluations, seed)
        short = optuna.create_study(directions=study.directions)
        short.add_trials(self._remembered(finished))
        asked = super()._ask(short, genes, evaluations, seed)
        study.enqueue_trial(asked.params)
        study.sampler = optuna.samplers.RandomSampler(seed=seed)  # it has nothing left to decide
        return study.ask(genes.distributions)

    def _remembered(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return the best half of the history and the newest trials, in the order they were made."""
        best = sorted(trials, key=lambda trial: (trial.values[0], trial.number))[: self.settings.history // 2]
        numbers = {trial.number for trial in best}
        rest = [trial for trial in trials if trial.number not in numbers]
        kept = [*best, *rest[-(self.settings.history - len(best)) :]]
        return sorted(kept, key=lambda trial: trial.number)
