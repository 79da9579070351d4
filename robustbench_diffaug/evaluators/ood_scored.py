"""Scores of recorded images: fitted, chosen by validation, and computed in one reading of the records."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.detection.curves import figures
from robustbench_diffaug.detection.passes import Unsuited
from robustbench_diffaug.detection.rows import Chunks, Rows, Score, Scorer, Source
from robustbench_diffaug.detection.scores import score_of
from robustbench_diffaug.records import Records

__all__ = ["ROLES", "TESTED", "Protocol", "Scored", "scored"]

Floats: TypeAlias = NDArray[np.float64]

ROLES = ("fit", "val", "id", "ood-val", "near", "far", "csid")
TESTED = ("id", "near", "far", "csid")


class Protocol(NamedTuple):
    """What scores depend on besides records.

    Arguments:
        scores: Their names.
        sweep: Whether hyper-parameters are chosen by validation.
        parameters: Those set by hand, by score.
        temperatures: Of ODIN.
    """

    scores: tuple[str, ...]
    sweep: bool = True
    parameters: tuple[tuple[str, Any], ...] = ()
    temperatures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Scores of the images of one checkpoint.

    Arguments:
        scores: By name, one of each row of the records; NaN in rows of roles that are not tested.
        chosen: The value of the hyper-parameter of each score that has one.
        traces: Of each score that was swept, the values tried and their AUROC on `val` against `ood-val`.
        refused: Why a score cannot be had of these images, such as fewer of them than neighbours.
    """

    scores: dict[str, Floats] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    traces: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


_KEPT: WeakKeyDictionary[Records, dict[Protocol, Scored]] = WeakKeyDictionary()
"""Of records that are at hand, so that figures of one checkpoint and comparisons of two compute scores once."""


def scored(records: Records, protocol: Protocol) -> Scored:
    """The scores of all tested images.

    Features and logits are read from the records in chunks: once for each pass that fitting a score takes, once for
    each value that validation tries, and once for all scores of all tested images.

    Raises:
        ValueError: If an image of the fitting set is also tested, or a score is NaN or infinite; the image is named.
    """
    kept = _KEPT.setdefault(records, {})
    if protocol not in kept:
        kept[protocol] = _scored(records, protocol)
    return kept[protocol]


def _scored(records: Records, protocol: Protocol) -> Scored:
    _apart(records)
    made, final = Scored(), dict[str, Scorer]()
    source = _source(records)
    tuning = (_rows(records, "val"), _rows(records, "ood-val"))
    tried = protocol.sweep and all(len(records.group(role)) for role in ("val", "ood-val"))
    given = dict(protocol.parameters)
    for name in protocol.scores:
        if name == "odin":
            made.scores[name] = _recorded(records, protocol, tried, made)
            continue
        score = score_of(name)
        values: tuple[float | None, ...] = (given.get(name, score.default),)
        if tried and name not in given and score.sweep:
            values = score.sweep
        try:
            final[name] = _fitted(score, source, values, tuning, made)
        except ValueError as error:
            made.refused[name] = str(error)
    made.scores.update(_tested(records, final, made.refused))
    ordered = {name: made.scores[name] for name in protocol.scores if name in made.scores}
    for name, column in ordered.items():
        _finite(name, column, records)
    return replace(made, scores=ordered)


def _rows(records: Records, role: str) -> Chunks:
    """Reads the rows of a role."""
    part = records.group(role)

    def read() -> Iterator[Rows]:
        return _read(part)

    return read


def _read(records: Records) -> Iterator[Rows]:
    """The rows of records, chunk by chunk."""
    names = [name for name in ("logits", "features") if _has(records, name)]
    for columns in records.chunks([*names, "label"]):
        yield Rows(columns["logits"], columns.get("features"), columns["label"])


def _has(records: Records, name: str) -> bool:
    """Whether there is such a column: features are recorded if the last layer was kept."""
    return name in records.columns or name == "logits" or "weight" in records.constants


