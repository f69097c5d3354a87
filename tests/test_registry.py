"""Registries: a name gives its thing, a misspelt one the nearest name."""

from __future__ import annotations

import pytest

from autoprune.core.errors import UnknownName
from autoprune.core.registry import Registry, unknown_name


@pytest.fixture
def agents() -> Registry[int]:
    registry: Registry[int] = Registry("agent")
    registry.register("ddpg")(1)
    registry.register("knapsack")(2)
    return registry


def test_name_gives_its_thing(agents: Registry[int]) -> None:
    assert agents.get("ddpg") == 1
    assert list(agents) == ["ddpg", "knapsack"]
    assert "ddpg" in agents
    assert "tpe" not in agents


def test_misspelt_name_proposes_the_nearest(agents: Registry[int]) -> None:
    with pytest.raises(UnknownName, match=r"no agent 'ddgp'\. Did you mean 'ddpg'\? Known: ddpg, knapsack\."):
        agents.get("ddgp")


def test_name_like_no_other_gets_no_proposal() -> None:
    assert str(unknown_name("agent", "zzz", ["ddpg"])) == "no agent 'zzz'. Known: ddpg."


def test_a_name_is_registered_once(agents: Registry[int]) -> None:
    with pytest.raises(ValueError, match="agent 'ddpg' is registered twice"):
        agents.register("ddpg")(3)
    assert agents.get("ddpg") == 1
