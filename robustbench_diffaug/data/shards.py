"""Columns of images and labels in Parquet and Arrow files, read a group of rows at a time."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from robustbench_diffaug.component import suggest

__all__ = ["Columns", "Group", "files", "groups"]

END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a whole Arrow stream."""

NUMBERED = re.compile(r"^(?:(?P<split>.*?)[-_.])?(?:\d{4,}(?!\w).*|\d+)$")
"""The name of a shard without its ending, such as 'train-00000-of-00014'."""


Load: TypeAlias = Callable[[], Any]
"""Reads the column of images of a group of rows; pyarrow has no types."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns.

    Arguments:
        image: Of encoded images: binary, or structs of `bytes` and `path`.
        label: Of integers; None where there are no labels.
    """

    image: str
    label: str | None

    def check(self, schema: pa.Schema) -> None:
        """Raises ValueError, ending 'FILE ...', where a schema has no such columns."""
        for name in (self.image, self.label):
            if name is not None and name not in schema.names:
                raise ValueError(f"has no column {name!r}{suggest(name, schema.names)}")
        image = schema.field(self.image).type
        parts = {field.name: field.type for field in image} if pa.types.is_struct(image) else {"bytes": image}
        kept = parts.get("bytes")
        if kept is None or not (pa.types.is_binary(kept) or pa.types.is_large_binary(kept)):
            raise ValueError(f"has {image} in column {self.image}; needed are images: binary or struct<bytes, path>")
        if self.label is not None and not pa.types.is_integer(schema.field(self.label).type):
            kind = schema.field(self.label).type
            raise ValueError(f"has {kind} in column {self.label}; needed are integers, or label: null for no labels")


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are read together.

    Arguments:
        labels: Of its rows; -1 for none.
        size: Of its images, decompressed, in bytes; or of more.
        load: Reads its images.
    """

    labels: Int64[np.ndarray, " n"]
    size: int
    load: Load


def files(root: Path, split: str) -> tuple[Path, ...]:
    """The shards of a data set, in order.

    Arguments:
        root: A Parquet or Arrow file, a folder of Parquet files, or a folder that `datasets` wrote by `save_to_disk`.
        split: Which of the splits in it; empty where there is one.

    Raises:
        ValueError: If there are none, some are missing, or it is not said which split.
    """
    if root.is_file():
        if split:
            raise ValueError(f"{root} is one file; leave split out")
        return (root,)
    if (root / "dataset_dict.json").is_file():
        splits = _texts(root / "dataset_dict.json", "splits")
        if split not in splits:
            raise ValueError(f"{root} holds the splits {', '.join(splits)}; give split one of them, not {split!r}")
        return _saved(root / split)
    if (root / "state.json").is_file():
        if split:
            raise ValueError(f"{root} is a single data set; leave split out")
        return _saved(root)
    return _parquet_files(root, split)


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(2**24))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {' '.join(str(error).split())[:160]}") from error
    return found if isinstance(found, dict) else {}


def _texts(path: Path, key: str) -> list[str]:
    """The names of files or folders beside a JSON file that it lists."""
    listed = _json(path).get(key)
    names = []
    for entry in listed if isinstance(listed, list) else []:
        name = entry.get("filename") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{path} names {str(name)[:80]!r} under {key}, which is no name beside it")
        names.append(name)
    if not names:
        raise ValueError(f"{path} names nothing under {key}; save the data set again")
    return names


def _saved(root: Path) -> tuple[Path, ...]:
    """The shards of one folder of `save_to_disk`."""
    if _json(root / "state.json").get("_indices_data_files"):
        raise ValueError(f"{root} holds a selection by indices; save it again with datasets 2 or later")
    paths = tuple(root / name for name in _texts(root / "state.json", "_data_files"))
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no {path}, which state.json names; copy the whole folder")
    return paths


def _parquet_files(root: Path, split: str) -> tuple[Path, ...]:
    """The shards of a folder of Parquet files; those of several splits are never mixed."""
    by_split: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.iterdir() if path.suffix == ".parquet" and path.name[0] != "."):
        numbered = NUMBERED.match(path.stem)
        by_split.setdefault((numbered["split"] or "") if numbered else path.stem, []).append(path)
    names = ", ".join(sorted(by_split)[:9])
    if not by_split:
        raise ValueError(f"{root} holds no *.parquet file, and no state.json or dataset_dict.json of save_to_disk")
    if split not in by_split and (split or len(by_split) > 1):
        raise ValueError(f"{root} holds Parquet files of {names}; give split one of them")
    found = by_split[split] if split in by_split else next(iter(by_split.values()))
    counted = [re.search(r"(\d+)-of-(\d+)", path.stem) for path in found]
    for number, match in enumerate(counted):
        if match and (int(match[1]), int(match[2])) != (number, len(found)):
            raise ValueError(f"{root} holds {len(found)} shards up to {found[-1].name}; get those that are missing")
    return tuple(found)


def groups(path: Path, columns: Columns) -> Iterator[Group]:
    """The groups of rows of one shard.

    Raises:
        ValueError: If it is not a whole Parquet file or Arrow stream, or its columns are not such.
    """
    with _named(path):
        with path.open("rb") as file:
            start = file.read(24)
        if start.startswith(b"PAR1"):
            yield from _of_parquet(path, columns)
        elif start.startswith(END[:4]):
            yield from _of_stream(path, columns)
        elif start.startswith(b"version https://git-lfs"):
            raise ValueError("is a git-lfs pointer, not the data; run git lfs pull")
        else:
            raise ValueError("is neither a Parquet file nor an Arrow stream")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of one line that begin with the file."""
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, KeyError) as error:
        raise ValueError(f"{path} is damaged or cut off: {' '.join(str(error).split())[:200]}") from error
    except ValueError as error:
        reason = " ".join(str(error).splitlines())  # names of columns may hold anything
        raise ValueError(reason if reason.startswith(str(path)) else f"{path} {reason}") from error


