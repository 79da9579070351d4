"""What a training run says of itself while it goes on: a CSV file, TensorBoard, and a picture at the end."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustbench_diffaug.files import atomic

if TYPE_CHECKING:
    from robustbench_diffaug.train.loop import Step

__all__ = ["Log", "draw"]

EVERY = 50  # steps in a row of the file


class Log:
    """Means over every 50 steps, added to `log.csv` as they come.

    Arguments:
        folder: Of the training run.
        tensorboard: Whether events for TensorBoard are written too.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.path = folder / "log.csv"
        self.window: list[Mapping[str, float]] = []
        self.writer = _writer(folder / "tensorboard") if tensorboard else None
        self.open = False

    def add(self, step: "Step", last: bool) -> None:
        """Takes a step in; writes a row at every 50th and at the last."""
        right = {} if step.right is None else {"accuracy": step.right}
        self.window.append({"lr": step.lr, **step.losses, **right})
        if step.number % EVERY and not last:
            return
        row = {name: sum(values[name] for values in self.window) / len(self.window) for name in self.window[0]}
        self.window.clear()
        if not self.open:
            self._begin(step.number, list(row))
        with self.path.open("a", encoding="ascii") as file:
            file.write(",".join([str(step.number), *(f"{value:.6g}" for value in row.values())]) + "\n")
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(name, value, step.number)
            self.writer.flush()

    def _begin(self, number: int, names: list[str]) -> None:
        """Keeps the rows of a run that was stopped, up to its last saved state."""
        rows = [row for row in read(self.path) if int(row["step"]) < number and list(row)[1:] == names]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["step", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic(self.path) as file:
            file.write(text.getvalue().encode())
        self.open = True


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a log; a last row that was cut off is left out."""
    if not path.exists():
        return []
    rows = csv.DictReader(path.read_text(encoding="ascii").splitlines())
    return [row for row in rows if None not in row.values() and row["step"].isdigit()]


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs the package tensorboard; pip install tensorboard") from error
    return SummaryWriter(str(folder))


def draw(log: Path, picture: Path, name: str) -> None:
    """Draws the terms of the loss, and the accuracy where there is one, against the step."""
    from matplotlib.figure import Figure

    rows = read(log)
    steps = [int(row["step"]) for row in rows]
    names = [key for key in rows[0] if key not in ("step", "lr", "accuracy")]
    panels = 2 if "accuracy" in rows[0] else 1
    figure = Figure(figsize=(5 * panels, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for key in names:
        axes[0].plot(steps, [float(row[key]) for row in rows], label=key)
    axes[0].set(xlabel="step", ylabel="weighted loss", yscale="log", title=name)
    axes[0].legend(frameon=False)
    if panels == 2:
        axes[1].plot(steps, [100 * float(row["accuracy"]) for row in rows])
        axes[1].set(xlabel="step", ylabel="training accuracy (%)", ylim=(0, 101))
    for axis in axes:
        axis.grid(alpha=0.3)
    with atomic(picture) as file:
        figure.savefig(file, format="png")
