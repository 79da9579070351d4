"""All pairs of a board: their tests against textbooks, on common samples alone, and the places that they leave open."""

from collections.abc import Mapping
from itertools import combinations
from math import isnan, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from scipy.stats import t as student

from robustbench_diffaug import runs
from robustbench_diffaug.outcomes import Areas, Basis, Outcomes
from robustbench_diffaug.pairs import ALPHA, COLUMNS, MOST, Pairs, common, difference, places
from robustbench_diffaug.records import Metric
from robustbench_diffaug.report import tables
from robustbench_diffaug.rng import key, uniform
from robustbench_diffaug.suite import load

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)

Floats = NDArray[np.float64]


def named(rows: NDArray[Any] | range) -> NDArray[np.str_]:
    return np.array([f"d/{row:05d}" for row in rows])


def hits(values: NDArray[np.bool_], rows: range | None = None) -> Outcomes:
    """One row an image."""
    count = np.arange(len(values))
    return Outcomes(named(rows or range(len(values))), values.astype(float), count, binary=True)


def versions(values: Floats) -> Outcomes:
    """Some versions of each image, values of shape (images, versions)."""
    images, count = values.shape
    return Outcomes(named(range(images * count)), values.ravel(), np.arange(images).repeat(count), binary=False)


def drawn(name: str, checkpoints: int, images: int, more: int = 1, level: float = 0.7) -> NDArray[np.bool_]:
    """Checkpoints that are right equally often, on images whose hardness they share; of shape (c, images, more)."""
    ((shared, own, noise),) = (uniform(key("pairs", name), range(1), (3, checkpoints, images, more)),)[0]
    return np.asarray((0.5 * shared[:1, :, :1] + 0.25 * own[:, :, :1] + 0.25 * noise) < level)


def metric(name: str, value: float, **more: Any) -> Metric:
    return Metric(name, "clean", value, headline=True, **more)


# --- tests of one pair


def test_decisions_have_mcnemars_test() -> None:
    a, b = drawn("decisions", 2, 300)[..., 0]
    found = difference(hits(a), hits(b))
    assert found is not None and found.discordant is not None
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert found.discordant == (only_a, only_b) and found.test == "McNemar exact" and found.n == 300
    assert found.p == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)
    assert (found.a, found.b) == (a.mean(), b.mean())
    assert found.difference.value == pytest.approx(a.mean() - b.mean())
    assert found.difference.low < found.difference.value < found.difference.high


def test_versions_have_the_clustered_test() -> None:
    values = drawn("versions", 2, 90, 6).astype(float)
    found = difference(versions(values[0]), versions(values[1]))
    assert found is not None and found.test == "z clustered by image" and found.n == 90
    gap = (values[0] - values[1]).mean(axis=1)
    error = gap.std(ddof=1) / sqrt(90)
    assert found.error == pytest.approx(error)
    assert found.p == pytest.approx(2 * student.sf(abs(gap.mean()) / error, 89))


def scores_of(name: str, inside: int, outside: dict[str, int], shift: float, hard: float = 0.6) -> list[Areas]:
    """Two checkpoints whose scores of an image are alike."""
    rows = named(range(inside + sum(outside.values())))
    parts = np.repeat(np.arange(len(outside) + 1), [inside, *outside.values()])
    common, *own = uniform(key("scores", name), range(1), (3, len(rows)))[0]
    made = [
        np.round(hard * common + (1 - hard) * one + (shift + more) * (parts == 0), 2)
        for one, more in zip(own, (0, 0.1), strict=True)
    ]
    return [Areas(rows, (column,), parts, tuple(outside)) for column in made]


def textbook(pair: list[Areas], outside: dict[str, int]) -> tuple[float, float, float]:
    """DeLong, DeLong and Clarke-Pearson's difference, error and two-sided p, from all m n comparisons."""
    inner: list[Floats] = []
    outer: list[list[Floats]] = []
    for areas in pair:
        column = areas.scores[0]
        kernels = []
        for number in range(1, len(outside) + 1):
            x, y = column[areas.parts == 0][:, None], column[areas.parts == number][None, :]
            kernels.append((x > y) + 0.5 * (x == y))
        inner.append(np.mean([kernel.mean(axis=1) for kernel in kernels], axis=0))
        outer.append([kernel.mean(axis=0) / len(kernels) for kernel in kernels])
    n, gap = len(inner[0]), float(inner[0].mean() - inner[1].mean())
    matrix = np.cov(np.stack(inner))  # S_10
    pieces = [(matrix[0, 0] + matrix[1, 1] - 2 * matrix[0, 1]) / n]
    for one, other in zip(*outer, strict=True):
        matrix = np.cov(np.stack([one, other]))  # S_01
        pieces.append((matrix[0, 0] + matrix[1, 1] - 2 * matrix[0, 1]) / len(one))
    error = sqrt(sum(pieces))
    sizes = [n, *outside.values()]
    free = sum(pieces) ** 2 / sum(piece**2 / (size - 1) for piece, size in zip(pieces, sizes, strict=True))
    return gap, error, float(2 * student.sf(abs(gap) / error, free))


