"""What a latency table promises: exact lookups, one context, nothing guessed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.choices import Block, Choice, Dense, Fine
from autoprune.core.errors import MissingLatency, TableMismatch
from autoprune.core.layers import LayerSpec
from autoprune.lut.table import Calibration, Context, LatencyTable, Point, Row, current_context

CONTEXT = Context(device="cpu", cpu="a cpu", isa="avx2", threads=1, batch=1, versions=(("torch", "2"), ("numba", "1")))
LAYER = LayerSpec("a", "conv", (16, 16, 3, 3), padding=(1, 1), input_hw=(8, 8), output_hw=(8, 8), calls=2)
TWIN = LayerSpec("b", "conv", (16, 16, 3, 3), padding=(1, 1), input_hw=(8, 8), output_hw=(8, 8))
OTHER = LayerSpec("c", "linear", (10, 16))


def _row(us: float) -> Row:
    return Row(p10=us - 0.5, p50=us, p90=us + 0.5, weight_bytes=64, kernel="block")


def _table() -> LatencyTable:
    rows = {
        (LAYER.signature, "dense"): _row(10.0),
        (LAYER.signature, Block(keep=0.5).text): _row(6.0),
        (LAYER.signature, Fine(keep=0.9).text): _row(14.0),
        (OTHER.signature, "dense"): _row(1.0),
    }
    return LatencyTable(CONTEXT, rows)


def test_layers_of_one_shape_share_their_rows() -> None:
    table = _table()
    assert table.layer_us(LAYER, Block(keep=0.5)) == table.layer_us(TWIN, Block(keep=0.5)) == 6.0
    assert table.row(OTHER, Dense()).weight_bytes == 64


def test_absent_row_is_an_error_that_names_layer_and_next_step() -> None:
    with pytest.raises(MissingLatency, match=r"block\(keep=0.25,filters=16\) for layer 'b'.*autoprune lut build"):
        _table().layer_us(TWIN, Block(keep=0.25))


def test_require_counts_what_is_absent() -> None:
    wanted = {LAYER: (Dense(), Block(keep=0.5)), OTHER: (Dense(), Fine(keep=0.5), Fine(keep=0.25))}
    with pytest.raises(MissingLatency, match=r"2 of 5 rows absent \(first: c, fine\(keep=0.5\)\)"):
        _table().require(wanted)
    _table().require({LAYER: (Dense(), Block(keep=0.5)), OTHER: (Dense(),)})


def test_network_is_the_sum_of_its_calls_then_the_fitted_line() -> None:
    choices: dict[str, Choice] = {"a": Block(keep=0.5)}
    layers = (LAYER, TWIN, OTHER)
    assert _table().network_us(layers, choices) == pytest.approx(2 * 6.0 + 10.0 + 1.0)
    fitted = _table().with_calibration(Calibration(slope=1.1, intercept_us=3.0, mape=0.0, kendall_tau=1.0, points=()))
    assert fitted.network_us(layers, choices) == pytest.approx(1.1 * 23.0 + 3.0)


def test_choice_slower_than_dense_counts_as_dense_because_it_is_deployed_so() -> None:
    assert _table().layer_us(TWIN, Fine(keep=0.9)) == 14.0
    assert _table().rows_us((TWIN,), {"b": Fine(keep=0.9)}) == 10.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch", 32, "with batch 1, wanted 32"),
        ("threads", 2, "with threads 1, wanted 2"),
        ("cpu", "another cpu", "with cpu 'a cpu', wanted 'another cpu'"),
        ("dtype", "float16", "with dtype 'float32', wanted 'float16'"),
        ("cache", "cold", "with cache 'warm', wanted 'cold'"),
        ("versions", (("torch", "3"), ("numba", "1")), "with torch '2', wanted '3'"),
        ("versions", (("torch", "2"),), "with numba '1', wanted 'none'"),
    ],
)
def test_table_of_another_context_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    path = tmp_path / "table.json"
    _table().save(path)
    other = CONTEXT.model_copy(update={field: value})
    with pytest.raises(TableMismatch, match=message) as caught:
        LatencyTable.load(path, other)
    assert "autoprune lut build" in str(caught.value)
    assert LatencyTable.load(path, CONTEXT) == _table()


def test_context_here_is_stable_and_complete() -> None:
    here = current_context(batch=4, threads=2)
    assert here == current_context(4, 2)
    assert (here.batch, here.threads, here.device, here.dtype) == (4, 2, "cpu", "float32")
    assert here.cpu
    assert {"torch", "numba", "python"} <= set(dict(here.versions))
    _table().check(CONTEXT)
    with pytest.raises(TableMismatch):
        _table().check(here)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from([LAYER.signature, OTHER.signature]), st.floats(0.01, 1.0)),
        st.floats(0.1, 1e6),
        max_size=8,
    )
)
def test_tables_survive_a_file_exactly(rows: dict[tuple[str, float], float]) -> None:
    table = LatencyTable(CONTEXT, {(s, Fine(keep=k).text): _row(us) for (s, k), us in rows.items()})
    fitted = table.with_calibration(
        Calibration(slope=1.0, intercept_us=0.1, mape=0.01, kendall_tau=0.9, points=(Point(rows_us=1, measured_us=2),))
    )
    backwards = LatencyTable(CONTEXT, dict(reversed(table.rows.items())))
    assert backwards.hash == table.hash
    assert fitted.hash != table.hash
    for one in (table, fitted):
        with tempfile.TemporaryDirectory() as folder:
            one.save(Path(folder) / "t.json")
            again = LatencyTable.load(Path(folder) / "t.json")
        assert again == one
        assert again.hash == one.hash


def test_new_rows_end_a_calibration() -> None:
    fitted = _table().with_calibration(Calibration(slope=1, intercept_us=0, mape=0, kendall_tau=1, points=()))
    more = fitted.with_rows({(OTHER.signature, Fine(keep=0.5).text): _row(0.5)})
    assert more.calibration is None
    assert len(more.rows) == 5
    assert len(fitted.rows) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("context"), "field 'context'"),
        (lambda data: data.update(extra=1), "field 'extra'"),
        (lambda data: data["rows"][0]["row"].update(p50="fast"), r"field 'rows.0.row.p50'"),
        (lambda data: data["rows"][0].update(choice="blok(keep=1)"), "Did you mean 'block'"),
        (lambda data: data.update(schema_version=3), "field 'schema_version'"),
    ],
)
def test_damaged_table_is_refused_with_the_field(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "table.json"
    _table().save(path)
    data = json.loads(path.read_text())
    damage(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(TableMismatch, match=message):
        LatencyTable.load(path)


def test_truncated_or_absent_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(TableMismatch, match="cannot be read"):
        LatencyTable.load(path)
    _table().save(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(TableMismatch, match=r"table\.json"):
        LatencyTable.load(path)
