"""A made-up run of the size of the real ones: 4 checkpoints, 10 corruptions, 10 times, 2 noise levels, 13 radii."""

import shutil
from collections.abc import Callable, Iterator
from math import exp, log, nan, sin, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

CHECKPOINTS = ("resnet-standard", "resnet-standard+diffaug", "vit-standard", "vit-standard+diffaug")
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
UNFOLD = (  # what is folded, and what would be laid out only near the window, where it would not count
    "for (const details of document.querySelectorAll('details')) details.open = true;"
    "for (const section of document.querySelectorAll('section')) section.style.contentVisibility = 'visible'"
)
Opened: TypeAlias = "Callable[..., Page]"
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")
CORRUPTIONS = (*NOISES, "defocus_blur", "motion_blur", "fog", "brightness", "contrast", "pixelate", "jpeg_compression")
TIMES = tuple(range(50, 550, 50))
RADII = tuple(step * 0.25 for step in range(13))
HEADLINES = (
    "accuracy/clean", "accuracy/digits", "accuracy/mean", "de/accuracy/mean", "de/gain/mean", "certified@0.50", "acr",
)  # fmt: skip
UNITS = {"entropy": "nats", "acr": "pixels", "forwards": "count"}
LOWER = ("ece", "entropy", "abstain", "forwards")


def row(checkpoint: str, metric: str, group: str, value: float, width: float, **changed: object) -> dict[str, object]:
    """One row of metrics of a bench, `width` being half that of its interval."""
    kind = metric.removeprefix("de/").split("/")[0].split("@")[0]
    certificate = kind in ("certified", "acr", "abstain", "forwards")
    unit, n = UNITS.get(kind, "fraction"), 500 if certificate else 1500
    low, high = (value - width, value + width) if width else (nan, nan)
    if kind not in ("gain", "acr", "entropy") and width:
        low, high = max(0.0, low), min(1.0, high)
    found: dict[str, object] = {
        "suite": "small-shift", "bench": "certificates" if certificate else "shift",
        "evaluator": "smoothing" if certificate else "shift", "checkpoint": checkpoint, "group": group,
        "metric": metric, "headline": metric in HEADLINES,
        "value": value, "low": low, "high": high, "n": n, "n_available": 1500,
        "better": "lower" if kind in LOWER else "higher", "unit": unit, "complete": True,
    }  # fmt: skip
    return found | changed


class Wave:
    """Numbers that look irregular, and are the same each time."""

    def __init__(self, start: int) -> None:
        self.at = float(start)

    def __call__(self) -> float:
        """The next one, in [-1, 1]."""
        self.at += 1.7
        return sin(self.at * self.at)


def _shift(checkpoint: str, level: float, noise: Wave) -> list[dict[str, object]]:
    """Rows of the shift evaluator for a checkpoint of accuracy `level`."""
    robust = 0.12 if "diffaug" in checkpoint else 0.0
    made = []
    for mode, gained in (("", 0.0), ("de/", 0.06)):
        found = {}
        for number, corruption in enumerate(CORRUPTIONS):
            value = float(np.clip(level - 0.55 + 0.05 * number + robust + gained + 0.03 * noise(), 0, 1))
            found[corruption] = value
            made += [
                row(checkpoint, f"{mode}accuracy/{corruption}{end}", corruption, value, 0.025) for end in ("@s5", "")
            ]
        value = level - gained / 3
        made.append(row(checkpoint, f"{mode}accuracy/clean", "clean", value, 1.96 * sqrt(value * (1 - value) / 1500)))
        made.append(row(checkpoint, f"{mode}accuracy/digits", "digits", level - 0.3 + robust / 2 + gained, 0.031))
        made.append(row(checkpoint, f"{mode}accuracy/mean", "corruptions", float(np.mean(list(found.values()))), 0.018))
        made.append(
            row(checkpoint, f"{mode}accuracy/mean-noise", "noise", float(np.mean([found[c] for c in NOISES])), 0.02)
        )
        for number, group in enumerate(("clean", "corruptions")):
            made.append(row(checkpoint, f"{mode}ece", group, 0.03 + 0.09 * number + 0.01 * noise(), 0.01))
    made.append(row(checkpoint, "de/gain/mean", "corruptions", 0.055 - robust / 2, 0.011))
    made.append(row(checkpoint, "de/gain/mean-noise", "noise", -0.0004, 0.014))
    for time in TIMES:
        for group, less in (("clean", 0.0), ("corruptions", 0.2)):
            value = (level - less) * exp(-((time / (320 + 900 * robust)) ** 2)) + 0.05
            made.append(row(checkpoint, f"accuracy@t={time}", group, value, 0.02))
            made.append(row(checkpoint, f"de/accuracy@t<={time}", group, min(1.0, value + 0.05), 0.02))
            entropy = log(10) * (1 - exp(-time / (500 - 1500 * robust))) * (1.5 + less - level)
            made.append(row(checkpoint, f"entropy@t={time}", group, entropy, 0.04))
    return made


