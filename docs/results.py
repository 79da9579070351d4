"""Writes docs/results.md from the metrics of a run of suites/mnist.yaml.

Run `rdiff run mnist -o reports/mnist`, then `python docs/results.py reports/mnist`.
"""

import json
import sys
from pathlib import Path

import pandas as pd
from written import interval, table

SHIFT = {
    "clean": "accuracy/clean",
    "clean, DE": "de/accuracy/clean",
    "corrupted": "accuracy/mean",
    "corrupted, DE": "de/accuracy/mean",
    "noise": "accuracy/mean-noise",
    "noise, DE": "de/accuracy/mean-noise",
    "digits": "accuracy/digits",
    "digits, DE": "de/accuracy/digits",
}
RADII = ("0.00", "0.125", "0.25", "0.375", "0.50", "0.75", "1.00")


def cell(row: pd.Series, scale: float = 100, digits: int = 1) -> str:
    """A figure with its interval."""
    return interval(row["value"], row["low"], row["high"], scale, digits)


def main(run: Path) -> None:
    metrics = pd.read_csv(run / "metrics.csv")
    manifest = json.loads((run / "manifest.json").read_text())
    at = metrics.set_index(["checkpoint", "group", "metric"])
    by_name = metrics.set_index(["checkpoint", "metric"])
    networks = list(dict.fromkeys(metrics["checkpoint"]))
    parts = ["# Results of `suites/mnist.yaml`\n"]
    parts.append(
        f"Made by `rdiff run mnist` and `docs/results.py`; suite digest {manifest['suite']['digest']}, seed "
        f"{manifest['suite']['seed']}, torch {manifest['versions']['torch']}, {manifest['device']}. All intervals are "
        "95 %; those of means over corruptions resample images. Corruptions have the ImageNet-C constants at severity "
        "5, on all 1,000 test images; digits are the 1,797 UCI digits. DE is the DiffAug ensemble, t = 0, 50, ..., 450.\n"
    )
    rows = [[name, *(cell(by_name.loc[(name, metric)]) for metric in SHIFT.values())] for name in networks]
    parts.append("## Covariate shift: accuracy in percent\n\n" + table(["network", *SHIFT], rows) + "\n")
    gains = [
        [name, *(cell(by_name.loc[(name, f"de/gain/{part}")]) for part in ("mean", "mean-noise"))] for name in networks
    ]
    parts.append("DE minus plain, paired by image, in points:\n")
    parts.append(table(["network", "ten corruptions", "three noises"], gains) + "\n")
    groups = list(dict.fromkeys(metrics.loc[metrics["metric"].str.match(r"accuracy/.+@s5"), "group"]))
    rows = [
        [group, *(f"{at.loc[(name, group, f'{mode}accuracy/{group}@s5'), 'value'] * 100:.1f}" for name in networks
                  for mode in ("", "de/"))]
        for group in groups
    ]  # fmt: skip
    heads = ["corruption", *(f"{name}{mode}" for name in networks for mode in ("", ", DE"))]
    parts.append("## Each corruption at severity 5: accuracy in percent\n\n" + table(heads, rows) + "\n")
    for sigma in ("sigma=0.25", "sigma=0.5"):
        rows = [
            [name, *(cell(at.loc[(name, sigma, f"certified@{radius}")]) for radius in RADII),
             cell(at.loc[(name, sigma, "acr")], 1, 3), cell(at.loc[(name, sigma, "abstain")])]
            for name in networks
        ]  # fmt: skip
        heads = ["network", *(f"r = {radius}" for radius in RADII), "average radius", "abstains"]
        parts.append(f"## Certified accuracy in percent, {sigma.replace('=', ' = ')}\n\n" + table(heads, rows) + "\n")
    parts.append("200 test images, n0 = 100, n = 1,000, alpha = 0.001, through the bundled DDPM.")
    (Path(__file__).parent / "results.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
