"""Two checkpoints in every figure that both have: differences, tests, effect sizes, and how many images would tell."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import ceil, inf, isfinite, nan, sqrt
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from scipy.special import betaincinv, ndtri

from robustbench_diffaug import paired, shares
from robustbench_diffaug.component import suggest
from robustbench_diffaug.engine import cells, reason
from robustbench_diffaug.files import apart, sha256
from robustbench_diffaug.folder import replaced, vacant
from robustbench_diffaug.outcomes import Basis, Key
from robustbench_diffaug.pairs import ALPHA, PairTest, difference
from robustbench_diffaug.protocols import Measured, benches, unlike
from robustbench_diffaug.recorded import Recorded, open_run
from robustbench_diffaug.records import Records
from robustbench_diffaug.report import compared, tables
from robustbench_diffaug.stats import LEVEL
from robustbench_diffaug.suite import Bench

__all__ = ["COLUMNS", "FORMATS", "POWER", "compare", "effect", "files", "needed", "write"]

COLUMNS = "bench metric group a b n a_value b_value difference low high p p_holm test".split()
COLUMNS += "effect effect_low effect_high effect_kind n_needed better unit".split()
FORMATS = {"csv": "compare.csv", "html": "compare.html"}
POWER = 0.8
"""The chance with which the number of images that is told would show a difference of the size that was found."""


class Side(NamedTuple):
    """One of the two checkpoints.

    Arguments:
        run: The run that holds its records.
        id: Its id there.
    """

    run: Recorded
    id: str


def compare(roots: Sequence[Path], a: str, b: str, pattern: str = "*", trust: bool = False) -> compared.Comparison:
    """Compares two checkpoints of one run, or one of each of two, on the samples that both have.

    P-values are adjusted by Holm for the number of all tests that are shown. Figures that are no means over images
    stand beside them with their difference alone.

    Arguments:
        roots: One run folder, or two: that of a first, unless a is in the second alone.
        a: The id of a checkpoint.
        b: The id of another, or of the same in another run.
        pattern: Which metrics, '*' and '?' standing for any characters.
        trust: Whether the locks may name code of the user's.

    Raises:
        ValueError: If there is no such run, checkpoint or metric; or a run is a share that lacks samples; or two runs
            are not of the same samples, protocol and seed, the field that differs being named; or records are damaged.
    """
    one, other = _sides([shares.whole(open_run(root, trust=trust)) for root in roots], a, b)
    if one.run.root.resolve() == other.run.root.resolve() and one.id == other.id:
        raise ValueError(f"--a and --b are both {a}; give two checkpoints, or the same of two runs")
    rows: list[dict[str, Any]] = []
    met, names = False, list[str]()
    for bench in one.run.bare.benches:
        twin = next((found for found in other.run.bare.benches if found.name == bench.name), None)
        if twin is None or not (_chosen(one, bench) and _chosen(other, twin)):
            continue
        met = True
        if one.run is not other.run:
            _same(one.run, other.run, bench.name)
        rows += _bench(one, other, bench, twin, pattern, names)
    if not met:
        raise ValueError(f"no bench has both {a} and {b}; rdiff report RUN shows what each has")
    if not rows:
        close = suggest(pattern, names) if names else "; they have no metric in common"
        raise ValueError(f"--metric {pattern} is no metric of both{close}")
    table = _adjusted(pd.DataFrame(rows, columns=pd.Index(COLUMNS)))
    first, second = ((side.id, str(side.run.root), _digest(side.run)) for side in (one, other))
    return compared.Comparison(first, second, table, ALPHA)


def _digest(run: Recorded) -> str:
    """That of the run's list of digests."""
    listing = run.root / "digests.txt"
    return sha256(listing) if listing.is_file() else ""


def _sides(runs: Sequence[Recorded], a: str, b: str) -> tuple[Side, Side]:
    """The runs of both checkpoints."""
    if len(runs) not in (1, 2):
        raise ValueError(f"two checkpoints are of one run or of two, and {len(runs)} are given; give one RUN or two")
    ids = [[entry.id for entry in run.suite.checkpoints] for run in runs]
    pairs = [(0, 0)] if len(runs) == 1 else [(0, 1), (1, 0)]
    for first, second in pairs:
        if a in ids[first] and b in ids[second]:
            return Side(runs[first], a), Side(runs[second], b)
    for flag, id in (("a", a), ("b", b)):
        known = list(dict.fromkeys(name for found in ids for name in found))
        if id not in known:
            where = " and ".join(str(run.root) for run in runs)
            raise ValueError(f"--{flag} {id}: there is no such checkpoint in {where}{suggest(id, known)}")
    holder, lacking = (0, 1) if a in ids[0] else (1, 0)
    if a == b:
        where = str(runs[lacking].root)
        raise ValueError(f"--b {b}: there is no such checkpoint in {where}{suggest(b, ids[lacking])}")
    raise ValueError(f"both {a} and {b} are in {runs[holder].root} alone; give that RUN alone")


