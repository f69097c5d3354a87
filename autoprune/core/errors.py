"""Errors a user can meet. Each says what, got, allowed and next step, on one line."""

from __future__ import annotations


class AutopruneError(Exception):
    """Base of every error raised on purpose; the CLI prints its one line and exits with ``exit_code``."""

    exit_code = 2


class UnknownName(AutopruneError):
    """A name that no registry, preset or data set knows."""


class BudgetError(AutopruneError):
    """A budget that cannot be read."""


class InfeasibleBudget(AutopruneError):
    """A budget that no policy of the space can meet."""

    exit_code = 3


class ChoiceError(AutopruneError):
    """A choice text that cannot be read, or that a layer cannot take."""


class SpaceError(AutopruneError):
    """A search-space file with a bad field, or a space without a layer."""


class MissingLatency(AutopruneError):
    """A (layer, choice) pair without a measured row; nothing is ever guessed."""


class TableMismatch(AutopruneError):
    """A latency table measured in another context (machine, versions, batch, threads …)."""


class PolicyError(AutopruneError):
    """A policy file that is broken, newer than this program, or made for another model."""


class RunError(AutopruneError):
    """A run folder that cannot be used."""


class DataError(AutopruneError):
    """A data set that is absent or unreadable."""


class ModelError(AutopruneError):
    """A model that cannot be built, traced or evaluated."""


class DeviceError(AutopruneError):
    """A device that this machine does not have."""


class MeasurementError(AutopruneError):
    """A measurement that could not be completed."""

    exit_code = 1
