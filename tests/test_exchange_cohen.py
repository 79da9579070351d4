"""Certificates of locuslab's form: read as its analyze.py reads them, doubted where due, and written for it to read."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from robustbench_diffaug.exchange import cohen
from robustbench_diffaug.exchange.cohen_findings import findings, unattained
from robustbench_diffaug.exchange.cohen_rows import COLUMNS, Protocol, Rows, read

# Rows of data/certify/imagenet/resnet50/noise_1.00/test/sigma_1.00 and of cifar10/resnet110/noise_1.00/test/sigma_1.00
# of locuslab/smoothing 78a4d94, as they are.
FOLDER = Path(__file__).parent / "exchange"
IMAGENET, CIFAR10 = FOLDER / "locuslab_imagenet.tsv", FOLDER / "locuslab_cifar10.tsv"

HEADER = "\t".join(COLUMNS) + "\n"
ROW = (0, 3, 3, 0.5, 1, "0:00:01.5")
Command = Callable[..., tuple[int, str, str]]


def written(path: Path, rows: Iterable[tuple[object, ...]]) -> Path:
    path.write_text(HEADER + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def radii_file(path: Path, radii: Iterable[object]) -> Rows:
    """A file of right certificates with these radii."""
    return read(written(path, [(i, 3, 3, radius, 1, "0:00:01") for i, radius in enumerate(radii)]))


def analyzed(path: Path, radius: float) -> float:
    """What `ApproximateAccuracy` of locuslab's analyze.py says."""
    frame = pd.read_csv(path, delimiter="\t")
    return float((frame["correct"] & (frame["radius"] >= radius)).mean())


def value(frame: pd.DataFrame, metric: str, of: str = "value") -> float:
    rows = frame[frame["metric"] == metric]
    assert len(rows) == 1
    return float(rows[of].iloc[0])


def radius_by_core(votes: int, n: int, alpha: float, sigma: float) -> float:
    """`Smooth.certify` of locuslab's core.py."""
    return float(sigma * norm.ppf(proportion_confint(votes, n, alpha=2 * alpha, method="beta")[0]))


def test_figures_are_those_of_analyze(tmp_path: Path) -> None:
    done = cohen.import_run(IMAGENET, tmp_path / "run", Protocol(1.0))
    found = done.folder.metrics
    assert set(found["group"]) == {"sigma=1"}
    frame = pd.read_csv(IMAGENET, delimiter="\t")
    radii = [0, 0.25, 0.5, 1, 1.25, 2.5, 3.25, 3.75]
    for radius in radii:
        name = f"certified@{radius:.2f}"
        assert value(found, name) == analyzed(IMAGENET, radius)
        hits = round(analyzed(IMAGENET, radius) * 20)
        low, high = proportion_confint(hits, 20, method="beta")
        assert value(found, name, "low") == pytest.approx(low, abs=1e-12)
        assert value(found, name, "high") == pytest.approx(high, abs=1e-12)
    assert "certified@4.00" not in set(found["metric"])  # none goes that far
    assert value(found, "abstain") == 2 / 20
    assert value(found, "acr") == pytest.approx((frame["radius"] * (frame["predict"] == frame["label"])).mean())
    assert value(found, "acr", "low") < value(found, "acr") < value(found, "acr", "high")
    assert set(found["n"]) == {20}
    assert found["n_available"].isna().all()
    assert set(found.loc[found["headline"], "metric"]) == {"certified@1.00", "acr"}


