"""What a dataset promises: named images in [0, 1], the same whenever and in whatever order they are read."""

import torch

from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.testing.values import check_value, generators_unmoved

__all__ = ["check_dataset"]


def check_dataset(dataset: Dataset) -> None:
    """A dataset's images are named, in [0, 1], and the same whenever and in whatever order they are read.

    Arguments:
        dataset: Whose files are there; a grid is checked part by part.
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