def _source(records: Records) -> Source:
    """What scores may be fitted to."""
    fit, val = (_rows(records, role) if len(records.group(role)) else None for role in ("fit", "val"))
    weight, bias = records.constants.get("weight"), records.constants.get("bias")
    return Source(fit, val, weight, bias, records.key("ood", "fit"))


def _fitted(
    score: Score,
    source: Source,
    values: tuple[float | None, ...],
    tuning: tuple[Chunks, Chunks],
    made: Scored,
) -> Scorer:
    """The scorer with the best value; the trace is noted."""
    best: tuple[float, float | None, Scorer] | None = None
    refused: ValueError | None = None
    for value in values:
        try:
            scorer = score.fit(source, value)
            if len(values) == 1:
                best = (0.0, value, scorer)
                break
            area = figures(*(np.concatenate([scorer(rows) for rows in chunks()]) for chunks in tuning)).auroc
        except ValueError as error:  # such as more neighbours than there are images: other values may do
            refused = error
            continue
        made.traces.setdefault(score.name, []).append((float(value or 0), area))
        if best is None or area > best[0]:
            best = (area, value, scorer)
    if best is None and len(values) > 1 and isinstance(refused, Unsuited):
        return _fitted(score, source, (score.default,), tuning, made)  # none of OpenOOD's values suits these arrays
    if best is None:
        raise refused or ValueError(f"{score.name} has no value to try")
    if best[1] is not None:
        made.chosen[score.name] = float(best[1])
    return best[2]


def _recorded(records: Records, protocol: Protocol, tried: bool, made: Scored) -> Floats:
    """ODIN, a column of the records for each temperature, which is chosen as other hyper-parameters are."""
    column, temperatures = records["odin"], protocol.temperatures
    given = dict(protocol.parameters).get("odin")
    if given is not None and given not in temperatures:
        raise ValueError(f"odin was recorded at temperatures {', '.join(map(str, temperatures))}, not {given}")
    best = len(temperatures) - 1 if given is None else temperatures.index(given)
    if tried and given is None:
        inside, outside = (column[records["group"] == role] for role in ("val", "ood-val"))
        areas = [figures(inside[:, index], outside[:, index]).auroc for index in range(len(temperatures))]
        made.traces["odin"] = list(zip(temperatures, areas, strict=True))
        best = int(np.argmax(areas))
    made.chosen["odin"] = temperatures[best]
    return np.where(np.isin(records["group"], TESTED), column[:, best], np.nan)


def _tested(records: Records, scorers: Mapping[str, Scorer], refused: dict[str, str]) -> dict[str, Floats]:
    """All scores of the tested images, in one reading; NaN in other rows. Why one cannot be had is noted."""
    mask = np.isin(records["group"], TESTED)
    found = {name: np.full(len(records), np.nan) for name in scorers}
    where, start = np.flatnonzero(mask), 0
    if not scorers:
        return found
    for rows in _read(records.group(*TESTED)):
        places = where[start : start + len(rows.labels)]
        for name in list(found):
            try:
                found[name][places] = scorers[name](rows)
            except ValueError as error:
                refused[name] = str(error)
                del found[name]
        start += len(places)
    return found


def _finite(name: str, column: Floats, records: Records) -> None:
    odd = np.flatnonzero(np.isin(records["group"], TESTED) & ~np.isfinite(column))
    for row in odd[:1]:
        image = f"{records['dataset'][row]}/{records['sample'][row]}"
        raise ValueError(f"score {name} of image {image} is {column[row]}; {len(odd)} are not finite")


def _apart(records: Records) -> None:
    """No image that a score is fitted to, or chosen by, may be tested."""
    group, image = records["group"], records["image"]
    for role, roles in (("fit", ("val", *TESTED)), ("val", TESTED), ("ood-val", TESTED)):
        others = np.isin(group, roles)
        both = np.intersect1d(image[group == role], image[others])
        if len(both):
            rows = [int(np.flatnonzero(mask & (image == both[0]))[0]) for mask in (group == role, others)]
            one, other = (f"{records['dataset'][row]}/{records['sample'][row]}" for row in rows)
            raise ValueError(f"{len(both)} images of role {role} are tested too, such as {one}, which is {other}")
