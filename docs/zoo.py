"""Writes docs/zoo.md from the records of a run of suites/zoo.yaml.

Run `rdiff run zoo -o reports/zoo`, with `--with FILE` for further seeds (entries named NAME.SEED), then
`python docs/zoo.py reports/zoo`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from written import interval, table

from robustbench_diffaug import paired
from robustbench_diffaug.engine import cells
from robustbench_diffaug.records import Records
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import load

COLUMNS = {
    "clean": "accuracy/clean",
    "ten corruptions": "accuracy/mean",
    "ten corruptions, DE": "de/accuracy/mean",
    "digits": "accuracy/digits",
}
PAIRS = [
    ("resnet-standard+diffaug", "resnet-standard"),
    ("resnet-augmix+diffaug", "resnet-augmix"),
    ("resnet-augmix+diffaug", "resnet-augmix-extra"),
    ("resnet-augmix+diffaug", "resnet-augmix+diffaug-0-500"),
    ("resnet-augmix+diffaug", "resnet-augmix+diffaug-500-1000"),
    ("resnet-deepaugment+diffaug", "resnet-deepaugment"),
    ("resnet-deepaugment-augmix+diffaug", "resnet-deepaugment-augmix"),
    ("vit-standard+diffaug", "vit-standard"),
    ("resnet-synth+diffaug", "resnet-synth"),
    ("resnet-synth", "resnet-standard"),
]


def records_of(run: Path, extra: tuple[Path, ...]) -> dict[str, Records]:
    """What each network answered to the corrupted images."""
    suite = load("zoo", extra=extra).suite
    grid = [row for _, row in cells(suite, suite.benches[0])]
    store, found = Store(run), {}
    for index, entry in enumerate(suite.checkpoints):
        found[entry.id] = store.read([row[index] for row in grid]).of(lambda dataset: dataset.severity > 0)
    return found


def hits(records: Records, ensemble: bool) -> np.ndarray:
    """Whether each image was classified right."""
    pred = records["de_pred"][:, -1] if ensemble else records["pred"]
    return (pred == records["label"]).astype(float)


def main(run: Path, *extra: str) -> None:
    metrics = pd.read_csv(run / "metrics.csv").set_index(["checkpoint", "metric"])
    manifest = json.loads((run / "manifest.json").read_text())
    shipped = [entry.id for entry in load("zoo").suite.checkpoints]
    parts = ["# The zoo\n"]
    parts.append(
        f"Made by `rdiff run zoo` and `docs/zoo.py`; suite digest {manifest['suite']['digest']}, seed "
        f"{manifest['suite']['seed']}, torch {manifest['versions']['torch']}, {manifest['device']}. Accuracy in percent "
        "on all 1,000 test images, under ten corruptions with the ImageNet-C constants at severity 5, and on the 1,797 "
        "UCI digits; DE is the DiffAug ensemble, t = 0, 50, ..., 450. Intervals are 95 %, over test images (clustered by "
        "image), of the one network that is shipped; what another training seed would change stands below.\n"
    )
    rows = [
        [name, *(interval(*metrics.loc[(name, metric), ["value", "low", "high"]]) for metric in COLUMNS.values())]
        for name in shipped
    ]
    parts.append(table(["network", *COLUMNS], rows) + "\n")
    found = records_of(run, tuple(map(Path, extra)))
    rows = []
    for better, worse in PAIRS:
        row = [f"{better} - {worse}"]
        for ensemble in (False, True):
            after, before = hits(found[better], ensemble), hits(found[worse], ensemble)
            clusters, key = found[better].clusters(), found[better].key("zoo", better, worse)
            row.append(interval(*paired.paired_difference(after, before, clusters, key)[:3]))
        rows.append(row)
    parts.append("## Differences on the ten corruptions, in points, paired by image\n")
    parts.append(table(["difference", "plain", "DE"], rows) + "\n")
    seeds: dict[str, list[str]] = {}
    for name in dict.fromkeys(metrics.index.get_level_values(0)):
        stem, _, seed = name.rpartition(".")
        if seed.isdigit():
            seeds.setdefault(stem, []).append(name)
    if seeds:
        rows = []
        for stem, others in seeds.items():
            for label, metric in COLUMNS.items():
                values = [100 * metrics.loc[(name, metric), "value"] for name in (stem, *others)]
                spread = f"{min(values):.1f} to {max(values):.1f}"
                rows.append([stem, label, ", ".join(f"{value:.1f}" for value in values), spread])
        parts.append("## Three training seeds\n")
        parts.append(
            "The shipped network first (the median of the three by clean accuracy). This spread is of training; the "
            "intervals above are of the test images.\n"
        )
        parts.append(table(["network", "", "each seed", "spread"], rows) + "\n")
    here = Path(__file__).parent
    reading = here / "zoo-reading.md"
    parts += [reading.read_text()] if reading.exists() else []
    (here / "zoo.md").write_text("\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
