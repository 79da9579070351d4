"""Writes docs/certify-results.md from a run of suites/certify.yaml, in the layout of the paper's Table 13 and Fig. 10.

Run `rdiff run certify -o reports/certify`, then `python docs/certify.py reports/certify`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from written import interval, table

from robustbench_diffaug import paired
from robustbench_diffaug.engine import cells
from robustbench_diffaug.evaluators.certificates import certify
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import load

PAIRS = [
    ("resnet-standard+diffaug", "resnet-standard"),
    ("resnet-augmix+diffaug", "resnet-augmix"),
    ("resnet-deepaugment+diffaug", "resnet-deepaugment"),
    ("resnet-deepaugment-augmix+diffaug", "resnet-deepaugment-augmix"),
    ("vit-standard+diffaug", "vit-standard"),
    ("resnet-synth+diffaug", "resnet-synth"),
]


def main(run: Path) -> None:
    metrics = pd.read_csv(run / "metrics.csv")
    manifest = json.loads((run / "manifest.json").read_text())
    bench = metrics[metrics["bench"] == "certify"]
    at = bench.set_index(["checkpoint", "group", "metric"])
    names = list(dict.fromkeys(bench["checkpoint"]))
    groups = [group for group in dict.fromkeys(bench["group"]) if group.startswith("sigma=")]
    found = bench["metric"].str.extract(r"^certified@(.+)$")[0].dropna().unique()
    radii = sorted(found, key=float)

    def cell(name: str, group: str, metric: str, scale: float = 100, digits: int = 1) -> str:
        return interval(*at.loc[(name, group, metric), ["value", "low", "high"]], scale, digits)

    images = int(bench["n"].iloc[0])
    parts = [
        "# Certificates of the zoo\n",
        f"Made by `rdiff run certify` and `docs/certify.py`; suite digest {manifest['suite']['digest']}, seed "
        f"{manifest['suite']['seed']}, torch {manifest['versions']['torch']}, {manifest['device']}. Certified accuracy in "
        f"percent on {images} test images of MNIST at l2 radii of pixels in [0, 1], through the bundled DDPM in one step; "
        "n0 = 100, n = 1,000, alpha = 0.001. Intervals are 95 %, Clopper and Pearson's, of the test images.\n",
        "## The best noise level of each radius (the layout of the paper's Table 13)\n",
        table(
            ["network", *radii],
            [[name, *(cell(name, "all sigmas", f"certified-envelope@{r}") for r in radii)] for name in names],
        )
        + "\n",
        "The same with the level chosen on one half of the images and measured on the other, which is what can be claimed:\n",
        table(
            ["network", *radii],
            [[name, *(cell(name, "all sigmas", f"certified-selected@{r}") for r in radii)] for name in names],
        )
        + "\n",
    ]
    for group in groups:
        rows = [
            [
                name,
                *(cell(name, group, f"certified@{r}") for r in radii),
                cell(name, group, "acr", 1, 3),
                cell(name, group, "abstain"),
            ]
            for name in names
        ]
        parts += [f"## {group} (Fig. 10)\n", table(["network", *radii, "acr", "abstain"], rows) + "\n"]
    parts += ["## DiffAug against the same network without it\n", differences(run, radii) + "\n"]
    parts.append((Path(__file__).parent / "certify-reading.md").read_text())
    (Path(__file__).parent / "certify-results.md").write_text("\n".join(parts).rstrip() + "\n")


def differences(run: Path, radii: list[str]) -> str:
    """Differences in points at each level and radius, paired by image, with McNemar's p-values after Holm."""
    suite = load("certify").suite
    bench = suite.benches[0]
    assert isinstance(bench.evaluator, Smoothing)
    hits: dict[tuple[str, float, str], np.ndarray] = {}
    ((_, row),) = cells(suite, bench)
    for one in row:
        name, records = one.checkpoint.id, Store(run).read((one,))
        for index, sigma in enumerate(bench.evaluator.sigmas):
            votes = records["select"][:, index], records["estimate"][:, index]
            certificates = certify(*votes, sigma, bench.evaluator.alpha)
            right = certificates.prediction == records["label"]
            for radius in radii:
                hits[name, sigma, radius] = right & (certificates.radius >= float(radius))
    tests = [(a, b, sigma, r) for a, b in PAIRS for sigma in bench.evaluator.sigmas for r in radii]
    p = paired.holm(np.array([paired.mcnemar(hits[a, s, r], hits[b, s, r]) for a, b, s, r in tests]))
    shown = dict(zip(tests, p, strict=True))
    rows = [
        [
            f"{a} - {b}",
            f"{sigma:g}",
            *(
                f"{100 * (hits[a, sigma, r].mean() - hits[b, sigma, r].mean()):+.1f} ({shown[a, b, sigma, r]:.2g})"
                for r in radii
            ),
        ]
        for a, b in PAIRS
        for sigma in bench.evaluator.sigmas
    ]
    return table(["difference, points (p)", "sigma", *radii], rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
