"""Choices: one text form each, and no layer gets one it cannot take."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.choices import (
    CHOICE_KINDS,
    CK,
    NM,
    Block,
    Channels,
    Choice,
    Combined,
    Dense,
    Fine,
    Pattern,
    Tile,
    Window,
    parse_choice,
)
from autoprune.core.errors import AutopruneError, ChoiceError, UnknownName
from autoprune.core.layers import LayerSpec

_FRACTIONS = st.floats(min_value=1e-6, max_value=1.0)
_CHOICES: st.SearchStrategy[Choice] = st.one_of(
    st.just(Dense()),
    st.builds(Block, keep=_FRACTIONS, filters=st.sampled_from([16, 32])),
    st.builds(
        Pattern,
        count=st.sampled_from([4, 8, 12]),
        entries=st.integers(1, 9),
        kernels=_FRACTIONS,
        share=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    ),
    st.builds(Fine, keep=_FRACTIONS),
    st.builds(CK, keep=_FRACTIONS),
    st.builds(Window, entries=st.integers(1, 49)),
    st.builds(Combined, keep=_FRACTIONS, fraction=_FRACTIONS),
    st.integers(2, 32).flatmap(lambda m: st.builds(NM, n=st.integers(1, m - 1), m=st.just(m))),
    st.builds(Channels, keep=_FRACTIONS),
    st.builds(Tile, keep=_FRACTIONS, size=st.integers(2, 4)),
)
_CONV = LayerSpec("conv", "conv", (32, 16, 3, 3), padding=(1, 1), input_hw=(14, 14), output_hw=(14, 14))
_ONE_BY_ONE = LayerSpec("down", "conv", (32, 16, 1, 1), input_hw=(14, 14), output_hw=(14, 14))
_GROUPED = LayerSpec("dw", "conv", (32, 1, 3, 3), groups=32, input_hw=(14, 14), output_hw=(14, 14))
_LINEAR = LayerSpec("fc", "linear", (10, 64))


@given(_CHOICES)
def test_text_reads_back_as_the_same_choice(choice: Choice) -> None:
    assert parse_choice(choice.text) == choice
    assert str(choice) == choice.text


@given(_CHOICES)
def test_density_of_a_fitting_choice_is_a_kept_fraction(choice: Choice) -> None:
    for layer in (_CONV, _ONE_BY_ONE, _GROUPED, _LINEAR):
        if choice.fits(layer):
            assert 0.0 < choice.density(layer) <= 1.0


def test_every_kind_is_covered_by_the_property_tests() -> None:
    covered = {Dense, Block, Pattern, Fine, Tile, CK, Window, Combined, NM, Channels}
    assert set(CHOICE_KINDS.values()) == covered


@pytest.mark.parametrize(
    ("choice", "taken_by"),
    [
        (Dense(), {"conv", "down", "dw", "fc"}),
        (Block(keep=0.5), {"conv", "down"}),
        (Block(keep=0.5, filters=32), {"conv", "down"}),
        (Pattern(count=8), {"conv"}),
        (Pattern(count=8, share=(64, 1)), set()),
        (Fine(keep=0.5), {"conv", "down", "fc"}),
        (CK(keep=0.5), {"conv"}),
        (Window(entries=2), {"conv"}),
        (Window(entries=9), set()),
        (Combined(keep=0.2), {"conv"}),
        (NM(n=2, m=4), {"conv", "down", "fc"}),
        (NM(n=2, m=32), {"fc"}),
        (Channels(keep=0.5), {"conv", "down", "fc"}),
        (Tile(keep=0.5, size=4), {"fc"}),
    ],
)
def test_layers_that_can_take_a_choice(choice: Choice, taken_by: set[str]) -> None:
    assert {layer.name for layer in (_CONV, _ONE_BY_ONE, _GROUPED, _LINEAR) if choice.fits(layer)} == taken_by


@pytest.mark.parametrize(
    ("choice", "density"),
    [(Pattern(count=8), 4 / 9), (Pattern(count=4, entries=3, kernels=0.5), 1 / 6), (Window(entries=2), 2 / 9)],
)
def test_nominal_density(choice: Choice, density: float) -> None:
    assert choice.density(_CONV) == pytest.approx(density)


def test_filters_shared_by_sixteen_run_on_the_block_kernel() -> None:
    assert Pattern(count=8, share=(16, 1)).kernel == "block"
    assert Pattern(count=8).kernel == "csr"


@pytest.mark.parametrize(
    ("text", "error", "part"),
    [
        ("blok(keep=0.5)", UnknownName, "Did you mean 'block'?"),
        ("block(kep=0.5)", UnknownName, "Did you mean 'keep'?"),
        ("block", ChoiceError, "field missing: keep"),
        ("block(0.5)", ChoiceError, "must be field=value"),
        ("block(keep=half)", ChoiceError, "must be a number"),
        ("block(keep=0)", ChoiceError, "above 0 and at most 1"),
        ("block(keep=1.5)", ChoiceError, "above 0 and at most 1"),
        ("block(keep=nan)", ChoiceError, "above 0 and at most 1"),
        ("block(keep=0.5,keep=0.25)", ChoiceError, "given twice"),
        ("block(keep=0.5,filters=8)", ChoiceError, "allowed are 16 and 32"),
        ("pattern(count=7)", ChoiceError, "allowed are 4, 8 and 12"),
        ("pattern(count=8,entries=10)", ChoiceError, "allowed are 1 to 9"),
        ("pattern(count=8,share=16)", ChoiceError, "FILTERSxCHANNELS"),
        ("pattern(count=8,share=0x1)", ChoiceError, "at least 1"),
        ("window(entries=0)", ChoiceError, "allowed are 1 to 49"),
        ("window(entries=2.5)", ChoiceError, "must be a whole number"),
        ("block(keep=0.5", ChoiceError, "kind(field=value"),
        ("", ChoiceError, "kind(field=value"),
    ],
)
def test_wrong_choice_names_the_next_step(text: str, error: type[AutopruneError], part: str) -> None:
    with pytest.raises(error) as caught:
        parse_choice(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_a_choice_or_an_error_of_one_line(text: str) -> None:
    with contextlib.suppress(AutopruneError):
        assert parse_choice(text).text
