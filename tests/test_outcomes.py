"""What figures rest on: of every evaluator the mean of the outcomes is the figure, to the last digit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml

from robustbench_diffaug import runs
from robustbench_diffaug.engine import cells
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.executors import local
from robustbench_diffaug.outcomes import Areas, Deferred, Outcomes, Rows
from robustbench_diffaug.records import Declared, Records
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import load

EXACT = {"kind": "mixture"}
JUDGE = {"kind": "mixture", "id": "judge", "classes": 4, "temperature": 0.0016}
SPEC, OTHER = {"classes": 4}, {"classes": 4, "contrast": 0.05}
ROLES = {"fit": (SPEC, 24, 1), "id": (SPEC, 24, 2), "near": (OTHER, 20, 3), "far": (OTHER, 20, 4)}
PLAIN = {"kind": "mixture", "name": "mixture", "group": "clean", "size": 24}
SUITE: dict[str, Any] = {
    "name": "all-figures",
    "checkpoints": [
        {"kind": "mixture", "id": "bayes", "classes": 4, "temperature": 0.0016},
        {"kind": "denoiser", "id": "exact", "denoiser": EXACT | {"clip": False}, "microbatch": 16},
    ],
    "benches": [
        {
            "name": "shift",
            "checkpoints": ["bayes"],
            "evaluator": {
                "kind": "shift",
                "modes": ["default", "de"],
                "denoiser": EXACT,
                "times": [0, 50, 100],
                "steps": [100],
            },
            "datasets": [
                PLAIN,
                {
                    "kind": "corruptions",
                    "base": PLAIN,
                    "constants": "imagenet-c",
                    "corruptions": ["gaussian_noise", "contrast", "saturate"],
                    "severities": [2, 5],
                },
            ],
        },
        {
            "name": "certify",
            "checkpoints": ["bayes"],
            "evaluator": {"kind": "smoothing", "denoiser": EXACT, "sigmas": [0.25, 0.5], "n0": 8, "n": 60},
            "datasets": [PLAIN | {"size": 12}],
        },
        {
            "name": "ood",
            "checkpoints": ["bayes"],
            "evaluator": {"kind": "ood", "scores": ["msp", "energy", "mds"], "average": ["msp", "energy"]},
            "datasets": [
                {"kind": "mixture", "name": f"{role}-images", "group": role, "size": size, "draw": draw, "spec": spec}
                for role, (spec, size, draw) in (ROLES | {"near": (OTHER, 18, 3)}).items()
            ]
            + [{"kind": "mixture", "name": "closer", "group": "near", "size": 20, "draw": 5, "spec": OTHER}],
        },
        {
            "name": "noise",
            "checkpoints": ["bayes"],
            "evaluator": {
                "kind": "noise",
                "look": "denoised",
                "denoiser": EXACT,
                "times": [0, 100, 600],
                "random_time": True,
            },
            "datasets": [PLAIN],
        },
        {
            "name": "gradients",
            "checkpoints": ["bayes"],
            "evaluator": {
                "kind": "gradients",
                "denoiser": EXACT,
                "times": [0, 300],
                "judge": JUDGE,
                "judge_times": [300],
                "steps": 1,
            },
            "datasets": [PLAIN | {"size": 5}],
        },
        {
            "name": "generation",
            "checkpoints": ["bayes"],
            "evaluator": {
                "kind": "generation",
                "denoiser": EXACT,
                "features": JUDGE,
                "judge": JUDGE,
                "through": "denoised",
                "steps": 2,
                "scales": [0, 1],
            },
            "datasets": [{"kind": "labels", "name": "asked", "classes": 4, "each": 2, "size": 8}],
        },
        {
            "name": "jacobian",
            "checkpoints": ["exact"],
            "evaluator": {"kind": "jacobian", "times": [100, 400], "exact": True, "vectors": 2, "probes": 2},
            "datasets": [PLAIN | {"size": 4}],
        },
    ],
}
WITHOUT = ("frechet",)  # headlines that are no means over images
UNTESTED = {
    "ece", "mce", "forwards-per-image", "certified-band", "certified-lower", "certified-envelope", "certified-selected",
    "sigma-envelope", "sigma-selected", "jacobian_norm", "entropy_gap", "score", "precision", "recall", "density",
    "coverage", "frechet", "fpr95_ood_positive", "fpr95_id_positive", "aupr_in", "aupr_out", "detection_error", "roc",
    "sweep", "chosen", "backwards-per-image",
}  # fmt: skip
"""First parts of the names of figures that may have no outcomes: no means, or of what was chosen by these images."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Evaluator, Records]]:
    """The records of every bench, with its evaluator."""
    folder = tmp_path_factory.mktemp("outcomes")
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    loaded = load(str(path))
    for outcome in local("cpu")(runs.tasks_of(loaded, runs.Options(folder / "run"))):
        assert not outcome.failures, outcome.failures
    store, found = Store(folder / "run"), {}
    for bench in loaded.suite.benches:
        ((*columns,),) = (zip(*(row for _, row in cells(loaded.suite, bench)), strict=True),)
        found[bench.name] = bench.evaluator, store.read(columns[0])
    return found


