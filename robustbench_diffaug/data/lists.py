"""Image lists: a text file that names images below a folder, one a line, with their labels."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from robustbench_diffaug.component import Outside
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.data.image_files import Geometry, Listing, opened
from robustbench_diffaug.files import DataLocation, existing

__all__ = ["Below", "ImageList"]


class ImageList(Dataset):
    """The images of an image list, as OpenOOD's benchmarks have them.

    Arguments:
        list: A text file of lines 'path/below/root.png 3'; the label -1 is for none.
        root: The folder that the paths start at.
        mode: 'RGB' or 'L' (grey).
        resize: The shorter side, in pixels, before the crop; bilinear.
        crop: Height and width of the crop from the centre; left out, all images must be of one size.

    References:
        OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection (Zhang et al., 2023),
        https://arxiv.org/abs/2306.09301; the lists: https://github.com/Jingkang50/OpenOOD
    """

    kind: Literal["imglist"] = "imglist"
    list: DataLocation
    root: DataLocation
    mode: Literal["RGB", "L"] = "RGB"
    resize: PositiveInt | None = None
    crop: PositiveInt | None = None
    threads: Annotated[int, Field(ge=1), Outside] = 4

    def contents(self) -> str:
        """SHA-256 over the path, size and label of every image; their pixels are digested in their records."""
        return self._listing().digest()

    def open(self) -> Images:
        """The images, read when they are needed, in the order of the list; an id is the path below the root.

        Raises:
            ValueError: If a line is no path and label, names an image twice, one that is not there, or one that is not
                below the root.
        """
        return opened(self.name, self._listing(), Geometry(self.mode, self.resize, self.crop), self.threads)

    def _listing(self) -> Listing:
        root = existing(self.root)
        if not root.is_dir():
            raise ValueError(f"{self.root} is not a folder")
        try:
            text = existing(self.list).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.list} is not a readable text: {error}") from error
        labels: dict[str, int] = {}
        below = Below(root)
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                path, label = _entry(line)
                if path in labels:
                    raise ValueError(f"names {path} a second time; take one out")
                below[path]
            except ValueError as error:
                raise ValueError(f"{self.list}:{number} {error}") from error
            labels[path] = label
        if not labels:
            raise ValueError(f"{self.list} is empty; needed are lines of a path and a label")
        return Listing(root, tuple(labels), tuple(labels.values()), tuple(labels))


def _entry(line: str) -> tuple[str, int]:
    """The path and the label of a line."""
    path, _, label = line.strip().replace("\t", " ").rpartition(" ")
    if not path or not re.fullmatch("-1|[0-9]{1,9}", label):
        raise ValueError(f"is {line.strip()[:80]!r}; needed are a path and a label (-1 for none), as 'test/a.png 3'")
    return PurePosixPath(path.strip()).as_posix(), int(label)


class Below:
    """The files below a root that a third party's file names.

    Arguments:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.real = root, root.resolve()
        self.folders: dict[Path, Path] = {}

    def __getitem__(self, path: str) -> Path:
        """The file.

        Raises:
            ValueError: If it is not there, or the path leads out of the root, by itself or through links; the message
                begins with 'names'.
        """
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\0" in path or not pure.parts:
            raise ValueError(f"names {path[:200]!r}, which is not a path below {self.root}")
        target = self.root / pure
        try:
            if target.parent not in self.folders:
                self.folders[target.parent] = target.parent.resolve()
            real = target.resolve() if target.is_symlink() else self.folders[target.parent]
            there = target.is_file()
        except (OSError, RuntimeError) as error:  # names that are too long, loops of links
            raise ValueError(f"names {path[:200]!r}, which cannot be read: {error}") from error
        if not real.is_relative_to(self.real):
            raise ValueError(f"names {path[:200]!r}, which a link leads out of {self.root}; put the files there")
        if not there:
            raise ValueError(f"names {path[:200]!r}, and there is no such file below {self.root}; check root")
        return target
