"""Parquet shards and folders of `save_to_disk`, written by pyarrow byte for byte as `datasets` writes them."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robustbench_diffaug import rng
from robustbench_diffaug.data import tables
from robustbench_diffaug.data.base import BadImage, Dataset
from robustbench_diffaug.data.sources import Folder
from robustbench_diffaug.data.tables import Table
from robustbench_diffaug.testing import check_dataset

PIXELS = (rng.uniform(rng.key("tables"), range(7), (12, 10, 3)) * 256).astype(np.uint8)
LABELS = [2, 0, 1, 1, 0, 2, -1]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("image", IMAGE), ("label", pa.int64())]).with_metadata(
    {  # as datasets 5.2.0 writes it
        "huggingface": '{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], '
        '"_type": "ClassLabel"}}}}'
    }
)


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


CELLS: list[dict[str, Any]] = [{"bytes": png(pixels), "path": f"{row}.png"} for row, pixels in enumerate(PIXELS)]


def rows(start: int = 0, stop: int = 7) -> pa.Table:
    return pa.table({"image": CELLS[start:stop], "label": LABELS[start:stop]}, schema=SCHEMA)


def stream(path: Path, table: pa.Table, size: int = 1000, **options: Any) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(max_chunksize=size):
            writer.write_batch(batch)


def saved(folder: Path, ends: tuple[int, ...] = (0, 4, 7), **more: Any) -> Path:
    """A folder of `save_to_disk`; the files' content as datasets 5.2.0 has it."""
    folder.mkdir(parents=True)
    shards = len(ends) - 1
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for name, start, stop in zip(names, ends, ends[1:], strict=False):
        stream(folder / name, rows(start, stop), 3)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "245bdc355271a3ad",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
        **more,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2, sort_keys=True))
    return folder


def opened(root: Path, **more: Any) -> Table:
    found = Dataset.model_validate({"kind": "table", "name": "t", "root": str(root), **more})
    assert isinstance(found, Table)
    return found


def forms(folder: Path) -> dict[str, Table]:
    """The same seven images in each form."""
    saved(folder / "saved")
    saved(folder / "splits/train")
    saved(folder / "splits/test", (0, 2))
    (folder / "splits/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    pq.write_table(rows(), folder / "one.parquet", row_group_size=3)
    for name, start, stop in (("00000-of-00002", 0, 5), ("00001-of-00002", 5, 7)):
        (folder / "hub").mkdir(exist_ok=True)
        pq.write_table(rows(start, stop), folder / f"hub/train-{name}.parquet", row_group_size=2)
    pq.write_table(rows(3), folder / "hub/test-00000-of-00001.parquet")
    large = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    (folder / "plain").mkdir()
    plain = pa.table({"img": [cell["bytes"] for cell in CELLS], "fine": pa.array(LABELS, pa.int8())})
    pq.write_table(plain.slice(0, 4), folder / "plain/0000.parquet", compression="zstd")
    pq.write_table(plain.slice(4), folder / "plain/0001.parquet")
    wide = pa.table({"image": pa.array(CELLS, large), "label": LABELS, "more": [{"a": [1]}] * 7})
    stream(folder / "wide.arrow", wide, 2, compression="zstd")
    return {
        "saved": opened(folder / "saved"),
        "splits": opened(folder / "splits", split="train"),
        "one": opened(folder / "one.parquet"),
        "hub": opened(folder / "hub", split="train"),
        "plain": opened(folder / "plain", image="img", label="fine"),
        "wide": opened(folder / "wide.arrow"),
    }


def test_all_forms_give_the_same_images(tmp_path: Path) -> None:
    wanted = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255
    for form, dataset in forms(tmp_path).items():
        check_dataset(dataset)
        source = dataset.opened()
        assert list(source.ids) == [f"{row:06d}" for row in range(7)], form
        assert list(source.labels or []) == LABELS
        images, labels = source.read([6, 0, 3, 4])
        assert torch.equal(images, wanted[[6, 0, 3, 4]])
        assert labels.tolist() == [-1, 2, 1, 0]
    assert opened(tmp_path / "hub", split="test").available() == 4
    assert opened(tmp_path / "splits", split="test").available() == 2


def test_images_without_labels(tmp_path: Path) -> None:
    pq.write_table(rows().drop_columns("label"), tmp_path / "p.parquet")
    assert opened(tmp_path / "p.parquet", label=None).opened().read([5, 6])[1].tolist() == [-1, -1]
    stream(tmp_path / "s.arrow", rows().drop_columns("label"))
    assert list(opened(tmp_path / "s.arrow", label=None).opened().labels or []) == [-1] * 7


def test_images_are_fitted_as_those_of_a_folder(tmp_path: Path) -> None:
    """Whose crops are compared with torchvision's."""
    (tmp_path / "a").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "a/0.png")
    pq.write_table(rows(), tmp_path / "p.parquet")
    more = {"mode": "L", "resize": 20, "crop": 16}
    folder = Folder.model_validate({"name": "f", "root": str(tmp_path), **more}).opened()
    source = opened(tmp_path / "p.parquet", **more).opened()
    assert torch.equal(source.read([0])[0], folder.read([0])[0])
    assert source.decode is not None
    assert source.fit is not None
    assert torch.equal(source.fit(source.decode(3)), source.read([3])[0][0])


