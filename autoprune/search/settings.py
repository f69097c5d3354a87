"""Settings of the agents, as given by ``--set NAME=VALUE``, a mapping or the agent's own dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from autoprune.core import settings as settings_of
from autoprune.core.errors import AutopruneError

S = TypeVar("S")


class AgentError(AutopruneError):
    """A setting of an agent that it cannot take."""


@dataclass(frozen=True, slots=True)
class NoSettings:
    """Of an agent that has nothing to set."""


def read_settings(cls: type[S], agent: str, settings: object | None) -> S:
    """Return the settings of an agent from its dataclass, a mapping or None; see ``core.settings``."""
    return settings_of.read_settings(cls, owner(agent), settings)


def check_setting(agent: str, name: str, value: object, allowed: bool, want: str) -> None:
    """Refuse a setting's value.

    Raises:
        AgentError: ``allowed`` is false.
    """
    settings_of.check_setting(owner(agent), name, value, allowed, want)


def owner(agent: str) -> settings_of.Owner:
    """Return whose settings they are, for error messages."""
    return settings_of.Owner("agent", agent, AgentError)
