"""A page of many checkpoints: its size, what it takes to write, and to open in Chromium.

    python benchmarks/page.py [--checkpoints 50] [--metrics 200] [--repetitions 5] [-o FILE]

The metrics are made up: corruptions by severity, accuracies and entropies against t, certificates by radius, areas
under ROC curves, cosines of gradients. `open` is from the beginning of the navigation to the second frame after the
load event, so that what is seen has been laid out and painted; the median counts. Processor times are of this process,
and of the main thread of the page, for a machine that does other things too.
"""

import argparse
import os
import platform
import tempfile
import time
from importlib.metadata import version
from math import sin
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd

from robustbench_diffaug.report.page import render

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
CORRUPTIONS = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog brightness "
    "contrast elastic_transform pixelate jpeg_compression speckle_noise gaussian_blur spatter saturate"
).split()
HEADLINES = {"accuracy/clean", "accuracy/mean", "de/accuracy/mean", "acr", "certified@0.50", "auroc/average/near"}
PAINTED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"


def names(count: int) -> list[tuple[str, str, str]]:
    """The first metrics of a run on all axes: bench, metric, group; more severities where they are too few."""
    made = [("shift", "accuracy/clean", "clean"), ("shift", "accuracy/mean", "corruptions")]
    made += [("shift", "de/accuracy/mean", "corruptions"), ("shift", "de/gain/mean", "corruptions")]
    made += [
        ("ood", f"auroc/{score}/{part}", part) for score in ("average", "msp", "scale") for part in ("near", "far")
    ]
    made += [("gradients", f"pag_cosine@t={t}", "clean") for t in range(0, 1000, 100)]
    made += [("noise", f"{what}@t={t}", "clean") for what in ("accuracy", "entropy") for t in range(0, 1000, 50)]
    for sigma in ("0.25", "0.50"):
        made += [("certify", f"certified@{step / 4:.2f}", f"sigma={sigma}") for step in range(13)]
        made += [("certify", metric, f"sigma={sigma}") for metric in ("acr", "abstain")]
    severity = 5
    while len(made) < count:
        made += [("shift", f"accuracy/{name}@s{severity}", name) for name in CORRUPTIONS]
        severity = severity - 1 or 6
    return made[:count]


def made_up(checkpoints: int, metrics: int) -> pd.DataFrame:
    """Metrics in long form."""
    rows: list[dict[str, Any]] = []
    for number in range(checkpoints):
        for at, (bench, metric, group) in enumerate(names(metrics)):
            value = 0.5 + 0.4 * sin(1.7 * at) + 0.05 * sin(number * (at + 1))
            rows.append({
                "suite": "large", "bench": bench, "evaluator": bench, "checkpoint": f"resnet50-recipe-{number:02d}",
                "group": group, "metric": metric, "value": value, "low": value - 0.01, "high": value + 0.01,
                "n": 10_000, "n_available": 50_000, "better": "higher", "unit": "fraction", "complete": True,
                "headline": metric in HEADLINES,
            })  # fmt: skip
    return pd.DataFrame(rows)


class Opened(NamedTuple):
    """Seconds until a page is painted, and those that its main thread worked."""

    wall: float
    cpu: float


def opened(path: Path, repetitions: int) -> list[Opened]:
    """Opens the page in new tabs, one after the other."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for _ in range(repetitions + 1):  # the first warms up
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.goto(path.as_uri())
            wall = float(page.evaluate(PAINTED)) / 1000
            measured = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
            found.append(Opened(wall, measured["TaskDuration"]))
            page.close()
        browser.close()
    return found[1:]


def main() -> None:
    """Prints what a page takes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--metrics", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="where the page is kept")
    chosen = parser.parse_args()
    metrics = made_up(chosen.checkpoints, chosen.metrics)
    start, began = time.perf_counter(), time.process_time()
    page = render(metrics, {}, pd.DataFrame()).encode()
    seconds, worked = time.perf_counter() - start, time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.output or Path(folder, "index.html")
        path.write_bytes(page)
        times = opened(path.resolve(), chosen.repetitions)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, pandas {version('pandas')}, matplotlib {version('matplotlib')}"
    )
    print(f"{chosen.checkpoints} checkpoints, {chosen.metrics} metrics each: {len(page) / 1e6:.2f} MB")
    print(f"written in {seconds:.1f} s, {worked:.1f} s of the processor")
    walls, cpus = zip(*times, strict=True)
    print(f"open in {median(walls):.2f} s (median of {len(walls)}; {min(walls):.2f} to {max(walls):.2f} s)")
    print(f"{median(cpus):.2f} s of the main thread's processor time")


if __name__ == "__main__":
    main()