def _smoothing(checkpoint: str, level: float) -> list[dict[str, object]]:
    """Rows of the smoothing evaluator."""
    robust = 0.35 if "diffaug" in checkpoint else 0.0
    made = []
    for sigma in (0.25, 0.5):
        group, reach = f"sigma={sigma:.2f}", 4 * sigma
        for radius in RADII:
            value = (
                max(0.0, (level - sigma / 3) * (1 - (radius / reach / (0.6 + robust)) ** 1.5))
                if radius < reach
                else 0.0
            )
            made.append(
                row(checkpoint, f"certified@{radius:.2f}", group, value, 1.96 * sqrt(value * (1 - value) / 500 + 2e-6))
            )
        made.append(row(checkpoint, "acr", group, level * reach * (0.4 + robust / 2), 0.03))
        made.append(row(checkpoint, "abstain", group, 0.02 + sigma / 20, 0.012))
        made.append(row(checkpoint, "forwards/classifier", group, 100_100, 0.0))
        made.append(row(checkpoint, "forwards/denoiser", group, 100_100, 0.0))
    return made


def made_metrics(names: tuple[str, ...] = CHECKPOINTS) -> pd.DataFrame:
    """The metrics of the run, its checkpoints called `names`."""
    rows: list[dict[str, object]] = []
    for number, (checkpoint, name) in enumerate(zip(CHECKPOINTS, names, strict=True)):
        level = (0.931, 0.927, 0.894, 0.899)[number]
        noise = Wave(number)
        rows += [
            found | {"checkpoint": name} for found in _shift(checkpoint, level, noise) + _smoothing(checkpoint, level)
        ]
    return pd.DataFrame(rows)


def made_manifest(names: tuple[str, ...] = CHECKPOINTS) -> dict[str, Any]:
    """What such a run writes down."""
    shift = {"kind": "shift", "modes": ["default", "de"], "times": list(TIMES), "precision": "float32", "batch": 64}
    smoothing = {
        "kind": "smoothing",
        "sigma": [0.25, 0.5],
        "n0": 100,
        "n": 100000,
        "alpha": 0.001,
        "radii": list(RADII),
    }
    corruptions = [
        {"bench": "shift", "name": name, "group": name, "severity": 5, "n": 1500, "n_available": 1500,
         "digest": f"{number:02x}" * 32, "constants": "cifar10-c"}
        for number, name in enumerate(CORRUPTIONS)
    ]  # fmt: skip
    return {
        "schema_version": 1,
        "rdiff": "0.1.0",
        "suite": {"name": "small-shift", "digest": "9f" * 32, "seed": 0},
        "device": "cpu (AMD EPYC 9B14)",
        "threads": 2,
        "versions": {"python": "3.11.9", "torch": "2.13.0", "timm": "1.0.20", "diffusers": "0.38.0", "numpy": "2.4.6"},
        "checkpoints": [
            {"id": name, "kind": "local", "arch": "resnet20" if "resnet" in name else "vit_tiny", "sha256": "ab" * 32,
             "parameters": 272474, "classes": 10, "preprocess": {"size": 28, "mean": [0.5], "std": [0.5]}}
            for name in names
        ],
        "denoisers": [{"kind": "unet", "sha256": "cd" * 32, "parameters": 1_800_000}],
        "datasets": [
            {"bench": "shift", "name": "mnist5k", "group": "clean", "n": 1500, "digest": "ee" * 32},
            *corruptions,
        ],
        "benches": [{"name": "shift", "evaluator": shift}, {"name": "certificates", "evaluator": smoothing}],
        "seconds": {"total": 812.25, "measure": 790.5, "report": 2.75},
        "notices": ["The denoiser was trained on the same images as the classifiers."],
        "failures": [],
        "started": "2026-11-23T09:12:44Z",
        "finished": "2026-11-23T09:26:16Z",
    }  # fmt: skip


def made_costs(names: tuple[str, ...] = CHECKPOINTS) -> pd.DataFrame:
    """What its cells took."""
    return pd.DataFrame([
        {"bench": "shift", "checkpoint": name, "dataset": dataset, "samples": 1500, "seconds": 2.5 + number / 7,
         "samples_per_second": 1500 / (2.5 + number / 7), "peak_memory_mb": 412.0}
        for name in names for number, dataset in enumerate(("clean", *CORRUPTIONS))
    ])  # fmt: skip


@pytest.fixture(scope="session")
def metrics() -> pd.DataFrame:
    """The metrics of the made-up run."""
    return made_metrics()


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    """Its manifest."""
    return made_manifest()


@pytest.fixture(scope="session")
def costs() -> pd.DataFrame:
    """Its costs."""
    return made_costs()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium, without which the page is not tested; of a module, as other tests may start their own."""
    if shutil.which(CHROMIUM) is None:
        pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def opened(browser: "Browser", tmp_path: Path) -> Iterator[Opened]:
    """Opens a text as a page, and finds at the end that it was silent: no request, no error, no dialog."""
    heard: list[str] = []
    pages: "list[Page]" = []

    def dismiss(dialog: "Dialog") -> None:
        heard.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open_page(content: str, scheme: Any = "light") -> "Page":
        (tmp_path / "index.html").write_text(content, encoding="utf-8")
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 800})
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", dismiss)
        page.on("request", lambda request: heard.append(request.url))
        page.goto((tmp_path / "index.html").as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [what for what in heard if not what.startswith(("file:", "data:"))] == []
