"""Digests of a run's files, and the agreement of lock, manifest, weights, denoisers and data."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robustbench_diffaug.component import digest_of
from robustbench_diffaug.engine import cells
from robustbench_diffaug.files import Missing, Weights, sha256
from robustbench_diffaug.recorded import LOCK, Recorded, keys_of, listed
from robustbench_diffaug.runs import digests
from robustbench_diffaug.verify.check import Check, judged

__all__ = ["contents", "listing", "suite"]

LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def listing(root: Path) -> Check:
    """Every file against digests.txt; files that are not listed, are gone, or are links are named."""
    path = root / "digests.txt"
    if not path.is_file():
        return judged("digests", "", ["digests.txt is not there"])
    text, expected = path.read_bytes(), digests(root)
    wrong = [f"{name} is a link; a run folder holds none" for name in _links(root)]
    found, real = dict[str, str](), dict[str, str]()
    for number, line in enumerate(text.decode("utf-8", "replace").split("\n")[:-1], 1):
        match = LINE.fullmatch(line)
        if match is None:
            wrong.append(f"digests.txt line {number} is not a digest and a name: {line[:80]!r}")
        elif match[2] in found:
            wrong.append(f"digests.txt line {number} lists {match[2]} again")
        else:
            found[match[2]] = match[1]
    for line in expected.decode("utf-8", "replace").split("\n")[:-1]:
        real[line[66:]] = line[:64]
    wrong += [f"{name} is listed and not there" for name in found.keys() - real.keys()]
    wrong += [f"{name} is not listed" for name in sorted(real.keys() - found.keys())]
    for name in sorted(found.keys() & real.keys()):
        if found[name] != real[name]:
            wrong.append(f"{name} was changed: its sha256 is {real[name]}, digests.txt says {found[name]}")
    if text != expected and not wrong:
        wrong.append("digests.txt is not as rdiff writes it: its order or its line ends are others")
    said = f"{len(real)} files are as digests.txt says; its sha256 is {hashlib.sha256(text).hexdigest()}"
    return judged("digests", said, wrong)


def _links(root: Path) -> list[str]:
    """Files and folders that are links: what they lead to is under no digest."""
    entries = (Path(folder, name) for folder, names, more in os.walk(root) for name in (*names, *more))
    return sorted(path.relative_to(root).as_posix() for path in entries if path.is_symlink())


def suite(run: Recorded) -> Check:
    """The lock against the manifest: digest, name, seed, and every field of checkpoints, denoisers and evaluators."""
    lock, manifest, data = run.suite, run.manifest, run.data
    about = manifest.get("suite")
    told = about if isinstance(about, Mapping) else {}
    wrong = []
    for key, value in (("name", data.get("name")), ("seed", data.get("seed")), ("digest", digest_of(data, 16))):
        if told.get(key) != value:
            wrong.append(f"manifest.json: suite.{key} is {told.get(key)!r}, that of {LOCK} is {value!r}")
    denoisers = dict.fromkeys(denoiser for bench in lock.benches for denoiser in bench.evaluator.denoisers())
    evaluators = [{"name": bench["name"], "evaluator": bench["evaluator"]} for bench in data["benches"]]
    wrong += _differ(manifest, "checkpoints", data["checkpoints"])
    wrong += _differ(manifest, "denoisers", [_plain(denoiser) for denoiser in denoisers])
    wrong += _differ(manifest, "benches", evaluators)
    parts = [(bench, part) for bench in lock.benches for part in bench.parts()]
    facts = ("kind", "name", "severity", "class_space")
    named = [{"bench": b.name, **{fact: getattr(part, fact) for fact in facts}} for b, part in parts]
    wrong += _differ(manifest, "datasets", named)
    other = [] if run.current else [f"{LOCK} is of another version of rdiff, which has other fields"]
    said = f"{LOCK} and manifest.json agree: digest {digest_of(data, 16)}, seed {lock.seed}"
    return judged("suite", said, wrong, other)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", serialize_as_any=True)


def _differ(manifest: Mapping[str, Any], key: str, expected: list[dict[str, Any]]) -> list[str]:
    """Where a list of the manifest says otherwise than the lock; it may say more, or lack a later version's field."""
    found = listed(manifest, key)
    if len(found) != len(expected):
        return [f"manifest.json: {key} lists {len(found)}, {LOCK} {len(expected)}"]
    return [
        f"manifest.json: {key}.{index}.{name} is {entry.get(name)!r:.120}, that of {LOCK} is {value!r:.120}"
        for index, (entry, fields) in enumerate(zip(found, expected, strict=True))
        for name, value in fields.items()
        if entry.get(name, value) != value
    ]