@pytest.mark.parametrize("outside", [{"near": 70}, {"near": 60, "other": 35}])
def test_areas_have_delongs_test(outside: dict[str, int]) -> None:
    pair = scores_of(f"areas{len(outside)}", 80, outside, 0.25)
    found = difference(pair[0], pair[1])
    assert found is not None and found.test == "DeLong" and found.n == 80 + sum(outside.values())
    gap, error, p = textbook(pair, outside)
    assert (found.difference.value, found.error, found.p) == pytest.approx((gap, error, p), rel=1e-9)
    assert found.a == pytest.approx(pair[0].placements.value) and found.difference.low < gap < found.difference.high


def test_perfect_areas_are_told_apart_by_no_zero_width() -> None:
    for shift in (3.0, -3.0):
        one, other = scores_of("perfect", 30, {"near": 30}, shift)
        found = difference(one, other)
        assert found is not None and found.p == 1 and found.difference.value == 0
        assert found.difference.low < -0.05 and found.difference.high > 0.05


@quick
@given(st.integers(0, 3), st.integers(0, 40), st.integers(0, 40), st.randoms(use_true_random=False))
def test_pairs_are_of_common_samples(seed: int, first: int, last: int, shuffled: Any) -> None:
    """Rows are found by their names, in any order; what only one has is left out."""
    a, b = drawn(f"common{seed}", 2, 80)[..., 0]
    order = list(range(80 - last))
    shuffled.shuffle(order)
    one, whole = hits(a).on(np.arange(first, 80)), hits(b)
    other = whole.on(np.array(order, dtype=np.intp))
    found, expected = (
        difference(one, other),
        difference(hits(a[first : 80 - last]), hits(b[first : 80 - last])) if first + last < 80 else None,
    )
    if expected is None:
        assert found is None
    else:
        assert found is not None and found._replace(n=0) == expected._replace(n=0) and found.n == 80 - first - last


def test_areas_of_common_samples() -> None:
    one, other = scores_of("cut", 60, {"near": 40}, 0.2)
    kept = np.r_[5:60, 70:100]
    found = difference(one, other.on(kept[::-1]))
    assert found == difference(one.on(kept), other.on(kept))
    assert difference(one, other.on(np.arange(60))) is None  # there is nothing outside


def test_what_cannot_be_paired_is_refused() -> None:
    a = drawn("refused", 1, 20)[0, :, 0]
    twice = hits(a).on(np.r_[0:20, 3])
    with pytest.raises(ValueError, match="sample d/00003 is there 2 times"):
        common(twice, hits(a))
    with pytest.raises(ValueError, match="a mean and an area"):
        difference(hits(a), scores_of("mixed", 10, {"near": 10}, 0.2)[0])
    assert difference(hits(a), hits(a, range(100, 120))) is None


# --- families and places


def family(bases: Mapping[str, Basis], name: str = "accuracy") -> pd.DataFrame:
    tests = Pairs()
    for checkpoint, basis in bases.items():
        tests.add("bench", checkpoint, [metric(name, basis.mean)], {(name, "clean"): basis})
    return tests.table()


def test_a_family_is_all_pairs_after_holm() -> None:
    from statsmodels.stats.multitest import multipletests

    values = drawn("family", 6, 200)[..., 0]
    values[1] |= drawn("more", 1, 200, level=0.35)[0, :, 0]
    values[2] &= drawn("less", 1, 200, level=0.6)[0, :, 0]
    found = family({f"c{number}": hits(row) for number, row in enumerate(values)})
    assert list(found.columns) == COLUMNS
    assert list(zip(found["a"], found["b"], strict=True)) == list(combinations([f"c{n}" for n in range(6)], 2))
    expected = [difference(hits(values[i]), hits(values[j])) for i, j in combinations(range(6), 2)]
    assert found["p"].tolist() == [one.p for one in expected if one]
    np.testing.assert_allclose(found["p_holm"], multipletests(found["p"], method="holm")[1])
    assert (found["p_holm"] <= ALPHA).any() and (found["p_holm"] > ALPHA).any()
    assert set(found["n"]) == {200} and set(found["test"]) == {"McNemar exact"}
    assert (found["low"] < found["difference"]).all() and (found["difference"] < found["high"]).all()


