"""Records: what is selected, what is one cluster, and when a metric is complete."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.records import Declared, Records, from_table, to_table
from robustbench_diffaug.stats import Estimate

CLEAN = Declared("m", "m", "clean", 0, 2, 9)
FOG = Declared("m/fog@s5", "m", "fog", 5, 2, 9)
OTHER = Declared("o", "o", "far", 0, 1, 4)
DECLARED = (CLEAN, FOG, OTHER)


def records(declared: tuple[Declared, ...] = DECLARED, seed: int = 0) -> Records:
    columns = {
        "dataset": np.array(["m", "m", "m/fog@s5", "m/fog@s5", "o"]),
        "origin": np.array(["m", "m", "m", "m", "o"]),
        "sample": np.array(["0", "1", "0", "1", "0"]),
        "hit": np.arange(5),
    }
    return Records(columns, declared, seed)


def test_rows_of_some_datasets() -> None:
    found = records().of(lambda dataset: dataset.severity == 0)
    assert found["hit"].tolist() == [0, 1, 4]
    assert found.declared == (CLEAN, OTHER)
    assert len(records().of(lambda dataset: False)) == 0
    assert not Records({}, DECLARED).of(lambda dataset: True)


def test_versions_of_one_image_are_one_cluster() -> None:
    clusters = records().clusters()
    assert len(set(clusters.tolist())) == 3
    assert clusters[0] == clusters[2] != clusters[4]


def test_the_numbers_of_images_are_in_the_order_of_their_names() -> None:
    samples = ["b", "a", "b", "c", "a\u00e9", "a"]
    origins = ["x", "x\x01y", "x", "m", "x", "x"]
    found = Records({"origin": np.array(origins), "sample": np.array(samples), "dataset": np.array(["d"] * 6)}, ())
    assert found.images.tolist() == np.unique(found.clusters(), return_inverse=True)[1].tolist()


@pytest.mark.parametrize("keep", [{"m", "o"}, {"m/fog@s5", "o"}, {"m/fog@s5"}, {"m", "m/fog@s5", "o"}])
def test_what_is_cut_out_has_the_same_images(keep: set[str]) -> None:
    whole = records()
    assert whole.images.tolist() == [0, 1, 0, 1, 2]
    found = whole.of(lambda dataset: dataset.name in keep)
    rows = [row for row, name in enumerate(whole["dataset"]) if name in keep]
    assert found.images.tolist() == whole.images[rows].tolist()
    assert found["hit"].tolist() == rows and list(found.columns) == list(whole.columns) and len(found) == len(rows)
    assert found.of(lambda dataset: dataset.name == "o")["hit"].tolist() == ([4] if "o" in keep else [])


def test_a_sample_that_is_there_twice_is_found() -> None:
    assert records().repeated() is None
    columns = {name: column[[0, 1, 2, 3, 1, 4]] for name, column in records().columns.items()}
    assert Records(columns, DECLARED).repeated() == 4


def test_resampling_depends_on_the_seed_the_datasets_and_the_figure() -> None:
    keys = {records().key("a"), records().key("b"), records(seed=1).key("a"), records((CLEAN,)).key("a")}
    assert len(keys) == 4
    assert records().key("a") == records().key("a")


def test_a_metric_says_what_it_rests_on() -> None:
    whole = records().metric("x", "g", Estimate(0.5, 0.4, 0.6, 5))
    assert (whole.n, whole.n_available, whole.complete) == (5, 13, True)  # an image and its version are one
    declared = (CLEAN, Declared("m/fog@s5", "m", "fog", 5, 3, 9), OTHER)
    assert not records(declared).metric("x", "g", Estimate(0.5, 0.4, 0.6, 5)).complete


def test_a_column_that_every_record_has_is_refused() -> None:
    batch = Batch("m", ("a",), torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), 0, Limits())
    for name in ("label", "image", "dataset"):
        with pytest.raises(ValueError, match=f"column {name} is one that every record has"):
            to_table(batch, CLEAN, {name: torch.zeros(1)})


def test_the_image_column_tells_pixels_apart() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = 1 / 255
    batch = Batch("m", ("a", "b", "c"), images, torch.zeros(3).long(), 0, Limits())
    found = from_table(to_table(batch, CLEAN, {"x": torch.zeros(3)}))["image"].tolist()
    assert found[0] == found[2] != found[1]


def test_a_batch_without_images_makes_an_empty_table_of_the_same_form() -> None:
    def made(count: int) -> pa.Table:
        ids = tuple(map(str, range(count)))
        batch = Batch("m", ids, torch.zeros(count, 1, 2, 2), torch.zeros(count).long(), 0, Limits())
        columns = {"x": torch.zeros(count), "votes": torch.zeros(count, 2, 3).int()}
        return to_table(batch, CLEAN, columns)

    none, some = made(0), made(2)
    assert none.schema.equals(some.schema, check_metadata=True)
    assert len(pa.concat_tables([none, some])) == 2
    assert from_table(none)["votes"].shape == (0, 2, 3)
