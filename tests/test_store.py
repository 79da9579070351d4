"""What is missing is the declared subset minus the files; names never lead out of the folder."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.records import Declared, from_table, to_table
from robustbench_diffaug.store import Cell, Store, of_nothing, with_skipped


def cell(name: str = "m", checkpoint: str = "c", bench: str = "b", size: int = 40) -> Cell:
    return Cell(bench, Bayes(id=checkpoint, classes=4), Shift(), Mixture(name=name, size=size), 0)


def table(start: int, stop: int) -> pa.Table:
    ids = tuple(f"{row:05d}" for row in range(start, stop))
    count = stop - start
    batch = Batch("m", ids, torch.full((count, 1, 2, 2), 0.5), torch.zeros(count).long(), 0, Limits())
    return to_table(batch, Declared("m", "m", "clean", 0, 40, 40), {"x": torch.arange(start, stop)})


@given(st.sets(st.integers(0, 39)), st.integers(1, 50))
def test_missing_is_subtraction(have: set[int], size: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        path = store.root / cell().folder
        path.mkdir(parents=True)
        for row in have:
            (path / f"{row:07d}-{row:07d}.parquet").touch()
        ranges = list(store.missing(cell(), size))
    rows = [row for part in ranges for row in part]
    assert rows == sorted(set(range(40)) - have)
    assert all(0 < len(part) <= size for part in ranges)
    assert all(part.start // size == (part.stop - 1) // size for part in ranges)


def test_written_rows_come_back_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for start, stop in ((20, 40), (0, 5), (5, 20)):
        store.write(cell(), range(start, stop), table(start, stop), {"seconds": 1.0})
    assert list(store.missing(cell(), 8)) == []
    records = store.read([cell()])
    assert records["x"].tolist() == list(range(40))
    assert sum(int(str(part["samples"])) for part in store.costs(cell())) == 40
    with pytest.raises(ValueError, match="read-only"):
        records["x"][0] = 1


def test_a_sample_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(cell(), range(10), table(0, 10), {})
    store.write(cell(), range(5, 15), table(5, 15), {})
    with pytest.raises(ValueError, match="sample 00005 of m is recorded twice"):
        store.read([cell()])


@given(*[st.text(min_size=1, max_size=60)] * 3)
def test_names_never_lead_out_of_the_folder(name: str, checkpoint: str, bench: str) -> None:
    folder = Cell(bench, Bayes(id=checkpoint, classes=4), Shift(), Mixture(name=name), 0).folder
    assert len(folder.parts) == 5
    assert folder.parts[0] == "records"
    assert not any(part.startswith(".") or len(part.encode()) > 255 for part in folder.parts)
    other = Cell(bench, Bayes(id=checkpoint + "x", classes=4), Shift(), Mixture(name=name), 0).folder
    assert other != folder


def test_the_key_covers_what_records_depend_on() -> None:
    base = cell().key
    assert cell(checkpoint="other").key == base  # the same network under another name
    assert cell(name="other").key != base
    assert Cell("b", Bayes(id="c", classes=4, tilt=1.0), Shift(), Mixture(name="m", size=40), 0).key != base
    assert Cell("b", Bayes(id="c", classes=4), Shift(bins=10), Mixture(name="m", size=40), 0).key == base
    assert Cell("b", Bayes(id="c", classes=4), Shift(), Mixture(name="m", size=40), 1).key != base


def test_columns_of_any_shape_round_trip() -> None:
    batch = Batch("m", ("a", "b", "c"), torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, -1, 2]), 0, Limits())
    columns = {
        "flag": torch.tensor([True, False, True]),
        "double": torch.tensor([0.1, float("inf"), -0.0], dtype=torch.float64),
        "votes": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "cube": torch.arange(18, dtype=torch.float32).reshape(3, 2, 3),
    }
    found = from_table(to_table(batch, Declared("m", "o", "g", 2, 3, 9), columns))
    for name, column in columns.items():
        assert np.array_equal(found[name], column.numpy())
        assert found[name].dtype == column.numpy().dtype
    assert found["label"].tolist() == [0, -1, 2]
    assert set(found["origin"].tolist()) == {"o"}
    assert len(set(found["image"].tolist())) == 1
    with pytest.raises(ValueError, match="2 rows for 3 samples"):
        to_table(batch, Declared("m", "o", "g", 2, 3, 9), {"x": torch.zeros(2)})


def test_what_was_left_out_stands_in_the_file(tmp_path: Path) -> None:
    store, left = Store(tmp_path), [("00003", "3.png is cut off"), ("00004", 'é \N{SNOWMAN} "quoted"')]
    store.write(cell(), range(5), with_skipped(table(0, 3), left), {})
    store.write(cell(), range(5, 8), table(5, 8), {})
    store.write(cell(), range(8, 10), with_skipped(of_nothing(), [("8", "x"), ("9", "y")]), {})
    assert store.skipped(cell()) == [*left, ("8", "x"), ("9", "y")]
    assert store.read([cell()])["sample"].tolist() == ["00000", "00001", "00002", "00005", "00006", "00007"]
    assert list(store.missing(cell(), 10)) == [range(10, 20), range(20, 30), range(30, 40)]
    store.write(cell(), range(10, 14), with_skipped(table(10, 12), [("00012", "x")]), {})
    with pytest.raises(ValueError, match=r"damaged \(it holds 2 samples\)"):
        store.read([cell()])


def test_a_note_that_makes_no_sense_is_a_damaged_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for note in (b"{", b"[1]", b"3", b"[[1, 2, 3]]"):
        store.write(cell(), range(3), table(0, 3).replace_schema_metadata({b"skipped": note}), {})
        for look in (store.read, lambda cells: store.skipped(cells[0])):
            with pytest.raises(ValueError, match=r"0000000-0000002.parquet is damaged \(its note of skipped images"):
                look([cell()])
    (path,) = tmp_path.rglob("*.parquet")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        store.skipped(cell())