def brute(winners: set[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The definition, spelled out."""
    return [
        (1 + sum((j, i) in winners for j in range(size)), sum((i, j) not in winners for j in range(size)))
        for i in range(size)
    ]


@quick
@given(st.integers(1, 6), st.data(), st.sampled_from(["higher", "lower"]))
def test_places_are_those_of_the_definition(size: int, data: st.DataObject, better: str) -> None:
    rows, winners = [], set()
    for i, j in combinations(range(size), 2):
        gap, p = data.draw(st.sampled_from([-0.2, 0.0, 0.3])), data.draw(st.sampled_from([0.0, 0.05, 0.051, 1.0]))
        rows.append({"a": f"c{i}", "b": f"c{j}", "difference": gap, "p_holm": p})
        if p <= 0.05 and gap:
            winners.add((i, j) if (gap > 0) == (better == "higher") else (j, i))
    table = pd.DataFrame(rows, columns=["a", "b", "difference", "p_holm"])
    assert places(table, [f"c{i}" for i in range(size)], better) == brute(winners, size)
    if size > 2:
        assert places(table.iloc[1:], [f"c{i}" for i in range(size)], better) is None
        part = places(table, [f"c{i}" for i in range(size - 1)], better)  # who is not ranked counts for nobody
        assert part == brute({pair for pair in winners if size - 1 not in pair}, size - 1)


def test_the_leaderboard_takes_places_from_tests_and_else_from_intervals() -> None:
    values = drawn("board", 3, 400)[..., 0]
    values[0] |= drawn("board more", 1, 400, level=0.5)[0, :, 0]
    bases = {f"c{number}": hits(row) for number, row in enumerate(values)}
    rows = [
        {"bench": "bench", "checkpoint": id, "group": "clean", "metric": name, "value": basis.mean, "low": low,
         "high": low + 0.1, "n": 400, "n_available": 400, "better": "higher", "unit": "fraction", "complete": True,
         "headline": True}
        for name in ("accuracy", "frechet") for (id, basis), low in zip(bases.items(), (0.1, 0.3, 0.5), strict=True)
    ]  # fmt: skip
    metrics = pd.DataFrame(rows)
    board = tables.leaderboard(metrics, family(bases)).set_index("checkpoint")
    assert board["accuracy_rank"].tolist() == ["1", "2-3", "2-3"]  # intervals would say otherwise
    assert board["frechet_rank"].tolist() == ["3", "2", "1"]
    metrics.loc[(metrics["metric"] == "accuracy") & (metrics["checkpoint"] == "c1"), "complete"] = False
    board = tables.leaderboard(metrics, family(bases)).set_index("checkpoint")
    assert board["accuracy_rank"].tolist() == ["1", "", "2"]
    untested = family({id: basis for id, basis in bases.items() if id != "c2"})
    assert tables.leaderboard(metrics, untested)["accuracy_rank"].tolist() == ["2", "", "1"]


@pytest.mark.parametrize(("images", "more"), [(60, 1), (60, 5), (400, 5)])
def test_family_wise_error(images: int, more: int, full: bool) -> None:
    """Among checkpoints that are equally good, a place other than "1 to c" is seen in at most 5 % of runs."""
    size, runs_ = (8, 1000) if full else (6, 120)
    wrong = 0
    for run in range(runs_):
        values = drawn(f"null {images} {more} {run}", size, images, more)
        bases = {
            f"c{n}": hits(rows[:, 0]) if more == 1 else versions(rows.astype(float)) for n, rows in enumerate(values)
        }
        found = places(family(bases), list(bases), "higher")
        wrong += found != [(1, size)] * size
    assert wrong / runs_ <= 0.05 + 2.6 * sqrt(0.05 * 0.95 / runs_)


def test_real_differences_are_found() -> None:
    values = drawn("power", 4, 500, 5)
    better = values | drawn("better", 4, 500, 5, level=0.4)
    bases: dict[str, Basis] = {"a": versions(better[0].astype(float)), "b": versions(values[1].astype(float))}
    bases["c"] = versions(better[2].astype(float))
    assert places(family(bases), ["a", "b", "c"], "higher") == [(1, 2), (3, 3), (1, 2)]
    assert places(family(bases), ["a", "b", "c"], "lower") == [(2, 3), (1, 1), (2, 3)]


# --- what a run collects


def test_ten_headlines_are_tested_the_first_that_can_be() -> None:
    a, b = drawn("ten", 2, 30)[..., 0]
    tests = Pairs()
    names = [f"m{number:02d}" for number in range(MOST + 3)]
    for id, rows in (("a", a), ("b", b)):
        bases = {(name, "clean"): hits(rows) for name in names if name != "m01"}
        figures = [metric(name, float(rows.mean())) for name in names]
        figures[2] = Metric("m02", "clean", float(rows.mean()))  # no headline
        tests.add("bench", id, figures, bases)
    assert list(tests.table()["metric"]) == [name for name in names if name not in ("m01", "m02")][:MOST]
    assert len(tests.names) == 1  # of all checkpoints and figures


def test_outcomes_that_are_not_the_figure_are_refused() -> None:
    rows = drawn("wrong", 1, 30)[0, :, 0]
    with pytest.raises(ValueError, match="the outcomes of accuracy have the mean"):
        Pairs().add("bench", "a", [metric("accuracy", float(rows.mean()) + 0.01)], {("accuracy", "clean"): hits(rows)})


def test_no_pairs_make_an_empty_table() -> None:
    assert Pairs().table().shape == (0, len(COLUMNS))
    assert tables.pairs_of(tables.to_csv(Pairs().table())).shape == (0, len(COLUMNS))
    alone = family({"a": hits(drawn("alone", 1, 9)[0, :, 0])})
    assert len(alone) == 0


def test_the_file_reads_back() -> None:
    values = drawn("file", 2, 50)[..., 0]
    table = family({"=cmd()": hits(values[0]), "b": hits(values[1])})
    table.loc[0, "low"], table.loc[0, "high"] = -np.inf, nan
    written = tables.to_csv(table)
    assert b"\nbench,accuracy,clean,'=cmd(),b,50," in written
    back = tables.pairs_of(written)
    assert back["a"].tolist() == ["=cmd()"] and back["n"].tolist() == [50]
    assert back["low"].tolist() == [-np.inf] and isnan(back["high"][0])
    assert tables.to_csv(back) == written


SMOKE = (Path(__file__).parent.parent / "suites/smoke.yaml").read_text()


def smoke(folder: Path, benches: int) -> Path:
    """The first benches of the smoke suite, without the ensemble."""
    data = yaml.safe_load(SMOKE)
    data["benches"] = data["benches"][:benches]
    data["benches"][0]["evaluator"]["modes"] = ["default"]
    data["benches"][-1]["evaluator"] |= {"n": 32, "sigmas": [0.25]} if benches > 1 else {}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_run_writes_its_pairs_and_verify_makes_them_again(tmp_path: Path, rdiff: Any) -> None:
    loaded, options = load(str(smoke(tmp_path, 1))), runs.Options(tmp_path / "run")
    done = runs.execute(loaded, options)
    written = (options.root / "pairs.csv").read_bytes()
    pairs = tables.pairs_of(written)
    values = done.metrics.set_index(["bench", "metric", "group", "checkpoint"])["value"]
    assert list(pairs["metric"]) == ["accuracy/clean", "accuracy/mean"]
    for row in pairs.to_dict("records"):
        for side in ("a", "b"):
            assert row[f"{side}_value"] == values[row["bench"], row["metric"], row["group"], row[side]]
    assert "  pairs.csv\n" in (options.root / "digests.txt").read_text()
    # The leaderboard's places are those of the tests, as they are of the run that had nothing to do.
    again = runs.execute(loaded, options)
    assert again.computed == 0 and again.leaderboard.equals(done.leaderboard)
    assert pairs["p_holm"][1] <= ALPHA and list(done.leaderboard["accuracy/mean_rank"]) == ["1", "2"]
    (options.root / "pairs.csv").write_bytes(written.replace(b"McNemar exact", b"McNemar guess", 1))
    code, out, _ = rdiff("verify", str(options.root))
    assert code == 1 and "test is McNemar guess, the records give McNemar exact" in out
    (options.root / "pairs.csv").unlink()
    code, out, _ = rdiff("verify", str(options.root))
    assert code == 1 and "pairs.csv is not there; rdiff report RUN writes it" in out
    assert rdiff("report", str(options.root))[0] == 0
    assert (options.root / "pairs.csv").read_bytes() == written


def test_outcomes_that_fail_cost_no_other_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustbench_diffaug.evaluators.smoothing import Smoothing

    def fail(self: Smoothing, records: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr(Smoothing, "outcomes", fail)
    done = runs.execute(load(str(smoke(tmp_path, 2))), runs.Options(tmp_path / "run"))
    assert [failure["reason"] for failure in done.failures] == [
        "its figures cannot be tested in pairs: RuntimeError: no luck"
    ] * 2
    assert "certified@0.25" in set(done.metrics["metric"]) and done.leaderboard["certified@0.25_rank"].tolist() != [
        "",
        "",
    ]
    assert runs.recorded_failures({"failures": done.failures}) == []
    pairs = tables.pairs_of((tmp_path / "run/pairs.csv").read_bytes())
    assert set(pairs["bench"]) == {"shift"}