def test_published_radii_are_of_another_alpha_than_the_default(tmp_path: Path) -> None:
    done = cohen.import_run(IMAGENET, tmp_path / "run", Protocol(1.0))
    first, second, third, *rest = done.findings
    assert first.startswith(
        "if n = 100,000 and alpha = 0.001 (certify.py's defaults where not given), no radius is above "
    )
    assert "3.8115 = 3.8115 sigma, and 4 radii are, the first in line 5 (idx 1200)" in first
    assert "the largest is 3.91 = 3.91 sigma; alpha = 0.01 would explain all, and n = 150,000 would leave" in first
    assert "no number of votes gives 7 of the other radii, the first in line 6 (idx 3500)" in second
    assert "certified" not in second
    assert "by the last digit printed alone: 1 at 1, 1 at 1.25, 2 at 2.5, 1 at 3.25" in third
    assert [line for line in rest if "idx" not in line] == []
    manifest = json.loads((tmp_path / "run/manifest.json").read_bytes())
    assert manifest["notices"] == [cohen.NOTICE, *done.findings]
    stated = {"sigma": 1.0, "n0": 100, "n": 100_000, "alpha": 0.001, "assumed": ["n0", "n", "alpha"]}
    assert manifest["protocol"] == stated
    assert manifest["imported"]["format"] == "cohen"
    assert "3.8115 sigma" in (tmp_path / "run/index.html").read_text()
    assert not [line for line in cohen.import_run(IMAGENET, tmp_path / "b", Protocol(1.0, alpha=0.01)).findings
                if "votes" in line or "above" in line]  # fmt: skip


def test_the_ladder_of_radii_tells_alpha_below_the_ceiling_too() -> None:
    (votes, *_) = findings(read(CIFAR10), Protocol(1.0, n=100_000, alpha=0.001), ())
    assert votes.startswith(
        "with n = 100,000 and alpha = 0.001, no number of votes gives 5 of the radii, the first in line 5"
    )
    assert votes.endswith("; alpha = 0.01 would explain all")
    assert not unattained(read(CIFAR10), Protocol(1.0, alpha=0.01)).any()


@pytest.mark.parametrize(("path", "alpha"), [(IMAGENET, 0.001), (IMAGENET, 0.01), (CIFAR10, 0.001), (CIFAR10, 0.05)])
def test_votes_are_found_as_by_trying_all_of_them(path: Path, alpha: float) -> None:
    low, _ = proportion_confint(np.arange(49_000, 100_001), 100_000, alpha=2 * alpha, method="beta")
    printed = {f"{radius:.3}" for radius in norm.ppf(low)}
    frame = pd.read_csv(path, delimiter="\t", dtype=str)
    expected = (frame["predict"] != "-1") & ~frame["radius"].isin(printed)
    assert unattained(read(path), Protocol(1.0, alpha=alpha)).tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(20, 1_000_000),
    alpha=st.sampled_from([0.05, 0.01, 0.001, 1e-6]),
    sigma=st.floats(0.05, 4),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    printed=st.sampled_from(["{:.3}", "{:.4f}"]),
)
def test_radii_of_the_published_loop_raise_no_doubt(
    n: int, alpha: float, sigma: float, shares: list[float], printed: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    votes = [n - round(share * n / 2) for share in shares]
    radii = [radius for k in votes if (radius := radius_by_core(k, n, alpha, sigma)) > 0]
    if not radii:
        return
    rows = radii_file(tmp_path_factory.mktemp("made") / "f.tsv", [printed.format(radius) for radius in radii])
    protocol = Protocol(sigma, n, alpha)
    assert not unattained(rows, protocol).any()
    assert not [line for line in findings(rows, protocol, ()) if "votes" in line or "no radius" in line]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(100, 200_000), sigma=st.floats(0.1, 2), times=st.floats(3, 100))
