"""`rdiff compare`: every figure of two checkpoints, effect and sample sizes by hand, and what cannot be compared."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from math import inf, isnan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import binom, norm
from statsmodels.stats.proportion import proportion_confint

from robustbench_diffaug import runs
from robustbench_diffaug.compare import COLUMNS, compare, effect, needed
from robustbench_diffaug.outcomes import Outcomes
from robustbench_diffaug.paired import holm
from robustbench_diffaug.pairs import PairTest, difference
from robustbench_diffaug.report import compared
from robustbench_diffaug.rng import key, normal, uniform
from robustbench_diffaug.suite import load

Command = Callable[..., tuple[int, str, str]]
HOSTILE = "<script>alert(1)</script>\u202e"


def suite(name: str, ids: dict[str, float], seed: int = 0, **image: int) -> dict[str, Any]:
    clean = {"kind": "mixture", "name": "mixture", "group": "clean", "size": 48, **image}
    grid = {
        "kind": "corruptions",
        "base": clean,
        "constants": "imagenet-c",
        "corruptions": ["contrast"],
        "severities": [2, 5],
    }
    common = {"kind": "mixture", "classes": 4, "temperature": 0.0016}
    evaluator = {"kind": "smoothing", "sigmas": [0.25], "n0": 8, "n": 32, "denoiser": {"kind": "mixture"}}
    return {
        "name": name, "seed": seed,
        "checkpoints": [{**common, "id": id, "tilt": tilt} for id, tilt in ids.items()],
        "benches": [
            {"name": "shift", "evaluator": {"kind": "shift"}, "datasets": [clean, grid]},
            {"name": "certify", "evaluator": evaluator, "datasets": [clean | {"size": 10}]},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: of two checkpoints, of others on the same images, and of one on other images."""
    folder = tmp_path_factory.mktemp("compare")
    suites = {
        "one": suite("one", {"bayes": 0, "tilted": 120}),
        "two": suite("two", {"bayes": 0, HOSTILE: 60}),
        "odd": suite("odd", {"bayes": 0}, draw=5),
    }
    for name, data in suites.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
        assert not runs.execute(load(str(folder / f"{name}.yaml")), runs.Options(folder / name)).failures
    return folder


def test_every_figure_of_both_is_there(made: Path) -> None:
    found = compare([made / "one"], "bayes", "tilted").table
    assert list(found.columns) == COLUMNS
    metrics = pd.read_csv(made / "one/metrics.csv").to_dict("records")
    written = {(row["bench"], row["metric"], row["group"], row["checkpoint"]): row for row in metrics}
    rows = found.to_dict("records")
    keys = {place[:3] for place in written if place[2] != "cost"}
    assert {(row["bench"], row["metric"], row["group"]) for row in rows} == keys and len(rows) == len(keys)
    for row in rows:
        for id, value in (("bayes", row["a_value"]), ("tilted", row["b_value"])):
            said = written[row["bench"], row["metric"], row["group"], id]
            assert value == pytest.approx(said["value"], rel=1e-12)
            assert (row["better"], row["unit"]) == (said["better"], said["unit"])
        assert row["difference"] == pytest.approx(row["a_value"] - row["b_value"], abs=1e-12)
        assert bool(row["test"]) == (not isnan(row["p"])) == (not pd.isna(row["n"]))
        assert not row["test"] or row["low"] <= row["difference"] <= row["high"]
    tested = found[found["test"] != ""]
    np.testing.assert_allclose(tested["p_holm"], holm(tested["p"].to_numpy()))
    assert {"ece", "certified-band@0.25"} <= set(found[found["test"] == ""]["metric"])
    swapped = compare([made / "one"], "tilted", "bayes").table
    np.testing.assert_allclose(swapped["difference"], -found["difference"], atol=1e-12)
    np.testing.assert_allclose(swapped["p_holm"], found["p_holm"])


