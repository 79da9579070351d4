"""What a dataset promises: named images in [0, 1], the same whenever and in whatever order they are read."""

from collections.abc import Sequence

import torch

from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.testing.values import check_value, generators_unmoved

__all__ = ["check_dataset"]


def check_dataset(dataset: Dataset) -> None:
    """A dataset's images are named, in [0, 1], and the same whenever and in whatever order they are read.

    Checked are, besides what every component promises (`check_value`), of each part: some images, ids that differ and
    stay; a digest that is there and stays; float32 images in [0, 1] and integer labels, of the classes that it covers
    and as `labels` says; the same in another order, alone, and when read again; no draw from a global generator; and
    that `every` and `limit` take what they say.

    Arguments:
        dataset: Whose files are there; a grid is checked part by part.

    Raises:
        AssertionError: With the promise that is broken.
    """
    check_value(dataset)
    for part in dataset.parts():
        source, rows = part.open(), list(part.rows())[:6]
        assert rows, f"{part.name} is empty"
        assert len(set(source.ids)) == len(source.ids), f"{part.name} has two images of one id"
        assert list(part.open().ids) == list(source.ids), f"the ids of {part.name} change when it is opened again"
        assert part.contents() and part.contents() == part.contents(), f"the digest of {part.name} is empty or changes"
        with generators_unmoved(part.kind):
            images, labels = source.read(rows)
            assert images.dtype == torch.float32 and images.ndim == 4 and len(images) == len(rows), (
                f"{part.name} gives images of {images.dtype} and shape {tuple(images.shape)}; "
                "needed is float32 and (images, channels, height, width)"
            )
            assert float(images.min()) >= 0 and float(images.max()) <= 1, f"pixels of {part.name} are outside [0, 1]"
            assert labels.shape == (len(rows),) and not labels.is_floating_point(), (
                f"{part.name} gives labels of {labels.dtype} and shape {tuple(labels.shape)}; needed are integers"
            )
            _check_classes(part, labels.tolist(), source.labels and [source.labels[row] for row in rows])
            turned_images, turned_labels = source.read(rows[::-1])
            same = torch.equal(turned_images.flip(0), images) and torch.equal(turned_labels.flip(0), labels)
            assert same, f"images of {part.name} depend on the order in which they are read"
            for position, row in enumerate(rows):
                alone = source.read([row])[0][0]
                assert torch.equal(alone, images[position]), f"images of {part.name} depend on those read beside"
            kept = images.clone()
            images.fill_(0.5)
            assert torch.equal(source.read(rows)[0], kept), (
                f"images of {part.name} change when they are read again, or with what was made of them"
            )
        thinned = part.model_copy(update={"every": 2, "limit": 2})
        found = [thinned.opened().ids[row] for row in thinned.rows()]
        assert found == list(source.ids)[:4:2], f"every 2nd image of {part.name}, at most 2, are {found}"


def _check_classes(part: Dataset, read: Sequence[int], told: Sequence[int] | None) -> None:
    """Labels are those that are told without reading images, and of the classes that the dataset says it covers."""
    covers = part.covers()
    assert list(covers) == sorted(set(covers)), f"the classes that {part.name} covers do not increase"
    odd = [label for label in read if covers and label not in covers and label != -1]
    assert not odd, f"{part.name} has the label {odd[0] if odd else ''}, which is not among the classes that it covers"
    assert told is None or list(told) == list(read), (
        f"{part.name} tells other labels (Images.labels) than its images are read with"
    )
