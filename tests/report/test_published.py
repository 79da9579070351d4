"""Published figures: their files against what they state of themselves and of each other, and where they are shown."""

from collections.abc import Callable
from math import isnan
from statistics import fmean
from typing import Any

import pandas as pd
import pytest

from robustbench_diffaug import runs
from robustbench_diffaug.baselines import BASELINES
from robustbench_diffaug.data.corruptions import COMMON
from robustbench_diffaug.report import published, tables
from robustbench_diffaug.report.published import Publication, publications, table

ROUNDING = 0.005 + 1e-9  # of two digits
NAMES = sorted(publications())
Manifest = dict[str, Any]


def slips(known: Publication) -> dict[tuple[str, str], tuple[float, float]]:
    """Printed numbers that are not what the table's own numbers give, found by recomputing all of them."""
    frame = pd.DataFrame([row.values for row in known.rows.values()], index=list(known.rows), columns=[*known.columns])
    found: dict[tuple[str, str], tuple[float, float]] = {}
    means = {
        name: (frame[list(mean.columns)].apply(lambda row: fmean(row), axis=1), mean.values)
        for name, mean in known.averages.items()
    }
    for name, (computed, printed) in means.items():
        found |= {(row, name): (p, c) for row, p, c in zip(known.rows, printed, computed, strict=True)}
    whole = frame.assign(**{name: computed for name, (computed, _) in means.items()})
    for name, mean in known.average_rows.items():
        assert len(mean.values) == len(whole.columns)
        own = [fmean(whole.loc[list(mean.rows), column]) for column in whole.columns]
        found |= {(name, str(c)): (p, v) for c, p, v in zip(whole.columns, mean.values, own, strict=True)}
    for difference in known.differences:
        pair = known.rows[difference.of].values, known.rows[difference.less].values
        gap = [one - other for one, other in zip(*pair, strict=True) if one is not None and other is not None]
        found |= {(difference.of, c): (p, v) for c, p, v in zip(known.columns, difference.values, gap, strict=True)}
    return {key: (printed, value) for key, (printed, value) in found.items() if abs(printed - value) > ROUNDING}


@pytest.mark.parametrize("name", NAMES)
def test_every_printed_average_and_difference_is_right_or_a_known_slip(name: str) -> None:
    known = publications()[name]
    assert {(s.row, s.column): s.printed for s in known.slips} == {k: p for k, (p, _) in slips(known).items()}
    for slip in known.slips:
        assert slip.is_ == pytest.approx(slips(known)[slip.row, slip.column][1], abs=6e-4)
        assert any(f"{slip.printed:g}" in remark and f"{slip.is_:g}" in remark for remark in known.remarks)


def test_the_check_finds_a_wrong_digit() -> None:
    known = publications()["diffaug-table1"]
    row = known.rows["AM"]
    wrong = row.model_copy(update={"values": (33.81, *row.values[1:])})  # two digits changed places
    changed = known.model_copy(update={"rows": {**known.rows, "AM": wrong}})
    assert slips(known) == {}
    assert {("AM", "c_average"), ("Avg", "c_dda"), ("Avg (No-DiffAug)", "c_dda")} <= slips(changed).keys()


