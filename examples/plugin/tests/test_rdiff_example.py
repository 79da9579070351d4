# tests/test_rdiff_example.py
"""Both kinds keep rdiff's promises, and their figures are right."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rdiff_example.ensemble import Ensemble
from rdiff_example.translation import Translation

from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.suite import load
from robustbench_diffaug.testing import check_checkpoint, check_evaluator

SUITE = load(str(Path(__file__).parent.parent / "suite.yaml")).suite


def test_the_evaluator_keeps_the_promises() -> None:
    check_evaluator(Translation(pixels=1))


def test_the_ensemble_keeps_the_promises() -> None:
    check_checkpoint(SUITE.checkpoints[-1], shape=(1, 32, 32))


def test_images_move_and_black_moves_in() -> None:
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 1, 2] = 1
    (view,) = Translation(pixels=1).views(Batch("d", ("a",), image, torch.tensor([0]), 0, Limits()))
    assert torch.equal(view.images[:, 0], image)
    places = {tuple(np.argwhere(moved[0].numpy())[0]) for moved in view.images[0]}
    assert places == {(y, x) for y in (0, 1, 2) for x in (1, 2, 3)}


def test_an_ensemble_averages_probabilities() -> None:
    members = tuple(Bayes(id=str(tilt), classes=4, tilt=tilt) for tilt in (0.0, 2.0))
    images = torch.full((3, 1, 8, 8), 0.5)
    each = [member.loaded(Limits()).logits(images).softmax(dim=1) for member in members]
    mean = Ensemble(id="e", classes=4, members=members).loaded(Limits()).logits(images).softmax(dim=1)
    torch.testing.assert_close(mean, sum(each) / 2)


def test_members_must_have_the_same_classes() -> None:
    with pytest.raises(ValueError, match="member a has 3 classes, and the ensemble 4"):
        Ensemble(id="e", classes=4, members=(Bayes(id="a", classes=3), Bayes(id="b", classes=4)))