def _of_parquet(path: Path, columns: Columns) -> Iterator[Group]:
    with pq.ParquetFile(path) as file:
        columns.check(file.schema_arrow)
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)  # of whose columns nothing is asked: damaged ones abort Python
            names = [columns.label] if columns.label else []
            table = file.read_row_group(number, columns=names, use_threads=False)
            labels = _labels(table[names[0]] if names else None, group.num_rows)
            yield Group(labels, group.total_byte_size, partial(_row_group, path, file.metadata, number, columns.image))


def _row_group(path: Path, metadata: Any, number: int, image: str) -> Any:
    with _named(path), pq.ParquetFile(path, metadata=metadata) as file:
        column = file.read_row_group(number, columns=[image], use_threads=False)[image]
        if len(column) != metadata.row_group(number).num_rows:
            raise ValueError(f"is damaged: row group {number} has {len(column)} images, and its index says otherwise")
        return column


def _of_stream(path: Path, columns: Columns) -> Iterator[Group]:
    """Messages are views of the mapped file; a batch is decoded when it is wanted, which is free if not compressed."""
    with path.open("rb") as file:
        file.seek(-len(END), 2)
        if file.read() != END:
            raise ValueError("is cut off: an Arrow stream ends otherwise; copy it again")
    messages = pa.ipc.MessageReader.open_stream(pa.memory_map(str(path)))
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise ValueError("is an Arrow stream without a schema")
    schema = pa.ipc.read_schema(first)
    columns.check(schema)
    for message in messages:
        if message.type != "record batch":
            raise ValueError(f"holds a {message.type}, which save_to_disk does not write; save it without")
        load = partial(_batch, path, message, schema, columns)
        table = load()
        labels = _labels(table[columns.label] if columns.label else None, table.num_rows)
        yield Group(labels, table[columns.image].nbytes, partial(_image, load, columns.image))


def _batch(path: Path, message: Any, schema: pa.Schema, columns: Columns) -> Any:
    with _named(path):
        batch = pa.ipc.read_record_batch(message, schema).select([columns.image, *filter(None, [columns.label])])
        batch.validate(full=True)  # offsets that point outside would be read otherwise
        return batch


def _image(load: Load, image: str) -> Any:
    return load()[image]


def _labels(column: Any, rows: int) -> Int64[np.ndarray, " n"]:
    """The labels of a group as integers."""
    if column is None:
        return np.full(rows, -1)
    if len(column) != rows:
        raise ValueError(f"has {len(column)} labels for {rows} rows")
    if column.null_count:
        raise ValueError(f"has {column.null_count} rows without a label; write -1, or label: null for no labels at all")
    labels = np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False) if rows else [], np.int64)
    if rows and not -1 <= labels.min() <= labels.max() < 2**31:
        raise ValueError(f"has labels from {labels.min()} to {labels.max()}; needed are 0, 1, ... and -1 for none")
    return labels
