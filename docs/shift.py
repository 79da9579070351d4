"""Writes docs/shift-results.md from a run of suites/shift.yaml, beside Table 1 of the DiffAug paper.

Run `rdiff run shift -o reports/shift`, then `python docs/shift.py reports/shift`.

reports/published/diffaug-table1.yaml holds Table 1 of "DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers"
(Sastry, Dumpala and Oore, NeurIPS 2024), https://arxiv.org/abs/2306.09192: top-1 accuracy in percent on ImageNet-C at
severity 5 and on the ImageNet validation set, its rows under the names that their counterparts have in the zoo.
"""

import json
import sys
from itertools import combinations
from pathlib import Path

import pandas as pd
from scipy.stats import spearmanr
from written import interval, table

from robustbench_diffaug.report import published as publications

HERE = Path(__file__).parent
MODES = {"dda": "DDA", "dda-se": "DDA-SE", "de": "DE", "default": "plain"}
SETS = {"c": "accuracy/mean", "test": "accuracy/clean"}


def name_of(mode: str, metric: str) -> str:
    return metric if mode == "default" else f"{mode}/{metric}"


def signs(values: pd.DataFrame, published: pd.DataFrame) -> list[list[str]]:
    """The orderings of the published table, and how many of their cases hold in each."""
    pairs = [(name, f"{name}+diffaug") for name in published.index if f"{name}+diffaug" in published.index]
    rows = []
    for sets, label in (("c", "corruptions"), ("test", "clean")):
        for mode, shown in MODES.items():
            column = f"{sets}_{mode}"
            held = [sum(frame.loc[b, column] > frame.loc[a, column] for a, b in pairs) for frame in (published, values)]
            rows.append([f"{label}: DiffAug above the same network without, {shown}", *(f"{n} of 5" for n in held)])
        for upper, lower in combinations(MODES, 2):
            columns = f"{sets}_{upper}", f"{sets}_{lower}"
            held = [int((frame[columns[0]] > frame[columns[1]]).sum()) for frame in (published, values)]
            rows.append([f"{label}: {MODES[upper]} above {MODES[lower]}", *(f"{n} of 10" for n in held)])
    return rows


def main(run: Path) -> None:
    metrics = pd.read_csv(run / "metrics.csv").set_index(["checkpoint", "metric"])
    manifest = json.loads((run / "manifest.json").read_text())
    published = publications.table("diffaug-table1")
    names = list(dict.fromkeys(metrics.index.get_level_values(0)))
    columns = {f"{s}_{mode}": name_of(mode, metric) for s, metric in SETS.items() for mode in MODES}
    values = pd.DataFrame({c: [100 * metrics.loc[(n, m), "value"] for n in names] for c, m in columns.items()}, names)

    def cell(name: str, column: str) -> str:
        shown = interval(*metrics.loc[(name, columns[column]), ["value", "low", "high"]])
        beside = f" ({published.loc[name, column]:.1f})" if name in published.index else ""
        return f"{shown}{beside}"

    images = int(metrics.loc[(names[0], "accuracy/clean"), "n"])
    parts = [
        "# Four modes on fifteen corruptions\n",
        f"Made by `rdiff run shift` and `docs/shift.py`; suite digest {manifest['suite']['digest']}, seed "
        f"{manifest['suite']['seed']}, torch {manifest['versions']['torch']}, {manifest['device']}. Accuracy in percent on "
        f"{images} test images of MNIST under the fifteen corruptions with the ImageNet-C constants at severity 5, with "
        "95 % intervals clustered by image. In brackets the number of the paper's Table 1 for ImageNet-C at severity 5 and "
        "the ImageNet validation set: other images, networks and a far larger denoiser, so only orderings can be compared."
        "\n",
    ]
    for sets, title in (("c", "Corrupted"), ("test", "Clean")):
        rows = [[name, *(cell(name, f"{sets}_{mode}") for mode in MODES)] for name in names]
        parts += [f"## {title}\n", table(["network", *MODES.values()], rows) + "\n"]
    common = values.loc[published.index]
    rows = []
    for sets, label in (("c", "corruptions"), ("test", "clean")):
        for mode, shown in MODES.items():
            found = spearmanr(common[f"{sets}_{mode}"], published[f"{sets}_{mode}"]).statistic
            rows.append([f"{label}, {shown}", f"{found:.2f}"])
    parts.append("## Orderings\n")
    parts.append("Rank correlation (Spearman) of the ten classifiers with the paper's, by mode:\n")
    parts.append(table(["", "correlation"], rows) + "\n")
    parts.append("How often an ordering holds in the paper's table and here, of values alone:\n")
    parts.append(table(["ordering", "paper", "here"], signs(common, published)) + "\n")
    reading = HERE / "shift-reading.md"
    parts += [reading.read_text()] if reading.exists() else []
    (HERE / "shift-results.md").write_text("\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