def test_a_ceiling_of_another_alpha_is_seen_and_explained(
    n: int, sigma: float, times: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    true = 0.001 * times
    top = radius_by_core(n, n, true, sigma)
    rows = radii_file(tmp_path_factory.mktemp("made") / "f.tsv", [f"{top:.3}"])
    first, *_ = findings(rows, Protocol(sigma, n, 0.001), ())
    assert "no radius is above" in first
    found = re.search(r"alpha = (\S+) would explain all", first)
    assert found
    assert f"{radius_by_core(n, n, float(found[1]), sigma):.3}" == f"{top:.3}"


def test_a_ceiling_that_was_rounded_up_is_seen(tmp_path: Path) -> None:
    """It is 1.9057 at n = 100,000 and alpha = 0.001: `Smooth.certify` gives it, and `certify.py` prints 1.91."""
    top = radius_by_core(100_000, 100_000, 0.001, 0.5)
    (found,) = findings(radii_file(tmp_path / "f", [f"{top:.3}", f"{top:.3}"]), Protocol(0.5), ())
    assert (
        "2 radii are larger than what was proved, since 1.9057, the largest there is, was rounded up, the first"
        in found
    )
    assert not findings(radii_file(tmp_path / "g", ["1.9057"]), Protocol(0.5), ())
    assert not findings(radii_file(tmp_path / "g", ["3.81"]), Protocol(1.0), ())  # 3.8115, rounded down


def test_a_wrong_sigma_is_suspected(tmp_path: Path) -> None:
    (first, *_) = findings(radii_file(tmp_path / "f", ["1.9", "0.3"]), Protocol(0.25), ())
    assert first.endswith("the largest is 1.9 = 7.60 sigma, which no alpha below 0.5 allows; is it another sigma?")


@settings(max_examples=120, deadline=None)
@given(radius=st.floats(1e-6, 900))
def test_what_is_printed_bounds_what_was_proved(radius: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    printed = f"{radius:.3}"
    rows = radii_file(tmp_path_factory.getbasetemp() / "printed.tsv", [printed, "2.0"])  # one alone might have decimals
    below, above = rows.below[0], rows.above[0]
    assert below * (1 - 1e-12) <= radius <= above * (1 + 1e-12)
    assert f"{below * (1 + 1e-9):.3}" == f"{above * (1 - 1e-9):.3}" == printed
    assert float(f"{below * (1 - 1e-9):.3}") < float(printed) < float(f"{above * (1 + 1e-9):.3}")


def test_a_radius_that_was_rounded_up_is_counted(tmp_path: Path) -> None:
    printed = [f"{radius:.3}" for radius in (1.9951, 1.994, 2.004, 2.006, 0.9996, 1.004)]
    assert printed == ["2.0", "1.99", "2.0", "2.01", "1.0", "1.0"]
    (found,) = (
        line
        for line in findings(radii_file(tmp_path / "f", printed), Protocol(1.0), (0.0, 1.0, 2.0))
        if "digit" in line
    )
    assert "of the 6 certificates some count at a radius by the last digit printed alone: 2 at 1, 2 at 2;" in found


def test_a_running_total_is_recognised_and_computed_again(tmp_path: Path) -> None:
    frame = pd.read_csv(IMAGENET, delimiter="\t")
    total = frame.assign(correct=(frame["predict"] == frame["label"]).cumsum())  # `correct +=` of DDS's certify.py
    path = tmp_path / "dds"
    total.to_csv(path, sep="\t", index=False)
    assert analyzed(path, 3.0) != analyzed(IMAGENET, 3.0)
    done = cohen.import_run(path, tmp_path / "run", Protocol(1.0))
    assert value(done.folder.metrics, "certified@3.00") == analyzed(IMAGENET, 3.0)
    assert (
        sum("the column correct is a running total, as DDS's certify.py writes it" in line for line in done.findings)
        == 1
    )
    assert not any("column correct" in line for line in findings(read(IMAGENET), Protocol(1.0), ()))


def test_other_doubts(tmp_path: Path) -> None:
    rows = [(0, 3, 3, 0.1, 1, "0:00:01"), (20, 3, 4, 0.2, 1, "1 day, 0:00:01.5"), (40, 3, -1, 0.3, 0, "15.4")]
    rows += [(100, 3, 3, 0.1, 1, "0:00:01"), (20, 3, 3, 0.1, 1, "0:00:01"), (120, 3, 3, 0.1, 1, "0:00:01")]
    found = "\n".join(findings(read(written(tmp_path / "f", rows)), Protocol(1.0, n=1000), ()))
    assert "1 radius is above 0 where no class is certified, the first in line 4 (idx 40)" in found
    assert (
        "the column correct is not 1 where predict is label, or not 0 elsewhere, 1 times, the first in line 3" in found
    )
    assert "1 image is there more than once, counted so, the first in line 3 (idx 20)" in found
    assert "the rows are not in the order of idx" in found
    assert "idx goes up by 20, but for 2 left out, the first of them 60" in found
    assert "1 of the times are in seconds" in found
    uneven = [(i, 3, 3, 0.1, 1, "0:00:01") for i in (0, 10, 20, 35)]
    (found,) = findings(read(written(tmp_path / "g", uneven)), Protocol(1.0), ())
    assert found == "idx goes up by 10, but not after 20"
    assert not findings(read(written(tmp_path / "h", [ROW])), Protocol(1.0), (0.25,))


@settings(max_examples=40, deadline=None)
@given(
    sigma=st.floats(1e-3, 1e3),
    n=st.integers(1, 10**9),
    alpha=st.floats(1e-300, 0.4999),
    radii=st.lists(st.floats(0, 1000, allow_subnormal=False).map("{:.3}".format), min_size=1, max_size=4),
)
def test_no_parameters_break_the_findings(
    sigma: float, n: int, alpha: float, radii: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = radii_file(tmp_path_factory.getbasetemp() / "any.tsv", radii)
    for sentence in findings(rows, Protocol(sigma, n, alpha), cohen.grid(rows)):
        assert "nan" not in sentence
        assert "inf" not in sentence
    assert len(cohen.grid(rows)) <= cohen.RADII + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.tsv:1: the header is ''; needed is idx label predict radius correct time, with tabs between"),
        (HEADER, "f.tsv: there is no row below the header"),
        (HEADER.replace("\t", ","), "f.tsv:1: the header is 'idx,label,"),
        (HEADER.replace("\tcorrect", ""), "f.tsv:1: the header is"),
        ("<!doctype html>", "f.tsv:1: the header is '<!doctype html>'"),
        ("\x00" * 500, r"f.tsv:1: the header is '\x00"),
        (HEADER + "0\t3\t3\t0.5\t1\n", "f.tsv:2: there are 5 cells with tabs between, and needed are 6"),
        (HEADER + "\n0 3 3 0.5 1 0:00:01\n", "f.tsv:3: there are 1 cells"),
        (HEADER + "-1\t3\t3\t0.5\t1\t0:00:01\n", "f.tsv:2: idx is '-1'; needed is a whole number of at least 0"),
        (HEADER + "0.5\t3\t3\t0.5\t1\t0:00:01\n", "f.tsv:2: idx is '0.5'"),
        (HEADER + f"{'9' * 5000}\t3\t3\t0.5\t1\t0:00:01\n", "f.tsv:2: idx is '99999"),
        (HEADER + "٣\t3\t3\t0.5\t1\t0:00:01\n", "f.tsv:2: idx is"),
        (HEADER + "0\t-1\t-1\t0.5\t1\t0:00:01\n", "f.tsv:2: label is '-1'"),
        (HEADER + "0\t=1+1\t3\t0.5\t1\t0:00:01\n", "f.tsv:2: label is '=1+1'"),
        (HEADER + "0\t3\t-2\t0.5\t1\t0:00:01\n", "f.tsv:2: predict is '-2'; needed is a class, or -1 for none"),
        (HEADER + "0\t3\t3\tnan\t1\t0:00:01\n", "f.tsv:2: radius is 'nan'; needed is a number in [0, 1000]"),
        (HEADER + "0\t3\t3\tinf\t1\t0:00:01\n", "f.tsv:2: radius is 'inf'"),
        (HEADER + "0\t3\t3\t-0.5\t1\t0:00:01\n", "f.tsv:2: radius is '-0.5'"),
        (HEADER + "0\t3\t3\t1e99\t1\t0:00:01\n", "f.tsv:2: radius is '1e99'"),
        (HEADER + "0\t3\t3\t1_0\t1\t0:00:01\n", "f.tsv:2: radius is '1_0'"),
        (HEADER + "0\t3\t3\t=cmd|'/C calc'!A0\t1\t0:00:01\n", "f.tsv:2: radius is \"=cmd|'/C calc'!A0\""),
        (HEADER + "0\t3\t3\t0.5\tTrue\t0:00:01\n", "f.tsv:2: correct is 'True'"),
        (HEADER + "0\t3\t3\t0.5\t1\tsoon\n", "f.tsv:2: time is 'soon'; needed is h:mm:ss or seconds"),
        (HEADER + "x" * 2**23, "bytes, too many for a file of certificates"),
    ],
    ids=range(24),
)
def test_bad_files_are_one_line_and_leave_nothing(text: str, message: str, rdiff: Command) -> None:
    Path("f.tsv").write_text(text)
    code, out, err = rdiff("import", "cohen", "f.tsv", "--sigma", "0.5", "-o", "run")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("run").exists()


@settings(max_examples=80, deadline=None)
@given(data=st.binary(max_size=200) | st.text("0123456789.-+eE\t\n\r:=naif", max_size=200).map(str.encode))
def test_any_bytes_are_rows_or_one_line(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.tsv"
    path.write_bytes(HEADER.encode() + data)
    try:
        rows = read(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert ((rows.radius >= 0) & (rows.radius <= 1000) & (rows.predict >= -1)).all()


def test_what_is_no_file_or_no_text_or_asked_wrongly(rdiff: Command) -> None:
    Path("f.tsv").write_bytes(HEADER.encode() + b"\xff")
    written(Path("good.tsv"), [ROW])
    good = ["import", "cohen", "good.tsv", "-o", "run"]
    cases = [
        (["import", "cohen", "f.tsv", "-o", "run", "--sigma", "1"], "f.tsv is no text file: byte 38 is not UTF-8"),
        (["import", "cohen", ".", "-o", "run", "--sigma", "1"], "there is no file .; give the path of what certify.py"),
        (good, "the file does not say its noise level; give it with --sigma"),
        ([*good, "--sigma", "0"], "--sigma 0: needed is the noise level, above 0, as 0.25"),
        ([*good, "--sigma", "nan"], "--sigma nan: needed is"),
        (
            [*good, "--sigma", "1", "--alpha", "0.5"],
            "--alpha 0.5: needed is a probability of failure above 0 and below",
        ),
        ([*good, "--sigma", "1", "--n", "0"], "--n 0: needed is a number of draws, 1 to 1,000,000,000"),
        ([*good, "--sigma", "1", "--n0", "-1"], "--n0 -1: needed is"),
        ([*good, "--sigma", "1", "--n0", "0"], "--n0 0: needed is"),
        ([*good, "--sigma", "1", "--radius", "-1"], "--radius -1: needed is a number in [0, 1000]"),
        ([*good, "--sigma", "1", "--checkpoint", "=1"], "'=1' is no name of a checkpoint"),
        ([*good, "--sigma", "1", "--baseline", "x"], "--baseline is for robustbench, not for cohen"),
        (
            ["import", "robustbench", "good.tsv", "-o", "run", "--sigma", "1"],
            "--sigma is for cohen, not for robustbench",
        ),
    ]
    for words, message in cases:
        code, out, err = rdiff(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
        assert not Path("run").exists()


def test_the_command_prints_figures_and_findings(rdiff: Command) -> None:
    words = ["import", "cohen", str(IMAGENET), "-o", "run", "--sigma", "1", "--checkpoint", "resnet50", "--radius", "3"]
    code, out, err = rdiff(*words)
    assert (code, err) == (0, "")
    shown = out.splitlines()
    assert shown[0] == "20 rows, idx 0 to 47100; the largest radius is 3.91 = 3.91 sigma"
    assert shown[1].split() == ["certified@3.00", "65", "%", "[40.78,", "84.61]"]
    assert sum(line.startswith("finding: ") for line in shown) == len(findings(read(IMAGENET), Protocol(1.0), (3.0,)))
    board = pd.read_csv("run/leaderboard.csv")
    assert board["checkpoint"].tolist() == ["resnet50"]
    first = Path("run/digests.txt").read_bytes()
    assert rdiff(*words)[0] == 0
    assert Path("run/digests.txt").read_bytes() == first