def _chosen(side: Side, bench: Bench) -> bool:
    return side.id in [entry.id for entry in bench.chosen(side.run.bare.checkpoints)]


def _records(side: Side, bench: Bench) -> Records:
    """The records of a checkpoint in a bench."""
    place = [entry.id for entry in bench.chosen(side.run.bare.checkpoints)].index(side.id)
    return side.run.archive.read([row[place] for _, row in cells(side.run.bare, bench)])


def _figures(side: Side, bench: Bench) -> pd.DataFrame:
    """The figures of a checkpoint in a bench as the run has written them, by metric and group; none of costs."""
    path = side.run.root / "metrics.csv"
    if not path.is_file():
        raise ValueError(f"{side.run.root} has no metrics.csv; run it to its end, or write it with rdiff report")
    try:
        found = pd.read_csv(path, dtype={"metric": str, "group": str, "checkpoint": str, "bench": str})
        found = found[(found["bench"] == bench.name) & (found["checkpoint"] == side.id) & (found["group"] != "cost")]
        found["value"] = found["value"].astype(float)
        table: pd.DataFrame = found.set_index(["metric", "group"])[["value", "better", "unit"]]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); write it with rdiff report") from error
    if table.index.has_duplicates:
        raise ValueError(f"{path} is damaged: {table.index[table.index.duplicated()][0]} is there twice")
    return table


def _bases(side: Side, bench: Bench, records: Records) -> Mapping[Key, Basis]:
    if not len(records):
        return {}
    try:
        return bench.evaluator.outcomes(records)
    except Exception as error:  # whatever the evaluator raises
        raise ValueError(f"{bench.name}, {side.id}: {reason(error)}") from error