def test_a_pattern_chooses_metrics_and_the_family(made: Path) -> None:
    found = compare([made / "one"], "bayes", "tilted", "accuracy/*").table
    assert found["metric"].str.startswith("accuracy/").all() and len(found) == 7
    np.testing.assert_allclose(found["p_holm"], holm(found["p"].to_numpy()))


def test_a_figure_of_the_only_severity_is_there_once(tmp_path: Path) -> None:
    data = suite("lone", {"bayes": 0, "tilted": 120})
    data["benches"] = data["benches"][:1]
    data["benches"][0]["datasets"][1] |= {"severities": [5], "corruptions": ["contrast", "pixelate"]}
    (tmp_path / "lone.yaml").write_text(yaml.safe_dump(data))
    assert not runs.execute(load(str(tmp_path / "lone.yaml")), runs.Options(tmp_path / "lone")).failures
    found = list(compare([tmp_path / "lone"], "bayes", "tilted", "accuracy/*").table["metric"])
    assert {"accuracy/contrast", "accuracy/pixelate", "accuracy/mean"} <= set(found)
    assert not [metric for metric in found if "@s" in metric]
    asked = compare([tmp_path / "lone"], "bayes", "tilted", "accuracy/contrast@s?").table
    assert list(asked["metric"]) == ["accuracy/contrast@s5"]


def test_two_runs_of_the_same_images(made: Path) -> None:
    found = compare([made / "one", made / "two"], "tilted", HOSTILE)
    assert (found.a[0], found.b[0]) == ("tilted", HOSTILE) and found.a[1].endswith("one") and found.b[1].endswith("two")
    assert compare([made / "two", made / "one"], "tilted", HOSTILE).table.equals(found.table)
    same = compare([made / "one", made / "two"], "bayes", "bayes").table
    assert (same["difference"] == 0).all() and (same["p"].dropna() == 1).all()


