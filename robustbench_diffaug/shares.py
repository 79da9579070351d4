"""Manifests of runs that each hold a part of one suite, and the one manifest that says what all of them say."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from math import inf, nan
from pathlib import Path
from typing import Any

from robustbench_diffaug.engine import lacking
from robustbench_diffaug.recorded import Recorded, listed
from robustbench_diffaug.shards import WHOLE, Shard

__all__ = ["earlier", "of_shard", "partial", "retold", "runs_of", "several", "standing", "united", "whole"]

OWN = ("rdiff", "device", "hardware", "compile", "threads", "workers", "trusted", "started", "finished")
"""What a manifest says of a run, and not of what was run."""
CELL = ("bench", "checkpoint", "dataset")
RECOUNTED = re.compile(r"records were made on different |\S+: .* has \d+ of \d+ samples of ")
"""How the notices begin that follow from what is there, not from a run."""


def runs_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Who made the records: an entry for each run that a manifest is of."""
    if found := listed(manifest, "runs"):
        return [dict(entry) for entry in found]
    spent = manifest.get("seconds")
    about = {name: manifest[name] for name in (*OWN, "versions", "platform") if name in manifest}
    return [about | {"seconds": spent.get("last_run", 0) if isinstance(spent, Mapping) else 0}]


def of_shard(manifest: Mapping[str, Any], shard: Shard) -> dict[str, Any]:
    """The manifest of one share, which its entry names; that of the whole names none."""
    named = {} if shard == WHOLE else {"shard": str(shard)}
    return {**manifest, "runs": [{**named, **run} for run in runs_of(manifest)]}


def earlier(root: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifest that a folder has, if it is of the very same suite; else nothing."""
    try:
        found = json.loads((root / "manifest.json").read_bytes())
        same = found["suite"] == manifest["suite"] and found["keys"] == manifest["keys"]
    except (ValueError, OSError, LookupError, TypeError):
        return []
    return [found] if same else []


def several(root: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a folder has a manifest of this suite which is of several runs, all of which are to be named."""
    return any(listed(found, "runs") for found in earlier(root, manifest))


def united(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One manifest of runs of the same suite: the last one's, with the runs, notices and failures of all.

    What was run is the last one's to say; devices and versions stand as lists where they differ, and seconds add up.
    The order of the others does not matter.
    """
    entries = {json.dumps(run, sort_keys=True): run for manifest in manifests for run in runs_of(manifest)}
    runs = [entries[text] for text in sorted(entries, key=lambda text: (str(entries[text].get("started")), text))]
    found = dict(manifests[-1])
    for name in (*OWN, "platform"):
        values = [run[name] for run in runs if name in run]
        if values:
            found[name] = _one(name, values)
    versions = [run["versions"] for run in runs if isinstance(run.get("versions"), Mapping)]
    names = dict.fromkeys(name for each in versions for name in each)
    found["versions"] = {name: _distinct(each[name] for each in versions if name in each) for name in names}
    spent = found.get("seconds")
    total = round(sum(map(_seconds, runs)), 1)
    found["seconds"] = {**(spent if isinstance(spent, Mapping) else {}), "last_run": total}
    told = {str(notice): None for manifest in manifests for notice in _notices(manifest)}
    failures = {json.dumps(entry, sort_keys=True): dict(entry) for m in manifests for entry in listed(m, "failures")}
    counted = [notice for notice in _notices(found) if RECOUNTED.match(notice)]
    own = sorted(notice for notice in told if not RECOUNTED.match(notice))
    return found | {"runs": runs, "notices": own + counted, "failures": [failures[text] for text in sorted(failures)]}


def standing(manifest: Mapping[str, Any], missing: Collection[tuple[str, str, str]]) -> list[dict[str, str]]:
    """The failures of a manifest whose cells still lack samples: what failed here may have succeeded there.

    Arguments:
        manifest: Of one or more runs.
        missing: bench, checkpoint and dataset of the cells that lack samples.
    """
    found = [{name: str(entry.get(name)) for name in (*CELL, "reason")} for entry in listed(manifest, "failures")]
    return [entry for entry in found if tuple(entry[name] for name in CELL) in missing]


def partial(manifest: Mapping[str, Any], missing: Collection[tuple[str, str, str]]) -> str:
    """Why there can be no figures yet, in words; nothing where all is there or has failed, or no run was of a shard.

    Arguments:
        manifest: Of one or more runs.
        missing: bench, checkpoint and dataset of the cells that lack samples.
    """
    shards = {shard for run in listed(manifest, "runs") for shard in _told(run)}
    if shards <= {WHOLE}:
        return ""
    every = any(sum(one.count == shard.count for one in shards) == shard.count for shard in shards)
    failed = {tuple(entry[name] for name in CELL) for entry in standing(manifest, missing)} if every else set()
    if not (left := sorted(set(missing) - failed)):
        return ""
    count = f"{len(left)} cells lack samples" if len(left) > 1 else "1 cell lacks samples"
    here = ", ".join(map(str, sorted(shards, key=lambda shard: (shard.count, shard.index))))
    where = " / ".join(left[0])
    return f"{count}, first {where}; here is shard {here}: rdiff merge adds others, rdiff run makes the rest"


def whole(run: Recorded) -> Recorded:
    """The run, which has figures.

    Raises:
        ValueError: If it is one of several shares, and samples of the others are not there.
    """
    if said := partial(run.manifest, lacking(run.bare, run.archive)):
        raise ValueError(f"{run.root} has no figures yet: {said}")
    return run


def _told(run: Mapping[str, Any]) -> list[Shard]:
    """Which share of the plan a run was of."""
    with suppress(ValueError):
        return [Shard.parse(str(run["shard"]))] if "shard" in run else [WHOLE]
    return []


def _seconds(run: Mapping[str, Any]) -> float:
    """What a run took."""
    try:
        found = float(run.get("seconds", 0))
    except (TypeError, ValueError):
        found = nan
    if not 0 <= found < inf:
        raise ValueError(f"a manifest.json is damaged: the seconds of a run are {run.get('seconds')!r:.80}")
    return found


def retold(manifest: Mapping[str, Any], counted: Iterable[str]) -> list[str]:
    """The notices of a manifest, those that follow from what is there replaced."""
    return [*(notice for notice in _notices(manifest) if not RECOUNTED.match(notice)), *counted]


def _notices(manifest: Mapping[str, Any]) -> list[str]:
    found = manifest.get("notices")
    return [str(notice) for notice in found] if isinstance(found, list) else []


def _one(name: str, values: Sequence[Any]) -> Any:
    """What is said of all runs."""
    if name in ("started", "finished"):
        return (min if name == "started" else max)(map(str, values))
    return any(values) if name in ("compile", "trusted") else _distinct(values)


def _distinct(values: Iterable[Any]) -> Any:
    """The value, or the list of them in order."""
    found = sorted(set(map(str, (values := list(values)))))
    return values[0] if len(found) == 1 else found