def _bench(
    one: Side, other: Side, bench: Bench, twin: Bench, pattern: str, names: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each figure of a bench that both have; `names` takes those of all metrics."""
    mine, theirs = _figures(one, bench), _figures(other, twin)
    keys = [key for key in mine.index if key in theirs.index]
    names += [metric for metric, _ in keys if metric not in names]
    keys = list(_once([key for key in keys if fnmatchcase(key[0], pattern)], mine, theirs))
    if not keys:
        return
    records = _records(one, bench), _records(other, twin)
    # Manifests that say that the images are the same do not make them so.
    if one.run is not other.run and all(map(len, records)) and (odd := unlike(*records)):
        raise ValueError(f"the runs cannot be compared: benches.{bench.name}: {odd} differs")
    first, second = _bases(one, bench, records[0]), _bases(other, twin, records[1])
    for key in keys:
        about = {"bench": bench.name, "metric": key[0], "group": key[1], "a": one.id, "b": other.id}
        about |= {"better": str(mine.at[key, "better"]), "unit": str(mine.at[key, "unit"])}
        found = difference(first[key], second[key]) if key in first and key in second else None
        if found is None:
            values = [float(cast(Any, found.at[key, "value"])) for found in (mine, theirs)]
            yield about | {"a_value": values[0], "b_value": values[1], "difference": values[0] - values[1]}
        else:
            yield about | _told(found)


def _once(keys: Sequence[Key], *tables: pd.DataFrame) -> Iterator[Key]:
    """The figures without those of a severity that is the only one: they stand there as those over severities."""
    places = [(re.sub(r"@s\d+$", "", metric), group) for metric, group in keys]
    shown, severities = set(keys), Counter(place for place, key in zip(places, keys, strict=True) if place != key)
    values = [dict(zip(table.index, table["value"].to_numpy(), strict=True)) for table in tables]
    for key, over in zip(keys, places, strict=True):
        lone = key != over and over in shown and severities[over] == 1
        if not (lone and all(value[over] == value[key] for value in values)):
            yield key


def _told(found: PairTest) -> dict[str, Any]:
    value, low, high, _ = found.difference
    kind, size = effect(found)
    return {
        "n": found.n, "a_value": found.a, "b_value": found.b, "difference": value, "low": low, "high": high,
        "p": found.p, "test": found.test, "effect": size[0], "effect_low": size[1], "effect_high": size[2],
        "effect_kind": kind, "n_needed": needed(found),
    }  # fmt: skip


def _adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """The table with Holm's p-values of all tests in it, and whole numbers of images."""
    tested = table["p"].notna()
    table["p_holm"] = nan
    if tested.any():
        table.loc[tested, "p_holm"] = paired.holm(table.loc[tested, "p"].to_numpy(dtype=np.float64))
    for column in ("n", "n_needed"):
        table[column] = table[column].astype("Int64")
    for column in ("test", "effect_kind"):
        table[column] = table[column].fillna("")
    floats = ["p", "p_holm", "low", "high", "effect", "effect_low", "effect_high"]
    return table.astype(dict.fromkeys(floats, np.float64))


def effect(found: PairTest, level: float = LEVEL) -> tuple[str, tuple[float, float, float]]:
    """The kind of an effect size, and its value with the ends of its interval.

    Of decisions it is the odds ratio of McNemar's test, images that only a has right over those that only b has, with
    the exact interval that follows from Clopper and Pearson's of their share. Of other means it is Cohen's d_z, the
    mean difference over the standard deviation of the images' differences, with the interval of its large-sample
    standard error, sqrt(1 / n + d_z^2 / (2 n)). Of areas it is the difference in points. NaN where there is none.

    Arguments:
        found: The test.
        level: Of the interval.

    References:
        Statistical power analysis for the behavioral sciences (Cohen, 1988), section 2.3.5
        Statistical methods for meta-analysis (Hedges and Olkin, 1985), section 5.E
    """
    tail = (1 - level) / 2
    if found.discordant is not None:
        more, less = found.discordant
        if not more + less:
            return "odds ratio", (nan, nan, nan)
        low = float(betaincinv(more, less + 1, tail)) if more else 0.0
        high = float(betaincinv(more + 1, less, 1 - tail)) if less else 1.0
        ratio = more / less if less else inf
        return "odds ratio", (ratio, low / (1 - low), high / (1 - high) if high < 1 else inf)
    if found.test == "DeLong":
        points = [100 * end for end in found.difference[:3]]
        return "points", (points[0], points[1], points[2])
    if not found.error:
        return "d_z", (nan, nan, nan)
    size = found.difference.value / (found.error * sqrt(found.n))
    margin = float(-ndtri(tail)) * sqrt(1 / found.n + size**2 / (2 * found.n))
    return "d_z", (size, size - margin, size + margin)


def needed(found: PairTest, power: float = POWER) -> int | None:
    """How many images would show a difference of the size that was found, at the level 0.05 of one two-sided test.

    For decisions, with the share q of images on which the checkpoints differ and the difference d,
    n = ((z_a sqrt(q) + z_b sqrt(q - d^2)) / d)^2, z_a and z_b the normal quantiles of 0.975 and the power; for all else
    n (z_a + z_b)^2 (s / d)^2, s the standard error from n images. None where there is no difference, or no error known.

    Arguments:
        found: The test.
        power: The chance of p <= 0.05.

    References:
        Sample size for testing differences in proportions for the paired-sample design (Connor, 1987),
            https://doi.org/10.2307/2531961
    """
    gap, least, chance = found.difference.value, float(-ndtri(ALPHA / 2)), float(ndtri(power))
    if found.discordant is not None and gap:
        share = sum(found.discordant) / found.n
        return ceil(((least * sqrt(share) + chance * sqrt(max(0.0, share - gap**2))) / gap) ** 2)
    size = found.n * ((least + chance) * found.error / gap) ** 2 if gap else inf
    return ceil(size) if found.error and isfinite(size) else None


def _same(one: Recorded, other: Recorded, bench: str) -> None:
    """Finds that two runs show the same images to checkpoints in the same way.

    Raises:
        ValueError: If they do not; the field that differs is named.
    """
    for odd in benches(Measured(one, bench), Measured(other, bench)):
        raise ValueError(f"the runs cannot be compared: {odd.said(one.root, other.root)}")


def files(found: compared.Comparison, formats: Sequence[str]) -> dict[str, bytes]:
    """The files of a comparison by name.

    Arguments:
        found: The comparison.
        formats: Which of `FORMATS`.
    """
    made = {"csv": lambda: tables.to_csv(found.table), "html": lambda: compared.page(found).encode()}
    return {FORMATS[name]: made[name]() for name in formats}


def write(found: compared.Comparison, roots: Sequence[Path], output: Path, formats: Sequence[str]) -> None:
    """Writes the files of a comparison into a folder that holds nothing else.

    Arguments:
        found: The comparison.
        roots: The run folders, which it must not lie in.
        output: The folder.
        formats: Which of `FORMATS`.

    Raises:
        ValueError: If the folder is a run's, or holds other things.
    """
    for root in roots:
        apart(root, output)
    vacant(output, {*FORMATS.values(), "digests.txt"}, "comparison of rdiff compare")
    replaced(output, files(found, formats), FORMATS.values())
