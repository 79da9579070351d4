# rdiff_example/translation.py
"""How stable predictions are when the image moves by a few pixels."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from pydantic import PositiveInt
from torch.nn.functional import pad

from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.records import Metric, Records
from robustbench_diffaug.stats import clustered_mean


class Translation(Evaluator):
    """Accuracy and consistency of predictions under translations by a few pixels, black moving in.

    Consistency is the share of the eight translations (to each side, and to each corner) that leave the prediction what
    it was.

    Arguments:
        pixels: How far, along each axis.

    References:
        Making Convolutional Networks Shift-Invariant Again (Zhang, ICML 2019), https://arxiv.org/abs/1904.11486
    """

    kind: Literal["translation"] = "translation"
    pixels: PositiveInt = 2

    def forwards(self) -> Forwards:
        """No denoising; a look at the image and at each translation."""
        return Forwards(denoiser=0, classifier=9)

    def views(self, batch: Batch) -> Iterator[View]:
        """The image, then its eight translations, along the second axis."""
        p, (height, width) = self.pixels, batch.images.shape[-2:]
        wide = pad(batch.images, (p, p, p, p))
        places = [(p, p), *((y, x) for y in (0, p, 2 * p) for x in (0, p, 2 * p) if (y, x) != (p, p))]
        shown = [wide[..., y : y + height, x : x + width] for y, x in places]
        yield View("translated", torch.stack(shown, dim=1))

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """The predicted class of each, of shape (samples, 9)."""
        return {"prediction": model.logits(view.images).argmax(dim=-1).int()}

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Both, of each group; an image that several datasets have versions of counts as one."""
        for group, rows in records.groups():
            predictions, clusters = rows["prediction"], rows.clusters()
            stayed = (predictions[:, 1:] == predictions[:, :1]).mean(axis=1)
            right = (predictions[:, 1:] == rows["label"][:, None]).mean(axis=1)
            for name, values in (("consistency", stayed), ("accuracy/translated", right)):
                estimate = clustered_mean(values, clusters, rows.key(name), bounded=True)
                yield rows.metric(name, group, estimate, headline=True)