def test_files_by_path_stay_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "root/images").mkdir(parents=True)
    Image.fromarray(PIXELS[2]).save(tmp_path / "root/images/2.png")
    Image.fromarray(PIXELS[2]).save(tmp_path / "secret.png")
    (tmp_path / "root/link.png").symlink_to(tmp_path / "secret.png")
    paths = ["images/2.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "absent.png", None]
    cells = [{"bytes": None, "path": path} for path in paths]
    table = pa.table({"image": [*cells, None], "label": [0] * 7}, schema=SCHEMA)
    pq.write_table(table, tmp_path / "root/p.parquet")
    for root in (tmp_path / "root", tmp_path / "root/p.parquet"):
        source = opened(root).opened()
        assert torch.equal(source.read([0])[0][0], torch.from_numpy(PIXELS[2]).permute(2, 0, 1).float() / 255)
        for row, message in (
            (1, r"image 000001 of t \('\.\./secret\.png'\) names .* which is not a path below"),
            (2, "which is not a path below"),
            (3, "which a link leads out of"),
            (4, "and there is no such file below"),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                source.read([row])
            assert type(caught.value) is ValueError
        for row in (5, 6):
            with pytest.raises(BadImage, match=f"image 00000{row} of t is null"):
                source.read([0, row])


def test_a_damaged_image_is_named_and_no_other_is(tmp_path: Path) -> None:
    cells = [*CELLS[:2], {"bytes": CELLS[2]["bytes"][:60], "path": "cut.png"}, *CELLS[3:]]
    pq.write_table(pa.table({"image": cells, "label": LABELS}, schema=SCHEMA), tmp_path / "p.parquet")
    source = opened(tmp_path / "p.parquet").opened()
    with pytest.raises(BadImage, match=r"image 000002 of t \('cut\.png'\) is not a readable image"):
        source.read([2])
    with pytest.raises(BadImage, match=r"1 of 3 images of this batch .*image 000002 of t"):
        source.read([1, 2, 3])
    assert len(source.read([0, 1, 3, 4, 5, 6])[0]) == 6
    sizes = [*CELLS[:3], {"bytes": png(PIXELS[0][:8]), "path": "small.png"}]
    pq.write_table(pa.table({"image": sizes, "label": LABELS[:4]}, schema=SCHEMA), tmp_path / "s.parquet")
    with pytest.raises(ValueError, match=r"images of t differ in size, 10x12 and 10x8 at image 000003 .*; give crop"):
        opened(tmp_path / "s.parquet").opened().read([3])


def test_few_groups_of_rows_are_read_and_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(rows(), tmp_path / "p.parquet", row_group_size=2)
    monkeypatch.setattr(tables, "HELD", 1)
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counting(self: Any, number: int, columns: list[str], **more: Any) -> Any:
        read.append(number)
        assert len(columns) == 1
        return original(self, number, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    source = opened(tmp_path / "p.parquet", crop=8, threads=1).opened()  # several may come in another order
    assert read[-4:] == [0, 1, 2, 3]  # the labels
    del read[:]
    source.read([0, 1, 2, 3])
    source.read([2, 3])
    assert read == [0, 1]
    source.read([6, 0])
    assert read == [0, 1, 3, 0]


def test_streams_are_mapped_and_not_read(tmp_path: Path) -> None:
    noise = [{"bytes": bytes(100_000), "path": None}] * 30
    stream(tmp_path / "s.arrow", pa.table({"image": noise, "label": [0] * 30}, schema=SCHEMA), 5)
    before = pa.total_allocated_bytes()
    source = opened(tmp_path / "s.arrow", crop=8).open()
    with pytest.raises(BadImage):
        source.read([29])
    assert pa.total_allocated_bytes() - before < 50_000


def test_what_records_depend_on(tmp_path: Path) -> None:
    pq.write_table(rows(), tmp_path / "p.parquet")
    dataset = opened(tmp_path / "p.parquet")
    before = dataset.fingerprint
    assert dataset.model_copy(update={"threads": 1}).fingerprint == before
    assert dataset.model_copy(update={"mode": "L"}).fingerprint != before
    changed = rows().set_column(1, "label", pa.array([1, *LABELS[1:]]))
    pq.write_table(changed, tmp_path / "p.parquet")
    assert dataset.fingerprint != before


def broken(folder: Path) -> dict[str, tuple[Table, str]]:
    """Entries that are refused, with what is said of them."""
    whole = forms(folder)
    (folder / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "text.parquet").write_text("no table")
    (folder / "none").mkdir()
    (folder / "gap").mkdir()
    pq.write_table(rows(), folder / "gap/train-00001-of-00002.parquet")
    strings = rows().set_column(0, "image", pa.array(["x"] * 7))
    pq.write_table(strings, folder / "strings.parquet")
    pq.write_table(rows().set_column(1, "label", pa.array(["x"] * 7)), folder / "words.parquet")
    pq.write_table(rows().set_column(1, "label", pa.array([None, *LABELS[1:]])), folder / "nulls.parquet")
    pq.write_table(rows().set_column(1, "label", pa.array([-2, *LABELS[1:]])), folder / "minus.parquet")
    pq.write_table(rows(0, 0), folder / "empty.parquet")
    pq.write_table(rows().rename_columns(["im\nage", "label"]), folder / "lines.parquet")
    names = pa.table({"image": CELLS, "label": LABELS, "s": pa.array(["a"] * 7).dictionary_encode()})
    stream(folder / "dictionary.arrow", names)
    with pa.ipc.new_file(folder / "file.arrow", SCHEMA) as writer:
        writer.write_table(rows())
    return {
        "split": (opened(folder / "splits"), "holds the splits train, test; give split one of them, not ''"),
        "other": (opened(folder / "splits", split="../saved"), "give split one of them"),
        "single": (opened(folder / "saved", split="train"), "is a single data set; leave split out"),
        "file": (opened(folder / "one.parquet", split="train"), "is one file; leave split out"),
        "hub": (opened(folder / "hub"), "holds Parquet files of test, train; give split one of them"),
        "hub other": (opened(folder / "hub", split="val"), "holds Parquet files of test, train"),
        "lines": (opened(folder / "lines.parquet"), "has no column 'image'; did you mean im age"),
        "column": (whole["plain"].model_copy(update={"image": "imag"}), "has no column 'imag'; did you mean img"),
        "label": (whole["plain"].model_copy(update={"label": "x"}), "has no column 'x'; there are img, fine"),
        "lfs": (opened(folder / "lfs.parquet"), "is a git-lfs pointer, not the data; run git lfs pull"),
        "text": (opened(folder / "text.parquet"), "is neither a Parquet file nor an Arrow stream"),
        "arrow file": (opened(folder / "file.arrow"), "is neither a Parquet file nor an Arrow stream"),
        "none": (opened(folder / "none"), r"holds no \*\.parquet file"),
        "gap": (opened(folder / "gap"), r"holds 1 shards up to train-00001-of-00002\.parquet; get those"),
        "strings": (opened(folder / "strings.parquet"), "has string in column image; needed are images"),
        "words": (opened(folder / "words.parquet"), "has string in column label; needed are integers"),
        "nulls": (opened(folder / "nulls.parquet"), "has 1 rows without a label"),
        "minus": (opened(folder / "minus.parquet"), "has labels from -2 to 2"),
        "empty": (opened(folder / "empty.parquet"), "is empty"),
        "dictionary": (opened(folder / "dictionary.arrow"), "holds a dictionary, which save_to_disk does not write"),
    }


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    for name, (dataset, message) in broken(tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            dataset.open()
        assert type(caught.value) is ValueError, name
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"_data_files": [{"filename": "../x.arrow"}]}', r"names '\.\./x\.arrow' under _data_files, which is no"),
        ('{"_data_files": [{"filename": "/etc/hostname"}]}', "which is no name beside it"),
        ('{"_data_files": [{"filename": ".."}]}', "which is no name beside it"),
        ('{"_data_files": [7]}', "names '7' under"),
        ('{"_data_files": 7}', "names nothing under _data_files"),
        ("[]", "names nothing under _data_files"),
        ('{"_data_files": [{"filename": "absent.arrow"}]}', r"there is no .*absent\.arrow, which state\.json names"),
        ("[" * 200_000, r"state\.json is not readable JSON"),
        ("{", r"state\.json is not readable JSON"),
        ('{"_indices_data_files": [{"filename": "i.arrow"}]}', "holds a selection by indices"),
    ],
)  # fmt: skip
def test_states_that_lead_elsewhere_are_refused(state: str, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "s")
    (tmp_path / "s/state.json").write_text(state)
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path / "s").open()
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_files_that_are_cut_off_are_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{form}"
    if form == "arrow":
        stream(path, rows(), 3)
    else:
        pq.write_table(rows(), path)
    content = path.read_bytes()
    for length in (0, 3, 30, len(content) // 2, len(content) - 9, len(content) - 8, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"is cut off|is damaged or cut off|is neither") as caught:
            opened(path).open()
        assert type(caught.value) is ValueError


def _whole() -> dict[str, bytes]:
    files = {"arrow": BytesIO(), "parquet": BytesIO()}
    with pa.ipc.new_stream(files["arrow"], SCHEMA) as writer:
        writer.write_table(rows(0, 3))
    pq.write_table(rows(0, 3), files["parquet"])
    return {form: file.getvalue() for form, file in files.items()}


WHOLE = _whole()


@pytest.mark.parametrize("form", ["arrow", "parquet"])
@settings(deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(form: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    content = bytearray(WHOLE[form])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / f"x.{form}"
    path.write_bytes(content)
    try:
        images, _ = opened(path, crop=8).open().read([0])
    except ValueError as error:
        assert type(error) in (ValueError, BadImage)
        assert "\n" not in str(error)
    else:
        assert images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train-00000-of-00001-3f2a.parquet test-00000-of-00001-9c1b.parquet", {"train", "test"}),
        ("0000.parquet 0001.parquet", {""}),
        ("cifar10.parquet cifar100.parquet", {"cifar10", "cifar100"}),
        ("part-00000-8d1f-c000.snappy.parquet part-00001-8d1f-c000.snappy.parquet", {"part"}),
        ("shard_1.parquet shard_2.parquet .hidden.parquet", {"shard"}),
        ("imagenet-v2.parquet", {"imagenet-v2"}),
    ],
)
def test_splits_by_the_names_of_files(names: str, splits: set[str], tmp_path: Path) -> None:
    for name in names.split():
        pq.write_table(rows(0, 1), tmp_path / name)
    if len(splits) == 1:
        whole = opened(tmp_path)
        assert whole.available() == len([name for name in names.split() if name[0] != "."])
    else:
        with pytest.raises(ValueError, match=f"holds Parquet files of {', '.join(sorted(splits))}; give split"):
            opened(tmp_path).open()
        assert all(opened(tmp_path, split=split).available() == 1 for split in splits)