def copied(made: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(made / "two", folder / "changed")
    change(folder / "changed")
    return folder / "changed"


def text(name: str, before: str, after: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        old = (root / name).read_text()
        assert before in old
        (root / name).write_text(old.replace(before, after))

    return change


def digest(root: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["datasets"]:
        entry["digest"] = "f" * 32
    (root / "manifest.json").write_text(json.dumps(manifest))


def denoiser(root: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["denoisers"][0]["contents"] = "0" * 16
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (text("suite.lock.yaml", "seed: 0", "seed: 1"), "seed is 0 in .*one and 1 in .*changed$"),
        (text("suite.lock.yaml", "bins: 15", "bins: 12"), r"benches\.shift\.evaluator\.bins is 15 in .*one and 12 in"),
        (text("suite.lock.yaml", "n0: 8", "n0: 9"), r"benches\.certify\.evaluator\.n0 is 8 in"),
        (digest, r"benches\.shift\.datasets\.mixture\.digest is closed form in .*one and f{32} in"),
        (denoiser, r"benches\.certify\.denoisers\.contents is "),
    ],
)  # fmt: skip
def test_the_field_that_differs_is_named(made: Path, tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^the runs cannot be compared: {words}") as caught:
        compare([made / "one", copied(made, tmp_path, change)], "bayes", "bayes")
    assert "\n" not in str(caught.value)


def test_other_pixels_under_the_same_names_are_found(made: Path, tmp_path: Path) -> None:
    """A manifest that says that the images are the same does not make them so."""
    changed = tmp_path / "odd"
    shutil.copytree(made / "odd", changed)
    right, manifest = (json.loads((root / "manifest.json").read_text()) for root in (made / "one", changed))
    manifest["datasets"] = right["datasets"]
    (changed / "manifest.json").write_text(json.dumps(manifest))
    text("suite.lock.yaml", "draw: 5", "draw: 0")(changed)
    with pytest.raises(ValueError, match=r"benches\.shift: image of 144 of 144 samples, as of mixture/.*, differs"):
        compare([made / "one", changed], "tilted", "bayes")


TWICE = "--a and --b are both bayes; give two checkpoints, or the same of two runs"
BOTH = "--a bayes --b tilted"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("one --a bayess --b tilted", "--a bayess: there is no such checkpoint in {}/one; did you mean bayes?"),
        ("one --a bayes --b bayes", TWICE),
        ("one one --a bayes --b bayes", TWICE),
        ("one two odd " + BOTH, "two checkpoints are of one run or of two, and 3 are given; give one RUN or two"),
        (
            f"one {BOTH} --metric acuracy/mean",
            "--metric acuracy/mean is no metric of both; did you mean accuracy/mean?",
        ),
        (f"one {BOTH} --format pdf -o x", "--format pdf: no format is called 'pdf'; there are csv, html"),
        (f"one {BOTH} --format csv", "--format says what is written; say where with --output"),
        ("none " + BOTH, "there is no folder {}/none; give the folder of a run, such as reports/quickstart"),
        ("odd one --a tilted --b tilted", "--b tilted: there is no such checkpoint in {}/odd; there are bayes"),
        (
            "one odd --a tilted --b bayesian",
            "--b bayesian: there is no such checkpoint in {0}/one and {0}/odd; did you mean bayes?",
        ),
    ],
)
def test_bad_usage_takes_one_line(made: Path, rdiff: Command, words: str, message: str) -> None:
    names = ("one", "two", "odd", "none")
    code, out, err = rdiff("compare", *(str(made / word) if word in names else word for word in words.split()))
    assert (code, out, err) == (2, "", f"rdiff: {message.format(made)}\n")


def test_damaged_tables_are_named(made: Path, tmp_path: Path) -> None:
    cases = (("a,b\n1,2\n", "damaged"), ("", "damaged"), (None, "has no metrics.csv"))
    for number, (content, words) in enumerate(cases):
        root = tmp_path / str(number)
        shutil.copytree(made / "one", root)
        (root / "metrics.csv").unlink()
        if content is not None:
            (root / "metrics.csv").write_text(content)
        with pytest.raises(ValueError, match=words) as caught:
            compare([root], "bayes", "tilted")
        assert "\n" not in str(caught.value)


class Tags(HTMLParser):
    """All tags and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_files_are_whole_escaped_and_always_the_same(made: Path, tmp_path: Path, rdiff: Command) -> None:
    words = [
        "compare",
        str(made / "one"),
        str(made / "two"),
        "--a",
        "tilted",
        "--b",
        HOSTILE,
        "-o",
        str(tmp_path / "out"),
    ]
    code, out, err = rdiff(*words)
    assert code == 0 and not err
    assert "\u202e" not in out and "figures differ at p <= 0.05 after Holm" in out
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"compare.csv", "compare.html", "digests.txt"}
    assert rdiff(*words)[:2] == (code, out)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    page = Tags()
    page.feed(files["compare.html"].decode())
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert HOSTILE in page.words
    # Every number of the table is that of the file, to its digits.
    table = pd.read_csv(tmp_path / "out/compare.csv")
    row = table[table["metric"] == "accuracy/mean"].iloc[0]
    shown = " ".join(page.words)
    for value in (row["a_value"], row["b_value"]):
        assert f"{100 * value:.2f}" in shown
    rows = re.findall("<tr><td", files["compare.html"].decode())
    assert len(rows) == len(table)
    assert rdiff(*words, "--format", "csv")[0] == 0
    assert not (tmp_path / "out/compare.html").exists()


def test_no_folder_of_others_is_written_into(made: Path, tmp_path: Path, rdiff: Command) -> None:
    words = ["compare", str(made / "one"), "--a", "bayes", "--b", "tilted", "-o"]
    code, _, err = rdiff(*words, str(made / "one/sub"))
    assert code == 2 and "lies in the run folder" in err and not (made / "one/sub").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    code, _, err = rdiff(*words, str(tmp_path / "full"))
    assert code == 2 and "is not empty and holds no comparison" in err and len(list((tmp_path / "full").iterdir())) == 1


# --- effect sizes and sample sizes


def decisions(only_a: int, only_b: int, n: int) -> PairTest:
    names, both = np.array([f"d/{row:05d}" for row in range(n)]), np.arange(n)
    a, b = both < only_a, (only_a <= both) & (both < only_a + only_b)
    made = [Outcomes(names, hits.astype(float), both, binary=True) for hits in (a, b)]
    found = difference(made[0], made[1])
    assert found is not None
    return found


@pytest.mark.parametrize(("only_a", "only_b"), [(12, 5), (5, 12), (7, 0), (0, 7), (30, 30)])
def test_odds_ratio_and_its_exact_interval(only_a: int, only_b: int) -> None:
    kind, (value, low, high) = effect(decisions(only_a, only_b, 200))
    least, most = proportion_confint(only_a, only_a + only_b, 0.05, "beta")
    assert kind == "odds ratio"
    assert value == (only_a / only_b if only_b else inf)
    assert low == pytest.approx(least / (1 - least)) and high == (pytest.approx(most / (1 - most)) if only_b else inf)


def test_no_difference_has_no_effect_size_and_no_number_of_images() -> None:
    found = decisions(0, 0, 50)
    assert isnan(effect(found)[1][0]) and needed(found) is None
    assert needed(decisions(4, 4, 50)) is None


def test_d_z_is_its_definition_and_its_interval_holds_it() -> None:
    held = 0
    for run in range(200):
        gap = normal(key("d_z", run), range(1), (80,))[0].astype(np.float64) + 0.3
        names = np.array([f"d/{row}" for row in range(80)])
        pair = [Outcomes(names, values, np.arange(80), False, inf) for values in (gap, 0 * gap)]
        found = difference(pair[0], pair[1])
        assert found is not None
        kind, (value, low, high) = effect(found)
        assert kind == "d_z" and value == pytest.approx(gap.mean() / gap.std(ddof=1))
        held += low <= 0.3 <= high
    assert held >= 180


@pytest.mark.parametrize(("share_a", "share_b"), [(0.08, 0.03), (0.2, 0.1)])
def test_as_many_decisions_as_are_told_show_the_difference_in_four_of_five_tests(
    share_a: float, share_b: float
) -> None:
    n = needed(decisions(int(1000 * share_a), int(1000 * share_b), 1000))
    assert n is not None
    d, q, z = share_a - share_b, share_a + share_b, (norm.isf(0.025), norm.ppf(0.8))
    assert n == pytest.approx(((z[0] * sqrt(q) + z[1] * sqrt(q - d**2)) / d) ** 2, abs=1)
    runs_, found = 400, 0
    for u in uniform(key("power", share_a), range(runs_), (n,)):
        counts = int((u < share_a).sum()), int((u > 1 - share_b).sum())
        middle = min(counts), sum(counts)
        found += (
            2 * (binom.cdf(middle[0] - 1, middle[1], 0.5) + binom.pmf(middle[0], middle[1], 0.5) / 2) <= 0.05
        )  # mid-p
    assert abs(found / runs_ - 0.8) <= 0.07


def test_as_many_images_as_are_told_for_means() -> None:
    gap = normal(key("needed"), range(1), (500,))[0].astype(np.float64) + 0.25
    names = np.array([f"d/{row:03d}" for row in range(500)])
    pair = [Outcomes(names, values, np.arange(500), False, inf) for values in (gap, 0 * gap)]
    found = difference(pair[0], pair[1])
    assert found is not None
    size = gap.mean() / gap.std(ddof=1)
    assert needed(found) == pytest.approx(((1.959964 + 0.841621) / size) ** 2, abs=1)


def test_lines_say_who_is_better(made: Path) -> None:
    lines = {line.metric: line for line in compared.shown(compare([made / "one"], "bayes", "tilted"))}
    assert lines["accuracy/mean"].better == "a" and lines["accuracy/clean"].better == ""
    assert lines["nll"].better == "a" and lines["nll"].difference.startswith("−")  # lower is better