@pytest.mark.parametrize("name", [bench["name"] for bench in SUITE["benches"]])
def test_the_mean_of_outcomes_is_the_figure(name: str, recorded: dict[str, tuple[Evaluator, Records]]) -> None:
    evaluator, records = recorded[name]
    figures = {(figure.name, figure.group): figure for figure in evaluator.metrics(records)}
    bases = evaluator.outcomes(records)
    assert isinstance(bases, Deferred) and set(bases) <= set(figures)
    for key, basis in bases.items():
        exact = not key[0].startswith("acr")  # whose figure is a share of the largest radius, times that
        assert basis.mean == (figures[key].value if exact else pytest.approx(figures[key].value, rel=1e-12)), key
        assert len(set(basis.samples.tolist())) == len(basis.samples)
        if isinstance(basis, Outcomes):
            assert len(basis.samples) == len(basis.values) == len(basis.clusters)
            assert len(np.unique(basis.clusters)) == figures[key].n
            assert basis.values.max() - basis.values.min() <= basis.width * (1 + 1e-9)
            assert not basis.binary or set(basis.values) <= {0.0, 1.0}
    for key, figure in figures.items():
        if figure.headline and not key[0].startswith(WITHOUT):
            assert key in bases, f"the headline {key} cannot be tested"
        words = set(key[0].replace("@", "/").split("/"))
        assert key in bases or words & UNTESTED or key[0].startswith(("gain/", "density/", "entropy/uniform")), key


def test_what_there_are_no_rows_of_has_no_outcomes(recorded: dict[str, tuple[Evaluator, Records]]) -> None:
    evaluator, records = recorded["shift"]
    clean = replace(records.of(lambda dataset: not dataset.severity), declared=records.declared)
    bases = evaluator.outcomes(clean)
    figures = {(figure.name, figure.group) for figure in evaluator.metrics(clean)}
    assert ("accuracy/clean", "clean") in bases and set(bases) <= figures


def test_kinds_of_tests(recorded: dict[str, tuple[Evaluator, Records]]) -> None:
    """McNemar's where an image has one row and a hit; never where several rows are versions of it."""
    bases = recorded["shift"][0].outcomes(recorded["shift"][1])

    def binary(name: str, group: str) -> bool:
        found = bases[name, group]
        assert isinstance(found, Outcomes)
        return found.binary

    assert binary("accuracy/clean", "clean") and binary("accuracy/contrast@s5", "contrast")
    assert not binary("accuracy/mean", "corruptions") and not binary("accuracy/contrast", "contrast")
    assert not binary("nll", "clean")
    areas = recorded["ood"][0].outcomes(recorded["ood"][1])["auroc/average/near", "near"]
    assert isinstance(areas, Areas) and set(areas.outside) == {"near-images", "closer"} and len(areas.scores) == 2


def rows_of(count: int, versions: int) -> Iterator[tuple[str, str, str]]:
    for version in range(versions):
        for image in range(count):
            yield f"v{version}", "plain", f"{image:03d}"


def test_rows_are_named_once_and_selected_by_dataset() -> None:
    names = list(rows_of(5, 3))
    columns = {
        name: np.array(values)
        for name, values in zip(("dataset", "origin", "sample"), zip(*names, strict=True), strict=True)
    }
    declared = tuple(Declared(f"v{version}", "plain", f"v{version}", version, 5, 5) for version in range(3))
    rows = Rows(Records(columns, declared))
    kept = rows.of(lambda dataset: dataset.severity > 0)
    assert kept.tolist() == [False] * 5 + [True] * 10
    hits = np.arange(15) % 2 == 0
    one, other = rows.outcomes(hits, kept), rows.outcomes(~hits, kept)
    assert one.samples is other.samples  # the same array: boards compare it but once
    assert one.samples[0] == "v1/000" and not one.binary
    assert one.clusters.tolist() == [0, 1, 2, 3, 4] * 2
    single = rows.outcomes(hits, rows.of(lambda dataset: dataset.severity == 1))
    assert single.binary and single.mean == 0.4
    # Sums by image, of the differences.
    gap = one.minus(other)
    np.testing.assert_array_equal(gap.sums, np.bincount(one.clusters, one.values - other.values))
    assert gap.value == pytest.approx(one.mean - other.mean)
    with pytest.raises(ValueError, match="10 and 5 rows"):
        one.minus(single)


def test_bases_are_made_when_they_are_asked_for() -> None:
    made: list[Outcomes] = []

    def make() -> Outcomes:
        made.append(Outcomes(np.array(["a"]), np.ones(1), np.zeros(1), True))
        return made[-1]

    found, key = Deferred({("accuracy", "clean"): make}), ("accuracy", "clean")
    assert list(found) == [key] and len(found) == 1 and not made
    assert found[key] is made[0] and found[key] is made[1]
