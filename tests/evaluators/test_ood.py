"""Out-of-distribution detection: one recording, scores from chunks of it, the protocol's means, gains and remarks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from robustbench_diffaug import rng, runs
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.detection.curves import figures
from robustbench_diffaug.engine import cells
from robustbench_diffaug.evaluators import ood_metrics
from robustbench_diffaug.evaluators.ood import Ood
from robustbench_diffaug.evaluators.ood_scored import Protocol, scored
from robustbench_diffaug.executors import local
from robustbench_diffaug.records import Declared, Metric, Piece, Records
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import load

SETS = {"fit": "fit", "val": "val", "ood-val": "ood-val", "id": "id", "a": "near", "b": "near", "c": "far", "s": "csid"}
PLAIN = ("msp", "energy", "react", "ash", "scale", "mds")
CLASSES, WIDTH = 3, 24


def normals(name: str, *shape: int) -> np.ndarray:
    drawn: np.ndarray = rng.normal(rng.key("test", name), range(1), shape)[0]
    return drawn


def made(sizes: Mapping[str, int], shift: float = 0.0) -> Records:
    """Records of a network with ReLU features; images outside have smaller ones."""
    weight, bias = normals("weight", CLASSES, WIDTH), normals("bias", CLASSES)
    columns: dict[str, list[Any]] = {name: [] for name in ("dataset", "origin", "group", "sample", "image", "label")}
    features = []
    for name, count in sizes.items():
        inside = SETS[name] in ("fit", "val", "id", "csid")
        scale = 1.0 if inside else 0.8 + 0.1 * (name == "b")
        features.append(np.maximum(0, scale * normals(name, count, WIDTH) + (0.5 + shift) * inside))
        columns["dataset"] += [name] * count
        columns["origin"] += ["id" if name == "s" else name] * count
        columns["group"] += [SETS[name]] * count
        columns["sample"] += [f"{row:04d}" for row in range(count)]
        columns["image"] += [f"{name}{row}" for row in range(count)]
        columns["label"] += [row % CLASSES if inside else -1 for row in range(count)]
    array = {name: np.array(values) for name, values in columns.items()}
    array["features"] = np.concatenate(features).astype(np.float32)
    array["logits"] = (array["features"] @ weight.T + bias).astype(np.float32)
    array["pred"] = array["logits"].argmax(axis=1)
    array["label"] = np.where(np.arange(len(array["label"])) % 5 > 0, array["pred"], 0) * (array["label"] >= 0) - (
        array["label"] < 0
    )
    declared = tuple(Declared(n, "id" if n == "s" else n, SETS[n], 0, c, c) for n, c in sizes.items())
    return Records(array, declared, 0, {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)})


SIZES = {"fit": 60, "val": 30, "ood-val": 30, "id": 80, "a": 50, "b": 40, "c": 45, "s": 20}


def streamed(records: Records, size: int) -> Records:
    """The same records with logits and features left outside, so many rows a piece."""
    heavy = {name: records[name] for name in ("logits", "features")}
    pieces = []
    names = records["dataset"]
    for name in dict.fromkeys(names.tolist()):
        rows = np.flatnonzero(names == name)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]

            def read(wanted: Sequence[str], part: np.ndarray = part) -> dict[str, np.ndarray]:
                return {column: heavy[column][part] for column in wanted}

            pieces.append(Piece(name, len(part), read))
    light = {name: column for name, column in records.columns.items() if name not in heavy}
    return replace(records, columns=light, pieces=tuple(pieces))


def table(found: Sequence[Metric]) -> dict[str, Metric]:
    names = [figure.name for figure in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_chunks_are_the_rows_in_order(size: int) -> None:
    records = made(SIZES)
    for source in (records, streamed(records, size)):
        chosen = source.of(lambda d: d.group in ("id", "far"))
        parts = list(chosen.chunks(["features", "sample"], 32))
        mask = np.isin(records["group"], ("id", "far"))
        for name in ("features", "sample"):
            assert np.array_equal(np.concatenate([part[name] for part in parts]), records[name][mask])
        assert len(parts) > 1 or size > 32


def test_figures_do_not_depend_on_where_features_are() -> None:
    records = made(SIZES)
    protocol, average = Protocol(PLAIN), ("msp", "react")
    whole = list(ood_metrics.metrics(records, protocol, average, 100))
    for size in (3, 50):
        again = list(ood_metrics.metrics(streamed(records, size), protocol, average, 100))
        for one, other in zip(whole, again, strict=True):
            assert one.name == other.name and abs(one.value - other.value) < 1e-9


def test_near_is_the_unweighted_mean_over_datasets_and_the_average_that_over_scores() -> None:
    records = made(SIZES)
    found = table(list(ood_metrics.metrics(records, Protocol(PLAIN, sweep=False), ("msp", "react"), 100)))
    scores = scored(records, Protocol(PLAIN, sweep=False)).scores
    group, dataset = records["group"], records["dataset"]
    near = {}
    for score in ("msp", "react"):
        each = [figures(scores[score][group == "id"], scores[score][dataset == name]) for name in "ab"]
        for name in ("auroc", "aupr_in", "aupr_out", "fpr95_ood_positive", "fpr95_id_positive", "detection_error"):
            values = [getattr(part, name) for part in each]
            figure = found[f"{name}/{score}/near"]
            assert figure.value == pytest.approx(np.mean(values), abs=1e-12)
            assert figure.low <= figure.value <= figure.high and figure.n == 80 + 50 + 40
            for dataset_name, value in zip("ab", values, strict=True):
                assert found[f"{name}/{score}/{dataset_name}"].value == pytest.approx(value, abs=1e-12)
        near[score] = found[f"auroc/{score}/near"].value
    assert found["auroc/average/near"].value == pytest.approx(np.mean(list(near.values())), abs=1e-12)
    assert found["auroc/average/near"].headline and not found["auroc/msp/near"].headline
    assert found["fpr95_ood_positive/msp/near"].better == "lower"
    full = figures(scores["msp"][np.isin(group, ("id", "csid"))], scores["msp"][group == "far"])
    assert found["auroc/msp/far-fs"].value == pytest.approx(full.auroc, abs=1e-12)
    assert found["accuracy"].value == (records["pred"] == records["label"])[group == "id"].mean()
    for role in ("id", "near", "far", "csid"):
        shares = [figure.value for name, figure in found.items() if name.startswith(f"density/msp/{role}@")]
        assert len(shares) == 32 and sum(shares) == pytest.approx(1)
    curve = [figure.value for name, figure in found.items() if name.startswith("roc/msp/near@")]
    assert curve == sorted(curve) and curve[-1] <= 1


def test_hyper_parameters_are_chosen_by_validation_and_the_first_of_equals_is_taken() -> None:
    records = made(SIZES)
    found = scored(records, Protocol(("react", "ash")))
    for name, trace in found.traces.items():
        best = max(area for _, area in trace)
        assert found.chosen[name] == next(value for value, area in trace if area == best)
    assert [value for value, _ in found.traces["react"]] == [85.0, 90.0, 95.0, 99.0]
    by_hand = scored(records, Protocol(("react", "ash"), parameters=(("ash", 70.0),)))
    assert by_hand.chosen["ash"] == 70.0 and "ash" not in by_hand.traces
    without = scored(made({name: size for name, size in SIZES.items() if name != "ood-val"}), Protocol(("react",)))
    assert without.chosen == {"react": 90.0} and not without.traces


def test_gains_are_paired_over_the_images_that_both_have() -> None:
    one, base = made(SIZES, shift=0.3), made({**SIZES, "a": 30})
    protocol = Protocol(("msp", "energy"), sweep=False)
    found = table(list(ood_metrics.gains(one, base, protocol, ("msp", "energy"), 100)))
    cut = one["dataset"] != "a"
    cut[np.flatnonzero(~cut)[:30]] = True
    ours, theirs = scored(one, protocol).scores["energy"][cut], scored(base, protocol).scores["energy"]
    group, dataset = base["group"], base["dataset"]
    expected = [
        figures(ours[group == "id"], ours[dataset == name]).auroc
        - figures(theirs[group == "id"], theirs[dataset == name]).auroc
        for name in "ab"
    ]
    gain = found["gain/auroc/energy/near"]
    assert gain.value == pytest.approx(np.mean(expected), abs=1e-12) and gain.low < gain.value < gain.high
    assert not gain.complete  # 20 images of one set are missing
    same = table(list(ood_metrics.gains(one, one, protocol, ("msp", "energy"), 100)))
    assert same["gain/auroc/average/near"].value == 0 and same["gain/auroc/average/near"].low < 0


def test_what_must_not_be_is_named() -> None:
    records = made(SIZES)
    images = records["image"].copy()
    images[records["dataset"] == "id"] = np.where(
        np.arange(80) == 7, records["image"][records["dataset"] == "fit"][3], images[records["dataset"] == "id"]
    )
    with pytest.raises(ValueError, match=r"1 images of role fit are tested too, such as fit/0003, which is id/0007"):
        scored(replace(records, columns={**records.columns, "image": images}), Protocol(("msp",)))
    logits = records["logits"].copy()
    logits[np.flatnonzero(records["dataset"] == "a")[4], 0] = np.nan
    with pytest.raises(ValueError, match="score maxlogit of image a/0004 is nan"):
        scored(replace(records, columns={**records.columns, "logits": logits}), Protocol(("maxlogit",)))


def test_remarks() -> None:
    records = made(SIZES)
    images = records["image"].copy()
    images[np.flatnonzero(records["dataset"] == "b")[2]] = records["image"][records["dataset"] == "id"][0]
    features = records["features"] - np.float32(0.3)
    odd = replace(records, columns={**records.columns, "image": images, "features": features})
    said = list(ood_metrics.notices(odd, Protocol(("msp", "ash", "knn"))))
    assert said[0] == "1 images of role near are in-distribution test images too: b/0002"
    assert said[-1].endswith("of the features are negative, and ash are made for features after a ReLU")
    assert any(
        line.startswith("score knn is left out: ")
        for line in list(ood_metrics.notices(made({**SIZES, "fit": 9}), Protocol(("msp", "knn"), sweep=False)))
    )
    assert not list(ood_metrics.notices(records, Protocol(("msp", "ash"))))


def test_features_and_the_last_layer_give_the_logits() -> None:
    network = Bayes(id="b", classes=4).loaded(Limits())
    images = Mixture(size=5).opened().read(range(5))[0]
    logits, features = network.features(images)
    assert torch.equal(logits, network.logits(images)) and features.shape == (5, 64)
    held = Ood().constants(network)
    assert np.allclose(features.numpy() @ held["weight"].T + held["bias"], logits.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scores": ["msq"]}, "there is no score 'msq'; did you mean msp"),
        ({"scores": ["msp", "odin"]}, "there is no score 'odin'"),
        ({"features": False, "scores": ["knn"], "average": []}, "score knn needs features"),
        ({"scores": ["msp"], "average": ["ash"]}, "average names 'ash'"),
        ({"scores": ["msp", "msp"], "average": []}, "one twice"),
        ({"parameters": {"msp": 3}}, "msp, which has no hyper-parameter"),
        ({"parameters": {"ash": "x"}}, "parameters.ash is 'x', not a number"),
        ({"odin": {"temperatures": []}}, "at least 1 item"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Ood.model_validate({"kind": "ood", **fields})


def write(folder: Path, **changes: Any) -> Path:
    spec = {"classes": 4}
    other = {"classes": 4, "contrast": 0.05}
    parts = {"fit": ("fit", 40, 1), "val": ("val", 20, 2), "test": ("id", 40, 3)}
    datasets = [
        {"kind": "mixture", "name": name, "group": group, "size": size, "draw": draw, "spec": spec}
        for name, (group, size, draw) in parts.items()
    ]
    others = {"tune": ("ood-val", 20, 4), "close": ("near", 30, 5), "wide": ("far", 30, 6)}
    datasets += [
        {"kind": "mixture", "name": name, "group": group, "size": size, "draw": draw, "spec": other}
        for name, (group, size, draw) in others.items()
    ]
    fields: dict[str, Any] = {"scores": ["msp", "ash", "dice", "klm", "mds", "odin"], "average": ["msp", "ash"]}
    fields |= {"gains": {"tilted": "bayes"}, "odin": {"temperatures": [1000]}}
    evaluator = {"kind": "ood", **fields, **changes}
    suite = {
        "name": "small",
        "checkpoints": [
            {"kind": "mixture", "id": "bayes", "classes": 4, "temperature": 0.01},
            {"kind": "mixture", "id": "tilted", "classes": 4, "temperature": 0.01, "tilt": 2.0},
        ],
        "benches": [{"name": "ood", "evaluator": evaluator, "datasets": datasets}],
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


def test_a_run_its_report_and_its_verification(tmp_path: Path, rdiff: Any) -> None:
    suite, root = write(tmp_path), tmp_path / "run"
    done = runs.execute(load(str(suite)), runs.Options(root))
    assert not done.failures
    rows = done.metrics.set_index(["checkpoint", "metric"])["value"]
    assert 0.9 < rows["bayes", "auroc/mds/near"] <= 1
    assert ("tilted", "gain/auroc/average/near") in rows.index and ("bayes", "auroc/odin/far") in rows.index
    assert len(list(root.rglob("constants.safetensors"))) == 12
    # Another score needs no forward; nothing is left to do, and figures are those of the records.
    code, out, err = rdiff(
        "report", str(root), "-o", str(tmp_path / "other"), "--set", "benches.0.evaluator.sweep=false"
    )
    assert code == 0, err
    code, out, err = rdiff("verify", str(root), "--recheck", "100%", "--seed", "1")
    assert code == 0, out + err
    held = next(root.rglob("constants.safetensors"))
    held.write_bytes(held.read_bytes()[:-1] + b"\x01")
    code, out, err = rdiff("verify", str(root))
    assert code == 1 and "constants.safetensors was changed" in out


def test_batches_change_no_byte(tmp_path: Path) -> None:
    suite = load(str(write(tmp_path)))
    files = []
    for batch in (1, 7, 64):
        root = tmp_path / str(batch)
        assert not any(
            outcome.failures for outcome in local("cpu")(runs.tasks_of(suite, runs.Options(root, batch=batch)))
        )
        kinds = ("*.parquet", "*.safetensors")
        files.append({path.relative_to(root): path.read_bytes() for kind in kinds for path in root.rglob(kind)})
    assert files[0] == files[1] == files[2] and len(files[0]) == 24


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        ("test", "needed are a dataset with group: id"),
        ("fit", "score dice needs a dataset with group: fit"),
        ("val", "needs a dataset with group: val"),
    ],
)
def test_a_bench_without_what_scores_need_is_refused(tmp_path: Path, rdiff: Any, drop: str, words: str) -> None:
    path = write(tmp_path)
    suite = yaml.safe_load(path.read_text())
    suite["benches"][0]["datasets"] = [d for d in suite["benches"][0]["datasets"] if d["name"] != drop]
    path.write_text(yaml.safe_dump(suite))
    code, _, err = rdiff("validate", str(path))
    assert code == 2 and words in err and len(err.splitlines()) == 1


def test_records_of_a_run_are_read_in_pieces(tmp_path: Path) -> None:
    suite = load(str(write(tmp_path))).suite
    list(local("cpu")(runs.tasks_of(load(str(tmp_path / "suite.yaml")), runs.Options(tmp_path / "run"))))
    row = [row[0] for _, row in cells(suite, suite.benches[0])]
    store = Store(tmp_path / "run")
    light, whole = store.read(row), store.read(row, whole=True)
    assert "features" not in light.columns and "features" in whole.columns
    joined = np.concatenate([part["features"] for part in light.chunks(["features"], 16)])
    assert np.array_equal(joined, whole["features"])
    assert set(light.constants) == {"weight", "bias"}
