"""The pictures of a gallery, from its records: grids of tiles, and drawings of points in the plane."""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int, UInt8

from robustbench_diffaug.diffusion.toy import Toy
from robustbench_diffaug.records import Picture, Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DRAWN", "Labels", "toy"]

MOST = 240  # points of a drawing; more only make a blot
SCALED = "(scaled to unit variance; black and white are −2 and 2)"
DATA, NOISY, DENOISED, INK = "#7a7f87", "#d55e00", "#0072b2", "#1b1d20"  # told apart by all readers, and by markers


class Labels(NamedTuple):
    """What the columns of the grids are.

    Arguments:
        times: Of panel `times`.
        solver_time: Of panel `solvers`.
        mixing: The shares of panel `mixing`.
        mixing_time: Of panel `mixing`.
        steps: Of the adaptation.
    """

    times: tuple[int, ...]
    solver_time: int
    mixing: tuple[float, ...]
    mixing_time: int
    steps: tuple[int, ...]


def _chosen(records: Records, shown: int) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """The rows of the first samples of each dataset, and what each is: its class, and its dataset if there are more."""
    rows, names = [], []
    for declared in records.declared:
        found = np.flatnonzero(records["dataset"] == declared.name)[:shown]
        rows += found.tolist()
        for row in found:
            label, front = (
                int(records["label"][row]),
                f"{declared.name.rpartition('/')[2]}\n" if len(records.declared) > 1 else "",
            )
            names.append(f"{front}class {label}" if label >= 0 else f"{front}{records['sample'][row]}")
    return np.array(rows), names


def _paired(
    first: UInt8[np.ndarray, "n h w c"], states: UInt8[np.ndarray, "n 2 k h w c"], last: UInt8[np.ndarray, "n h w c"]
) -> UInt8[np.ndarray, "r q h w c"]:
    """Two rows of each sample: a picture, then those of the state above those of the estimate, then another picture."""
    ends = [np.repeat(picture[:, None, None], 2, axis=1) for picture in (first, last)]
    return np.concatenate([ends[0], states, ends[1]], axis=2).reshape(-1, states.shape[2] + 2, *states.shape[3:])


def _times(records: Records, labels: Labels, shown: int) -> Iterator[Picture]:
    rows, names = _chosen(records, shown)
    yield Picture(
        "times",
        "Images diffused to time t and denoised in one step",
        f"Of each image: above, x = x₀ + σ(t) ε {SCALED}; below, the augmentation D(x, σ(t)).",
        _paired(records["clean"][rows], records["times"][rows], records["clean"][rows])[:, :-1],
        tuple(text for name in names for text in (f"{name}\nnoisy", "denoised")),
        ("x₀", *(f"t={t}" for t in labels.times)),
    )


def _solvers(records: Records, labels: Labels, shown: int) -> Iterator[Picture]:
    rows, names = _chosen(records, 3 * shown)
    grid = np.concatenate([records["clean"][rows][:, None], records["solvers"][rows]], axis=1)
    yield Picture(
        "solvers",
        f"One reverse step from t = {labels.solver_time}: DDIM and DPM-Solver-2",
        f"Of the same noisy image {SCALED}: DDIM's step to the end is D(x, σ(t)) itself; "
        "DPM-Solver-2 calls the denoiser twice.",
        np.swapaxes(grid, 0, 1),
        ("x₀", f"noisy, t={labels.solver_time}", "DDIM", "DPM-Solver-2"),
        tuple(name.replace("\n", " ") for name in names),
    )


def _mixing(records: Records, labels: Labels, shown: int) -> Iterator[Picture]:
    rows, names = _chosen(records, shown)
    yield Picture(
        "mixing",
        f"The share λ of the class-conditional score, at t = {labels.mixing_time}",
        "Each row is one noisy image, denoised with the score (1 − λ) s(x) + λ s(x | y), where y is its own class.",
        np.concatenate([records["clean"][rows][:, None], records["mixing"][rows]], axis=1),
        tuple(names),
        ("x₀", "noisy", *(f"λ = {share:g}" for share in labels.mixing)),
    )


