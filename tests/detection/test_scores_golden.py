"""Every score against the code that defines it.

`golden/openood-scores.npz` was made by the post-processors of https://github.com/Jingkang50/OpenOOD (commit 3c35632),
run on arrays of 240 fit, 76 val and 90 test rows with 24 features, one of them dead and one constant, and 10 classes,
one of them never predicted on val. `single/...` is what the code gives as published, in float32, with faiss 1.15.1;
`double/...` is what it gives with its float32 casts taken out and faiss's exact indices in numpy. `@` stands before a
value of the hyper-parameter that is not the default. `nnguide` was given the fit rows in the order of permutation(7),
by batches of one; `ash-s` and `ash-p` are functions of its `ash_net.py` which `ASHPostprocessor` was made to call.
`temperature/sharp` is for four times the logits: for these ones, L-BFGS ends at T = -26. OpenOOD has no post-processor
for entropy.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch.nn.functional import cross_entropy

from robustbench_diffaug.detection.rows import Rows, Source
from robustbench_diffaug.detection.scores import SCORES

ARRAYS: dict[str, NDArray[Any]] = dict(np.load(Path(__file__).with_name("golden") / "openood-scores.npz"))
CASES = sorted(name.partition("/")[2] for name in ARRAYS if name.startswith("double/") and "value" not in name)


def rows(role: str) -> Rows:
    return Rows(*(ARRAYS[f"{role}_{part}"] for part in ("logits", "features", "labels")))


SOURCE = Source(lambda: iter([rows("fit")]), lambda: iter([rows("val")]), ARRAYS["weight"], ARRAYS["bias"], key=7)


def named(case: str) -> str:
    return case.partition("@")[0].partition("/")[0]


def scored(case: str) -> NDArray[np.float64]:
    value = case.partition("@")[2]
    score, source, test = SCORES[named(case)], SOURCE, rows("test")
    if case.endswith("/sharp"):
        source = Source(val=lambda: iter([sharp(rows("val"))]))
        test = sharp(test)
    return score.fit(source, float(value) if value else None)(test)


def sharp(rows: Rows) -> Rows:
    return rows._replace(logits=rows.logits * np.float32(4))


def auroc(scores: NDArray[np.float64]) -> float:
    known = rows("test").labels >= 0
    ranks = rankdata(scores)
    return float((ranks[known].mean() - (known.sum() + 1) / 2) / (~known).sum())


def test_every_score_has_a_golden_array() -> None:
    assert {named(case) for case in CASES} == SCORES.keys() - {"entropy", "ash-b", "gradnorm"}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_openood(case: str) -> None:
    found, published, exact = scored(case), ARRAYS[f"single/{case}"], ARRAYS[f"double/{case}"]
    assert found.dtype == np.float64 and np.ptp(exact) > 0.05
    size = np.abs(exact).max()
    if case == "vim@12":  # eigenvectors in float32
        np.testing.assert_allclose(found, published, rtol=0, atol=1e-3 * size)
    else:
        np.testing.assert_allclose(found, published, rtol=0, atol=1e-6 * max(1, size))
    if named(case) not in ("msp", "gen", "temperature"):  # float32 probabilities are part of these
        added = 1e-7 if named(case) == "nnguide" else 0  # to directions, by OpenOOD: 1e-10 an entry
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-9 + added)
    assert auroc(found) == pytest.approx(auroc(published), abs=5e-4)


def test_a_temperature_that_runs_away_is_the_minimum() -> None:
    val, test = rows("val"), rows("test")

    def likelihood(temperature: float) -> float:
        return float(cross_entropy(torch.tensor(val.logits / temperature), torch.tensor(val.labels).long()))

    grid = np.geomspace(0.05, 20, 4000)
    best = grid[np.argmin([likelihood(value) for value in grid])]
    assert ARRAYS["double/temperature/value"] > 0  # of the sharp ones
    expected = torch.softmax(torch.tensor(test.logits / best), 1).amax(1).numpy()
    np.testing.assert_allclose(scored("temperature"), expected, atol=1e-3)
    assert 0.1 < best < 1


def test_ash_is_ash_b() -> None:
    np.testing.assert_array_equal(scored("ash-b"), scored("ash"))
    assert np.abs(scored("ash") - scored("ash-s")).max() > 1