def test_the_paper_s_own_slips_are_the_four_that_are_known() -> None:
    known = publications()["diffaug-table2"]
    assert [(slip.printed, slip.is_) for slip in known.slips] == [
        (14.85, 14.35), (2.56, 2.58), (20.90, 20.913), (21.35, 21.357)
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_files_say_where_figures_are_from_and_mean_figures_that_there_can_be(name: str) -> None:
    known = publications()[name]
    assert known.source.url.startswith("https://") and known.source.place and known.protocol
    for row in known.rows.values():
        for column, value in zip(known.columns.values(), row.values, strict=True):
            if value is not None and (column.unit or known.unit) in ("percent", "fraction"):
                assert 0 <= value <= (100 if (column.unit or known.unit) == "percent" else 1)
    for column in known.columns.values():
        assert bool(column.metric) == bool(column.data)
        if column.metric.startswith("mce/"):
            assert column.metric.removeprefix("mce/") in BASELINES


def test_what_two_sources_say_of_one_network_agrees() -> None:
    """OpenOOD's leaderboard against Table 3, ImageNet-C's against Table 1, and Table 2 against Table 1."""
    compared = 0
    for known in publications().values():
        for same in known.same_as:
            other = publications()[same.file]
            for here, there in same.columns.items():
                one = known.rows[same.row].values[list(known.columns).index(here)]
                two = other.rows[same.other].values[list(other.columns).index(there)]
                assert one == two is not None
                compared += 1
    assert compared == 9
    first, second = table("diffaug-table1"), table("diffaug-table2")
    assert second["c"]["resnet-standard"] == first["c_default"]["resnet-standard"]
    assert second["c"]["resnet-standard+diffaug"] == first["c_de"]["resnet-standard+diffaug"]


def test_a_table_has_the_names_of_the_zoo() -> None:
    found = table("diffaug-table3")
    assert found.index.tolist()[2:] == ["resnet-standard", "resnet-standard+diffaug"]
    assert found.T["resnet-standard"].tolist() == [78.17, 76.02, 77.38, 81.36, 78.23]
    with pytest.raises(ValueError, match="no published table is called 'diffaug-table5'; did you mean"):
        table("diffaug-table5")


def entry(bench: str, kind: str, name: str, group: str = "", severity: int = 0) -> dict[str, object]:
    return {"bench": bench, "kind": kind, "name": name, "group": group or name, "severity": severity}


def corrupted(bench: str, kind: str, severities: tuple[int, ...] = (5,)) -> list[dict[str, object]]:
    return [entry(bench, kind, f"x/{c}@s{s}", c, s) for c in COMMON for s in severities]


def made(bench: str, metric: str, group: str, unit: str = "fraction", better: str = "higher") -> dict[str, object]:
    return {"suite": "s", "bench": bench, "evaluator": "e", "checkpoint": "mine", "group": group, "metric": metric,
            "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "n_available": 9, "better": better, "unit": unit,
            "complete": True, "headline": True}  # fmt: skip


def figures(*rows: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame([made(*row) for row in rows])


@pytest.fixture
def imagenet() -> tuple[pd.DataFrame, Manifest]:
    """A run of the ten classifiers' suite, as its manifest and metrics are."""
    manifest = {
        "checkpoints": [{"id": "mine", "classes": 1000}],
        "datasets": [entry("ensemble", "imagenet", "clean"), *corrupted("ensemble", "imagenet")],
    }
    names = [f"{mode}accuracy/{what}" for mode in ("", "de/") for what in ("mean", "clean")]
    return figures(*(("ensemble", n, "corruptions" if "mean" in n else "clean") for n in names)), manifest


def test_imagenet_boards_show_the_papers_rows_of_what_was_measured(imagenet: tuple[pd.DataFrame, Manifest]) -> None:
    found = published.rows(*imagenet)
    assert list(found.columns) == published.COLUMNS
    assert set(found["published"]) == {
        "diffaug-table1", "diffaug-table2", "robustbench-imagenet-c", "robustness-imagenet-c"
    }  # fmt: skip
    at = {(row["published"], row["checkpoint"], row["metric"]): row for row in found.to_dict("records")}
    shown = at["diffaug-table1", "AM+DiffAug", "de/accuracy/mean"]
    assert (shown["value"], shown["printed"], shown["bench"]) == (0.3858, "38.58", "ensemble")
    assert isnan(shown["low"]) and isnan(shown["n"]) and not shown["headline"]
    assert at["diffaug-table2", "RN50+DiffAug/DE", "de/accuracy/mean"]["value"] == 0.3222
    assert ("diffaug-table2", "RN50+DiffAug/DE", "accuracy/mean") not in at
    assert at["robustbench-imagenet-c", "Standard_R50", "accuracy/mean"]["value"] == 0.1809  # not 39.48, of all
    assert not found["metric"].str.startswith("dda").any()
    assert not found.duplicated(["published", "checkpoint", "metric"]).any()


def test_published_rows_are_in_no_leaderboard(imagenet: tuple[pd.DataFrame, Manifest]) -> None:
    both = pd.concat([imagenet[0], published.rows(*imagenet)[imagenet[0].columns]])
    assert set(tables.headlines(both)[0].rows["checkpoint"]) == {"mine"}


def test_the_page_of_an_imagenet_run_shows_them(imagenet: tuple[pd.DataFrame, Manifest]) -> None:
    metrics, manifest = imagenet
    page = runs.rendered(metrics, tables.leaderboard(metrics), pd.DataFrame(), manifest)["index.html"].decode()
    assert "AM+DiffAug" in page and "https://arxiv.org/abs/2306.09192" in page and "0.3858" in page
    other = runs.rendered(metrics, tables.leaderboard(metrics), pd.DataFrame(), {})["index.html"].decode()
    assert "AM+DiffAug" not in other


def _of_other_severities(manifest: Manifest) -> None:
    manifest["datasets"][1:] = corrupted("ensemble", "imagenet", (1, 2, 3))


def _of_fewer_corruptions(manifest: Manifest) -> None:
    del manifest["datasets"][3]


def _computed_in_memory(manifest: Manifest) -> None:
    manifest["datasets"][1:] = corrupted("ensemble", "corrupted")


def _of_another_set(manifest: Manifest) -> None:
    for dataset in manifest["datasets"]:
        dataset["kind"] = "folder"


@pytest.mark.parametrize("change", [_of_other_severities, _of_fewer_corruptions, _computed_in_memory, _of_another_set])
def test_other_protocols_have_no_published_corruption_means(
    imagenet: tuple[pd.DataFrame, Manifest], change: Callable[[Manifest], None]
) -> None:
    metrics, manifest = imagenet
    change(manifest)
    assert "accuracy/mean" not in set(published.rows(metrics, manifest)["metric"])


def test_a_run_of_five_severities_has_both_means() -> None:
    manifest = {"checkpoints": [], "datasets": corrupted("b", "imagenet", (1, 2, 3, 4, 5))}
    names = ("accuracy/mean", "accuracy/mean@s5", "mce/robustbench-alexnet", "mce/hendrycks-alexnet")
    found = published.rows(figures(*(("b", name, "corruptions") for name in names)), manifest)
    at = found.set_index(["published", "checkpoint", "metric"])["value"]
    assert at["robustbench-imagenet-c", "Standard_R50", "accuracy/mean"] == 0.3948
    assert at["robustbench-imagenet-c", "Standard_R50", "accuracy/mean@s5"] == 0.1809
    assert at["diffaug-table1", "RN50", "accuracy/mean@s5"] == 0.1787
    assert ("diffaug-table1", "RN50", "accuracy/mean") not in at.index
    assert at["robustbench-imagenet-c", "Standard_R50", "mce/robustbench-alexnet"] == 0.7638
    assert at["robustness-imagenet-c", "ResNet-50", "mce/hendrycks-alexnet"] == 0.767


def test_sets_made_after_imagenet_are_told_by_their_names() -> None:
    datasets = [entry("b", "imagenet", f"imagenet-{variant}") for variant in ("r", "sketch", "a")]
    metrics = figures(*(("b", f"accuracy/{d['name']}", str(d["name"])) for d in datasets))
    found = published.rows(metrics, {"datasets": datasets}).set_index(["checkpoint", "metric"])["value"]
    assert found["RN50", "accuracy/imagenet-r"] == 0.3616
    assert found["RN50", "accuracy/imagenet-sketch"] == 0.2409
    assert found["RN50+Synth", "accuracy/imagenet-a"] == 0.0063
    assert len(found) == 6  # the two plain networks, and none of the validation set


@pytest.mark.parametrize(("classes", "shown"), [(10, True), (100, False)])
def test_cifar_10_is_not_cifar_100(classes: int, shown: bool) -> None:
    manifest = {"checkpoints": [{"classes": classes}], "datasets": corrupted("b", "cifar-c-part", (1, 2, 3, 4, 5))}
    found = published.rows(figures(("b", "accuracy/mean", "corruptions")), manifest)
    assert found["value"].tolist() == ([0.7346, 0.8882, 0.8909] if shown else [])


def test_openood_boards_are_told_by_their_sets() -> None:
    sets = {"near": ("ssb_hard", "ninco"), "far": ("inaturalist", "textures", "openimage_o")}
    datasets = [entry("ood", "imglist", name, role) for role, names in sets.items() for name in names]
    metrics = figures(("ood", "auroc/msp/near", "near"), ("ood", "auroc/msp/far", "far"), ("ood", "accuracy", "id"))
    at = published.rows(metrics, {"datasets": datasets}).set_index(["published", "checkpoint", "metric"])["value"]
    assert (
        at["openood-imagenet", "ResNet50", "auroc/msp/near"] == 0.7602 == at["diffaug-table3", "RN50", "auroc/msp/near"]
    )
    assert at["openood-imagenet", "ResNet50", "accuracy"] == 0.7618
    less = published.rows(metrics, {"datasets": datasets[1:]})
    assert set(less["metric"]) == {"auroc/msp/far"}


@pytest.mark.parametrize(
    "manifest", [{}, {"datasets": 3}, {"datasets": [1, {}, {"bench": []}], "checkpoints": [{"classes": []}]}]
)
def test_a_manifest_that_says_nothing_gives_no_rows(manifest: Manifest) -> None:
    found = published.rows(figures(("b", "accuracy/mean", "corruptions")), manifest)
    assert found.empty and list(found.columns) == published.COLUMNS