def contents(run: Recorded) -> list[Check]:
    """Weights, denoisers and data against the digests in the manifest, where they can be found; then the keys."""
    looked = [_looked("weights", run, _weights), _looked("denoisers", run, _denoisers), _looked("data", run, _data)]
    return [*looked, _keys(run, all(check.state == "ok" and not check.details for check in looked))]


Looked = tuple[list[str], list[str], int]
"""What is wrong, what could not be looked at, and how much was."""


def _looked(name: str, run: Recorded, look: Callable[[Recorded], Looked]) -> Check:
    wrong, unseen, seen = look(run)
    return judged(name, f"{seen} are as the manifest says" if seen else "there are none", wrong, unseen, seen)


def _weights(run: Recorded) -> Looked:
    wrong, unseen, seen = list[str](), list[str](), 0
    for entry, said in zip(run.suite.checkpoints, listed(run.manifest, "checkpoints"), strict=False):
        weights = getattr(entry, "weights", None)
        if not isinstance(weights, Weights):
            continue
        if weights.sha256 and weights.sha256 != said.get("sha256"):
            wrong.append(f"{entry.id}: {LOCK} says sha256 {weights.sha256}, the manifest {said.get('sha256')}")
        try:
            seen, real = seen + 1, sha256(weights.path())
        except ValueError:
            unseen.append(f"{entry.id}: no file {weights.uri}")
            continue
        if real != said.get("sha256"):
            wrong.append(f"{entry.id}: {weights.uri} has sha256 {real}, the manifest says {said.get('sha256')}")
    return wrong, unseen, seen


def _denoisers(run: Recorded) -> Looked:
    wrong, unseen, seen = list[str](), list[str](), 0
    distinct = dict.fromkeys(denoiser for bench in run.suite.benches for denoiser in bench.evaluator.denoisers())
    for denoiser, said in zip(distinct, listed(run.manifest, "denoisers"), strict=False):
        try:
            denoiser.check()  # the files have the digests that the suite names, if it does
            real = {"contents": denoiser.contents(), "fingerprint": denoiser.fingerprint}
        except (Missing, OSError) as error:
            unseen.append(f"denoiser {denoiser.kind}: {error}")
            continue
        except ValueError as error:
            wrong.append(f"denoiser {denoiser.kind}: {error}")
            continue
        seen += 1
        for key, value in real.items():
            if said.get(key, value) != value:
                wrong.append(f"denoiser {denoiser.kind}: its {key} is {value}, the manifest says {said.get(key)}")
    return wrong, unseen, seen


def _data(run: Recorded) -> Looked:
    wrong, unseen, seen = list[str](), list[str](), 0
    for bench in run.suite.benches:
        for part in bench.parts():
            said = run.declared(bench.name, part.name)
            try:
                real = {"digest": part.contents(), **asdict(part.declared())}
            except (ValueError, OSError) as error:
                unseen.append(f"{bench.name} / {part.name}: {error}")
                continue
            seen += 1
            for key, value in real.items():
                if said.get(key, value) != value:
                    where = f"{bench.name} / {part.name}"
                    wrong.append(f"{where}: {key} is {value!r}, the manifest says {said.get(key)!r}")
    return wrong, unseen, seen


def _keys(run: Recorded, whole: bool) -> Check:
    """The names of the records' folders against what they depend on, where all of that was found."""
    if not whole:
        return Check("keys", "not checked", "the keys of records follow from weights, denoisers and data")
    if not run.current:
        return Check("keys", "not checked", f"{LOCK} is of a version of rdiff with other fields")
    wrong, expected, seen = list[str](), keys_of(run.suite), 0
    for bench in run.suite.benches:
        for dataset, row in cells(run.suite, bench):
            for cell in row:
                seen, found = seen + 1, run.archive.key(cell)
                right = expected[bench.name][dataset.name][cell.checkpoint.id]
                if found not in (None, right):
                    where = f"{bench.name} / {cell.checkpoint.id} / {dataset.name}"
                    wrong.append(f"{where}: its records have key {found}, what they depend on has {right}")
    return judged("keys", f"the keys of {seen} cells follow from fields and files", wrong)
