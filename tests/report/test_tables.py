"""Ranks against their definition, the leaderboard's columns, and files that read back what was written."""

import csv
import io
from math import inf, isnan, nan

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_diffaug.report import tables
from tests.report.conftest import CHECKPOINTS, CORRUPTIONS, HEADLINES, row

quick = settings(deadline=None, max_examples=60)  # a busy machine is no failure

Interval = tuple[float, float]
ends = st.one_of(st.integers(0, 8).map(float), st.sampled_from([nan, inf, -inf]))


def ordered(low: float, high: float) -> Interval:
    """An interval of two ends in any order."""
    return (high, low) if low > high else (low, high)


def places(intervals: list[Interval], chosen: int, better: str) -> tuple[int, int]:
    """The definition, spelled out: who is strictly better than whom."""

    def beats(one: Interval, other: Interval) -> bool:
        return one[0] > other[1] if better == "higher" else one[1] < other[0]

    mine = intervals[chosen]
    return 1 + sum(beats(other, mine) for other in intervals), sum(not beats(mine, other) for other in intervals)


@quick
@given(st.lists(st.builds(ordered, ends, ends), min_size=1, max_size=9), st.sampled_from(["higher", "lower"]))
def test_ranks_are_those_of_the_definition(intervals: list[Interval], better: str) -> None:
    low, high = (np.array(side) for side in zip(*intervals, strict=True))
    found = tables.rank_ranges(low, high, better)
    assert found == [places(intervals, index, better) for index in range(len(intervals))]
    assert all(1 <= first <= last <= len(intervals) for first, last in found)


@quick
@given(st.permutations(range(6)), st.sampled_from(["higher", "lower"]))
def test_separate_intervals_are_ranked_in_order(order: list[int], better: str) -> None:
    low = np.array(order, dtype=float)
    found = tables.rank_ranges(low, low + 0.5, better)
    best_first = np.argsort(-low if better == "higher" else low)
    assert [found[index] for index in best_first] == [(place, place) for place in range(1, 7)]


def test_touching_intervals_and_missing_ones_are_not_told_apart() -> None:
    found = tables.rank_ranges(np.array([0.0, 1.0, nan]), np.array([1.0, 2.0, nan]), "higher")
    assert found == [(1, 3)] * 3


def test_another_word_for_better_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'higher' or 'lower'"):
        tables.rank_ranges(np.zeros(2), np.ones(2), "more")


def test_leaderboard_has_a_row_per_checkpoint_and_four_columns_per_headline(metrics: pd.DataFrame) -> None:
    board = tables.leaderboard(metrics)
    names = list(board.columns[1::4])
    assert list(board["checkpoint"]) == list(CHECKPOINTS)
    assert set(names) == {
        "accuracy/clean", "accuracy/digits", "accuracy/mean", "de/accuracy/mean", "de/gain/mean",
        "certified@0.50[sigma=0.25]", "certified@0.50[sigma=0.50]", "acr[sigma=0.25]", "acr[sigma=0.50]",
    }  # fmt: skip
    for name in names:
        metric, _, group = name.rstrip("]").partition("[")
        rows = metrics[(metrics["metric"] == metric) & (not group or metrics["group"] == group)]
        for end, column in (("", "value"), ("_low", "low"), ("_high", "high")):
            assert list(board[f"{name}{end}"]) == list(rows[column])
        intervals = list(zip(rows["low"], rows["high"], strict=True))
        expected = [places(intervals, index, "higher") for index in range(4)]
        assert list(board[f"{name}_rank"]) == [str(m) if m == k else f"{m}-{k}" for m, k in expected]
    assert set(HEADLINES) == {name.partition("[")[0] for name in names}


def test_missing_and_partial_values_have_no_rank_and_count_for_nobody() -> None:
    rows = [
        row("a", "accuracy/clean", "clean", 0.9, 0.01, complete=False),
        row("b", "accuracy/clean", "clean", 0.5, 0.01),
        row("c", "accuracy/digits", "digits", 0.5, 0.01),
        row("d", "accuracy/clean", "clean", nan, 0.0),
        row("e", "accuracy/clean", "clean", 0.3, 0.01),
    ]
    board = tables.leaderboard(pd.DataFrame(rows)).set_index("checkpoint")
    assert board["accuracy/clean_rank"].to_dict() == {"a": "", "b": "1", "c": "", "d": "", "e": "2"}
    assert board["accuracy/clean"]["a"] == 0.9
    assert isnan(board["accuracy/clean"]["c"])
    written = tables.to_csv(board.reset_index()).decode().splitlines()
    assert written[3] == "c,,,,,0.5,0.49,0.51,1"


