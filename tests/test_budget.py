"""Budgets: what is written is what is meant, and anything else is refused with the next step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.budget import Budget, parse_budget
from autoprune.core.errors import BudgetError

_NUMBERS = st.floats(min_value=1e-9, max_value=1e12)
_ABSOLUTE = {
    "latency": ("us", "ms", "s"),
    "macs": ("K", "M", "G"),
    "params": ("K", "M", "G"),
    "size": ("B", "KB", "MB", "GB"),
}


@st.composite
def _limits(draw: st.DrawFn, kind: str) -> str:
    if draw(st.booleans()):
        return f"{kind}={draw(st.floats(min_value=1e-6, max_value=100.0))!r}%"
    return f"{kind}={draw(_NUMBERS)!r}{draw(st.sampled_from(_ABSOLUTE[kind]))}"


@st.composite
def _texts(draw: st.DrawFn) -> str:
    kinds = draw(st.lists(st.sampled_from(sorted(_ABSOLUTE)), min_size=1, unique=True))
    return ",".join(draw(_limits(kind)) for kind in kinds)


@given(_texts())
def test_canonical_text_reads_back_as_the_same_budget(text: str) -> None:
    budget = parse_budget(text)
    assert parse_budget(budget.text) == budget


@given(st.floats(min_value=1.0, max_value=1e6))
def test_speedup_is_the_inverse_of_a_latency_fraction(factor: float) -> None:
    limit = parse_budget(f"speedup={factor!r}x").limit("latency")
    assert limit is not None
    assert limit.absolute(1000.0) * factor == pytest.approx(1000.0)
    assert parse_budget(limit.text).limit("latency") == limit


@pytest.mark.parametrize(
    ("text", "kind", "dense", "bound"),
    [
        ("latency=50%", "latency", 800.0, 400.0),
        ("latency=8ms", "latency", 1.0, 8000.0),
        ("latency=8 us", "latency", 1.0, 8.0),
        (" latency = 2s ", "latency", 1.0, 2e6),
        ("speedup=2x", "latency", 800.0, 400.0),
        ("macs=20M", "macs", 1.0, 2e7),
        ("params=25%", "params", 1000.0, 250.0),
        ("size=1.5MB", "size", 1.0, 1.5e6),
        ("latency=100%", "latency", 800.0, 800.0),
    ],
)
def test_bound_in_the_kinds_own_unit(text: str, kind: str, dense: float, bound: float) -> None:
    limit = next(limit for limit in parse_budget(text).limits if limit.kind == kind)
    assert limit.absolute(dense) == pytest.approx(bound)


def test_several_limits_are_kept_in_order() -> None:
    budget = parse_budget("latency=50%, params=25%,")
    assert [limit.kind for limit in budget.limits] == ["latency", "params"]
    assert budget.text == "latency=50%,params=25%"
    assert Budget(()).limit("latency") is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("latency=50", "add a unit: 'latency=50%' or 'latency=50us'"),
        ("latency=5000", "add a unit: 'latency=5000us'"),
        ("params=25", "add a unit: 'params=25%'"),
        ("macs=1000000", "add a unit: 'macs=1e+06K'"),
        ("size=3", "add a unit: 'size=3%' or 'size=3B'"),
        ("speedup=2", "write a speed-up with an x: 'speedup=2x'"),
        ("latency=-5ms", "the value must be above 0"),
        ("latency=-5", "the value must be above 0"),
        ("latency=-5%", "a percentage must be above 0 %"),
        ("latency=0%", "a percentage must be above 0 %"),
        ("latency=0ms", "the value must be above 0"),
        ("latency=101%", "at most 100 %"),
        ("speedup=0.5x", "at least 1x"),
        ("speedup=-2x", "at least 1x"),
        ("latncy=50%", "Did you mean 'latency'?"),
        ("50%", "no budget kind '50%'"),
        ("latency=8MS", "unit 'MS' is unknown"),
        ("latency=1e999ms", "must lie between"),
        ("latency=1e-300s", "must lie between"),
        ("latency=nan%", "not a number"),
        ("latency=fast", "not a number"),
        ("latency", "a value is missing"),
        ("latency=", "a value is missing"),
        ("", "empty"),
        (" , ", "empty"),
        ("latency=50%,latency=8ms", "given twice"),
        ("latency=50%,speedup=2x", "given twice"),
    ],
)
def test_wrong_budget_names_the_next_step(text: str, part: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(text)
    message = str(caught.value)
    assert part in message
    assert message.startswith("--budget")
    assert "\n" not in message
    assert caught.value.exit_code == 2


@given(st.text(max_size=40))
def test_any_text_is_a_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = parse_budget(text)
    except BudgetError:
        return
    assert all(limit.value > 0.0 for limit in budget.limits)