def _adaptation(records: Records, labels: Labels, shown: int) -> Iterator[Picture]:
    rows, names = _chosen(records, shown)
    ends = records["adapted"][rows]
    yield Picture(
        "adaptation",
        "Steps of diffusion-driven adaptation",
        f"Of each image: above, the state of the chain {SCALED}; below, its estimate of the clean image. "
        "Each step is guided towards the low frequencies of the input.",
        _paired(ends[:, 0], records["adaptation"][rows], ends[:, 1]),
        tuple(text for name in names for text in (f"{name}\nstate", "estimate")),
        ("input", *(f"step {step}" for step in labels.steps), "adapted"),
    )


Draw: TypeAlias = Callable[[Records, Labels, int], Iterator[Picture]]
DRAWN: Mapping[str, Draw] = {"times": _times, "solvers": _solvers, "mixing": _mixing, "adaptation": _adaptation}
"""What makes the pictures of a panel."""


def toy(records: Records, settings: Toy) -> Iterator[Picture]:
    """Points of the toy's data, diffused and denoised; and one of them with its way there and back."""
    points = records["toy"].reshape(-1, 3, 2)[:MOST]
    clean, noisy, denoised = np.moveaxis(points, 1, 0)
    edge = 1.05 * float(np.abs(points).max())
    with _axes(edge) as (axes, drawn):
        axes.plot(*noisy.T, "x", color=NOISY, ms=4, mew=0.9, label=f"noisy, σ = {settings.sigma:g}")
        axes.plot(*clean.T, ".", color=DATA, ms=8, mew=0, label="data")
        axes.plot(*denoised.T, "o", color=DENOISED, ms=3.5, mfc="none", mew=0.8, label="denoised, E[x₀ | x]")
    mean = [float(settings.distance(part).mean()) for part in (noisy, denoised)]
    yield Picture(
        "toy-points",
        "Diffusing and denoising points in the plane, with the exact score",
        f"{len(points)} points near an arc, noisy, and denoised in one step: noise puts them {mean[0]:.2f} from the "
        f"arc on average, the denoiser back to {mean[1]:.2f}.",
        svg=drawn[0],
    )
    ways = [np.linalg.norm(part - denoised, axis=1) for part in (clean, noisy)]
    one = int(np.argmax(np.minimum(*ways)))  # where the two steps are long and do not overlap
    weights = settings.weights(noisy[one : one + 1])[0]
    with _axes(edge) as (axes, drawn):
        axes.plot(*clean.T, ".", color=DATA, ms=3, alpha=0.5, label="data")
        heavy = weights > 0.01 * weights.max()
        sizes = 260 * weights[heavy] / weights.max()
        across, up = settings.means()[heavy].T
        axes.scatter(across, up, sizes, color=DENOISED, alpha=0.12, lw=0, label="p(x₀ | x)")
        for start, end, colour, style in ((clean, noisy, NOISY, "-"), (noisy, denoised, DENOISED, "--")):
            way = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "linestyle": style, "shrinkA": 3, "shrinkB": 4}
            axes.annotate("", end[one], start[one], arrowprops=way)
        for point, colour, mark, text in (
            (clean, INK, "s", "x₀"),
            (noisy, NOISY, "X", "x = x₀ + σ ε: the forward step"),
            (denoised, DENOISED, "o", "E[x₀ | x]: the reverse step"),
        ):
            axes.plot(*point[one], mark, color=colour, ms=7, ls="none", label=text)
    yield Picture(
        "toy-step",
        "One point: a forward step, and one reverse step with the exact score",
        "The reverse step ends at the mean of the data that may have led to x, weighed by how likely each is (discs): "
        "near the data, and not where the point began.",
        svg=drawn[0],
    )


@contextmanager
def _axes(edge: float) -> Iterator[tuple["Axes", list[str]]]:
    """Axes of the plane to draw in, from -edge to edge, and a list that then holds the drawing."""
    import matplotlib  # heavy: half a second
    from matplotlib.figure import Figure

    drawn: list[str] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "rdiff", "font.size": 12, "axes.linewidth": 0.6})
        figure = Figure(figsize=(4.2, 5.2), facecolor="white")
        axes = figure.add_axes((0.19, 0.34, 0.79, 0.65))
        yield axes, drawn
        axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xlabel="first coordinate", ylabel="second coordinate")
        axes.set_aspect("equal")
        axes.grid(color=INK, alpha=0.1, lw=0.6)
        handles, texts = axes.get_legend_handles_labels()
        figure.legend(handles, texts, loc="upper left", bbox_to_anchor=(0.1, 0.26), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<!DOCTYPE.*?>\s*|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    drawn.append(re.sub(r"(\d\.\d{4})\d+", r"\1", text))