def test_two_benches_with_one_name_are_told_apart() -> None:
    made = [row("a", "accuracy/clean", "clean", 0.5, 0.1, bench=bench) for bench in ("small", "large")]
    made.append(row("a", "acr", "sigma=0.25", 0.5, 0.1, bench="small"))
    columns = tables.leaderboard(pd.DataFrame(made)).columns
    assert [*columns[1::4]] == ["small:accuracy/clean", "large:accuracy/clean", "acr"]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([row("a", "acr", "s", 1, 0.1), row("a", "acr", "s", 2, 0.1)], "several values for checkpoint 'a'"),
        ([row("a", "acr", "s", 1, 0.1), row("a", "acr_low", "s", 2, 0.1, headline=True)], "two columns 'acr_low'"),
    ],
)
def test_what_cannot_be_one_table_is_refused(rows: list[dict[str, object]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tables.leaderboard(pd.DataFrame(rows))


def test_nothing_measured_makes_an_empty_leaderboard(metrics: pd.DataFrame) -> None:
    assert tables.leaderboard(metrics.head(0)).shape == (0, 1)


def test_wide_is_the_long_form_turned(metrics: pd.DataFrame) -> None:
    table = tables.wide(metrics, r"accuracy/(?P<corruption>.+)@s5", "checkpoint", "corruption")
    assert tuple(table.index) == CHECKPOINTS
    assert tuple(table.columns) == CORRUPTIONS
    rows = metrics[metrics["metric"].str.endswith("@s5") & ~metrics["metric"].str.startswith("de/")]
    assert all(table.loc[r["checkpoint"], r["group"]] == r["value"] for _, r in rows.iterrows())
    with pytest.raises(ValueError, match="duplicate"):
        tables.wide(metrics, r"(?P<kind>accuracy)/.+", "checkpoint", "kind")


def test_a_group_that_took_no_part_is_the_empty_text(metrics: pd.DataFrame) -> None:
    found = tables.matching(metrics, r"(?:(?P<mode>de)/)?ece")
    assert set(found["mode"]) == {"", "de"}
    assert len(found) == 16


def rows_of(data: bytes) -> list[list[str]]:
    """What the csv module reads."""
    return list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@quick
@given(st.lists(st.tuples(texts, st.floats(), st.integers(-(2**53), 2**53)), max_size=8))
def test_csv_reads_back_every_number_and_text(found: list[tuple[str, float, int]]) -> None:
    data = tables.to_csv(pd.DataFrame(found, columns=["text", "float", "integer"]))
    header, *rows = rows_of(data)
    assert header == ["text", "float", "integer"]
    for (text, number, integer), (read_text, read_number, read_integer) in zip(found, rows, strict=True):
        assert read_text == (f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else text)
        assert isnan(number) and read_number == "" if isnan(number) else float(read_number) == number
        assert int(read_integer) == integer


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_text_is_a_formula_but_numbers_stay_numbers(text: str) -> None:
    data = tables.to_csv(pd.DataFrame({text: [text], "number": [-1.5]}))
    assert rows_of(data) == [[f"'{text}", "number"], [f"'{text}", "-1.5"]]


def test_metrics_survive_csv_and_parquet_and_give_the_same_bytes_twice(metrics: pd.DataFrame) -> None:
    assert tables.to_csv(metrics) == tables.to_csv(metrics.copy())
    assert tables.to_parquet(metrics) == tables.to_parquet(metrics.copy())
    assert b"\r" not in tables.to_csv(metrics)
    header, *rows = rows_of(tables.to_csv(metrics))
    read = pd.DataFrame(rows, columns=header)
    for column in metrics.columns:
        if metrics[column].dtype == np.float64:
            read[column] = [float(text) if text else nan for text in read[column]]
    pd.testing.assert_frame_equal(read, metrics.astype(read.dtypes), check_exact=True)
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(tables.to_parquet(metrics))), metrics, check_exact=True)
