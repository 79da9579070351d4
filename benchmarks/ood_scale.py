"""Peak memory and seconds of all offline scores on records of ImageNet's size: made-up features, streamed from Parquet.

python benchmarks/ood_scale.py [--images 50000] [--features 2048] [--classes 1000]
"""

import argparse
import platform
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import Progress

from robustbench_diffaug import reading, rng
from robustbench_diffaug.detection.scores import SCORES
from robustbench_diffaug.evaluators.ood_scored import Protocol, scored
from robustbench_diffaug.records import Declared, Piece, Records
from robustbench_diffaug.store import columns_of

ROWS = 128  # of a file, as a run has them


def peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def normals(parts: tuple[object, ...], *shape: int) -> np.ndarray:
    """Standard normal numbers."""
    return rng.normal(rng.key("benchmark", *parts), range(1), shape)[0]


def write(folder: Path, name: str, count: int, role: str, weight: np.ndarray) -> list[Piece]:
    """The heavy columns of made-up images: features after a ReLU that depend on the class, and logits."""
    pieces = []
    for start in range(0, count, ROWS):
        rows = min(ROWS, count - start)
        labels = (start + np.arange(rows)) % len(weight)
        pull = 1.0 if role in ("fit", "val", "id") else 0.5
        features = np.maximum(0, normals((name, start), rows, weight.shape[1]) + pull * weight[labels])
        logits = (features @ weight.T / np.sqrt(weight.shape[1])).astype(np.float32)
        columns = {"features": features.astype(np.float32), "logits": logits}
        arrays = [pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), v.shape[1]) for v in columns.values()]
        fields = [
            pa.field(key, array.type, metadata={"shape": str(columns[key].shape[1])})
            for key, array in zip(columns, arrays, strict=True)
        ]
        path = folder / f"{name}-{start}.parquet"
        pq.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields)), path, compression="zstd")
        pieces.append(Piece(name, rows, partial(columns_of, path)))
    return pieces


def records(folder: Path, images: int, features: int, classes: int) -> Records:
    """Fit images, and as many that are tested; the light columns are held."""
    weight = normals(("weight",), classes, features)
    sizes = {"fit": images, "val": images // 20, "ood-val": images // 40}
    sizes |= {"id": images // 2, "near": images // 4, "far": images // 4}
    pieces, light = [], {key: [] for key in ("dataset", "origin", "group", "sample", "image", "label")}
    for name, count in sizes.items():
        pieces += write(folder, name, count, name, weight)
        for key in ("dataset", "origin", "group"):
            light[key] += [name] * count
        light["sample"] += [f"{row:06d}" for row in range(count)]
        light["image"] += [f"{name}{row:012d}" for row in range(count)]
        light["label"] += [row % classes if name in ("fit", "val", "id") else -1 for row in range(count)]
    declared = tuple(Declared(name, name, name, 0, count, count) for name, count in sizes.items())
    head = {"weight": weight / np.float32(np.sqrt(features)), "bias": np.zeros(classes, np.float32)}
    return Records({key: np.array(values) for key, values in light.items()}, declared, 0, head, tuple(pieces))


def main() -> None:
    """Prints a line for each score, then the peak of all of them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=50_000)
    options.add_argument("--features", type=int, default=2048)
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--scores", default=",".join(name for name in SCORES if name != "ash-b"))
    given = options.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        made = records(Path(folder), given.images, given.features, given.classes)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e9
        held = peak()
        shape = (
            f"{given.images} fit and {given.images} tested images x {given.features} features, {given.classes} classes"
        )
        bar.console.print(f"{shape}: {size:.2f} GB of Parquet; {held:.0f} MB before any score")
        job = bar.add_task("rows", total=None)
        with reading.watched(lambda what, rows: bar.advance(job, rows)):
            for name in given.scores.split(","):
                begun = time.perf_counter()
                found = scored(made, Protocol((name,)))
                spent, why = time.perf_counter() - begun, found.refused.get(name, "")
                bar.console.print(f"{name:12s} {spent:8.1f} s   peak {peak():6.0f} MB   {why}")
    print(f"peak of all: {peak():.0f} MB, {peak() - held:.0f} MB over what was held before")


if __name__ == "__main__":
    main()
