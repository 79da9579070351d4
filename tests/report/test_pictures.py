"""Pictures as files and in the page: what is drawn is what was recorded, and nothing of it leads elsewhere."""

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robustbench_diffaug import rng, runs
from robustbench_diffaug.evaluators.gallery import Gallery
from robustbench_diffaug.folder import put
from robustbench_diffaug.records import Picture
from robustbench_diffaug.report import pictures
from robustbench_diffaug.report.page import render
from robustbench_diffaug.shown import Shown, shown
from robustbench_diffaug.suite import load
from robustbench_diffaug.verify import whole
from tests.report.conftest import made_metrics

HOSTILE = '"><script>alert(1)</script><img src=http://x.invalid/>'
NO_METRICS = made_metrics().head(0)  # a page without charts is quickly made
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{}</svg>'
SUITE = {
    "name": "small",
    "checkpoints": [
        {"kind": "denoiser", "id": "exact", "denoiser": {"kind": "mixture", "clip": False}},
        {"kind": "denoiser", "id": "../exact 2", "denoiser": {"kind": "mixture", "spec": {"spread": 0.03}}},
    ],
    "benches": [
        {
            "name": "gallery",
            "evaluator": {"kind": "gallery", "panels": ["times", "toy"], "times": [50, 100], "toy": {"points": 3}},
            "datasets": [{"kind": "mixture", "name": "m", "size": 5}],
        },
    ],
}


def tiles(rows: int = 2, columns: int = 3, side: int = 8, channels: int = 1) -> np.ndarray:
    shape = (rows, columns, side, side, channels)
    found: np.ndarray = (256 * rng.uniform(rng.key("tiles", *shape), range(1), shape)[0]).astype(np.uint8)
    return found


def picture(**fields: Any) -> Picture:
    labels = {"down": ("one", "two"), "across": ("a", "b", "c")}
    return Picture(**{"name": "grid", "title": "A grid", "caption": "Of tiles.", "tiles": tiles(), **labels, **fields})


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(3, 70), st.sampled_from([1, 3]), st.booleans())
def test_tiles_can_be_read_back_from_a_file(rows: int, columns: int, side: int, channels: int, named: bool) -> None:
    grid = tiles(rows, columns, side, channels)
    down, across = tuple(map(str, range(rows))), tuple(f"t = {column}" for column in range(columns))
    made = picture(tiles=grid, down=down if named else (), across=across if named else ())
    content = pictures.file(made)
    assert content == pictures.file(made)
    sheet = decoded(content)
    assert sheet.ndim == (2 if channels == 1 else 3)
    scale = -(-pictures.LEAST // side)
    size = scale * side
    views = np.lib.stride_tricks.sliding_window_view(sheet, (size, size), axis=(0, 1))
    for cell in grid.reshape(-1, side, side, channels):
        large = np.kron(cell, np.ones((scale, scale, 1), np.uint8))
        wanted = large[..., 0] if channels == 1 else np.moveaxis(large, -1, 0)
        corners = np.argwhere((views[..., 0, 0] == wanted[..., 0, 0]).reshape(*views.shape[:2], -1).all(axis=-1))
        assert any(np.array_equal(views[tuple(corner)], wanted) for corner in corners)


def test_labels_are_drawn_and_cut_nothing_off() -> None:
    plain = decoded(pictures.file(picture(down=(), across=())))
    long = ("a very long label of a column", "b", "c")
    labelled = decoded(pictures.file(picture(across=long, down=("first\nof two", "second"))))
    assert labelled.shape[0] > plain.shape[0] and labelled.shape[1] > plain.shape[1]
    for edge in (labelled[:3], labelled[-3:], labelled[:, :3], labelled[:, -3:]):
        assert (edge == pictures.PAPER).all()
    assert (labelled[: labelled.shape[0] // 4] < 128).any()  # ink above the tiles


def test_the_page_has_every_row_as_a_picture_with_its_words() -> None:
    grid = tiles(channels=3)
    page = render(NO_METRICS, {}, pd.DataFrame(), [Shown("bench", "net", picture(tiles=grid))])
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)" loading="lazy">', page)
    assert [html.unescape(alt) for _, alt in found] == [
        f"A grid: {row}, left to right: a, b, c" for row in ("one", "two")
    ]
    for row, (source, _) in enumerate(found):
        strip = decoded(base64.b64decode(source))
        assert strip.shape == (8, 3 * 8 + 2, 4)  # clear gaps of one pixel
        assert np.array_equal(strip[:, 9:17, :3], grid[row, 1])
        assert (strip[:, 8, 3] == 0).all()
    assert '<a href="pictures/bench/net/grid.png">pictures/bench/net/grid.png</a>' in page
    assert "img-src data:;" in page


def test_names_and_labels_of_anybody_are_only_text() -> None:
    made = picture(title=HOSTILE, caption=HOSTILE, down=(HOSTILE, "two"), across=(HOSTILE, "b", "c"))
    entry = Shown(HOSTILE, "../../etc", made)
    page = render(NO_METRICS, {}, pd.DataFrame(), [entry])
    assert "<script>alert" not in page
    assert "http://x.invalid/>" not in page
    assert ".." not in entry.path.split("/")
    assert re.fullmatch(r"pictures/[^/]+/[^/]+/grid\.png", entry.path)
    assert pictures.file(made)


def test_pictures_beyond_the_budget_are_named() -> None:
    entries = [Shown("b", "c", picture(name=f"grid{number}")) for number in range(3)]
    size = sum(len(strip.source) for strip in pictures.embedded(entries[:1])[0].strips)
    kept = [bool(made.strips) for made in pictures.embedded(entries, 2 * size)]
    assert kept == [True, True, False]
    large = picture(tiles=tiles(20, 20, 60, 3), down=(), across=())
    page = render(NO_METRICS, {}, pd.DataFrame(), [Shown("b", "c", large)])
    assert len(page) < 5e6
    assert "too large for this page" in page


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "../grid"}, "a picture is called '../grid'"),
        ({"name": ""}, "a picture is called ''"),
        ({"tiles": None}, "needs tiles or a drawing"),
        ({"svg": SVG.format("")}, "needs tiles or a drawing"),
        ({"tiles": tiles(channels=2)}, "needed is uint8"),
        ({"tiles": tiles(columns=4)}, "3 labels for 4 columns"),
        ({"tiles": tiles(rows=1)}, "2 labels for 1 rows"),
        ({"tiles": None, "svg": "<svg>"}, "is damaged"),
        ({"tiles": None, "svg": "<html/>"}, "no SVG"),
        ({"tiles": None, "svg": SVG.format("<script>alert(1)</script>")}, "element script"),
        ({"tiles": None, "svg": SVG.format("<foreignObject/>")}, "element foreignobject"),
        ({"tiles": None, "svg": SVG.format('<g onload="alert(1)"/>')}, "acts or leads elsewhere"),
        ({"tiles": None, "svg": SVG.format('<use xlink:href="http://x.invalid/#a"/>')}, "acts or leads elsewhere"),
        ({"tiles": None, "svg": SVG.format("<style>@import 'x'</style>")}, "acts or leads elsewhere"),
        ({"tiles": None, "svg": SVG.format('<g style="fill: url(http://x.invalid)"/>')}, "acts or leads elsewhere"),
        ({"tiles": None, "svg": '<!DOCTYPE a [<!ENTITY b "c">]>' + SVG.format("&b;")}, "declares entities"),
    ],
)
def test_what_cannot_be_drawn_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        list(shown("bench", "net", [picture(**fields)]))


def test_tiles_of_other_numbers_are_named() -> None:
    made = picture()
    object.__setattr__(made, "tiles", tiles().astype(np.float32))  # types are only checked under pytest
    with pytest.raises(ValueError, match="has tiles float32 of shape"):
        list(shown("bench", "net", [made]))


def test_two_pictures_of_a_name_and_no_picture_are_named() -> None:
    with pytest.raises(ValueError, match="two pictures are called grid"):
        list(shown("bench", "net", [picture(), picture()]))
    with pytest.raises(Exception, match=r"a picture is a str|Type-check error"):
        list(shown("bench", "net", iter(["grid"])))  # type: ignore[arg-type]


def test_drawings_with_their_own_references_pass() -> None:
    inside = '<defs><path id="a"/></defs><use xlink:href="#a" style="clip-path: url(#b)"/>'
    (entry,) = shown("bench", "net", [picture(tiles=None, svg=SVG.format(inside))])
    assert pictures.file(entry.picture) == SVG.format(inside).encode()
    (embedded,) = pictures.embedded([entry])
    assert base64.b64decode(embedded.strips[0].source.partition(",")[2]) == SVG.format(inside).encode()


def test_earlier_pictures_are_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_bytes(b"mine")
    root = tmp_path / "run"
    put(root, {"a.csv": b"a", "pictures/b/c/old.png": b"old", "pictures/b/d/kept.png": b"kept"})
    (root / "pictures/b/link").symlink_to(tmp_path / "mine")
    put(root, {"pictures/b/d/kept.png": b"kept"})
    assert sorted(path.name for path in root.rglob("*")) == ["a.csv", "b", "d", "digests.txt", "kept.png", "pictures"]
    shutil.rmtree(root / "pictures")
    (root / "pictures").symlink_to(tmp_path / "mine")
    put(root, {})
    assert not (root / "pictures").exists()
    assert (tmp_path / "mine/photo.png").read_bytes() == b"mine"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with pictures."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    done = runs.execute(load(str(folder / "small.yaml")), runs.Options(folder / "run"))
    assert not done.failures
    return folder / "run"


@pytest.fixture
def root(tmp_path: Path, made: Path) -> Iterator[Path]:
    """A copy of the run."""
    shutil.copytree(made, tmp_path / "run")
    yield tmp_path / "run"


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted((folder / "pictures").rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_run_and_its_report_have_the_pictures(root: Path, tmp_path: Path) -> None:
    names = [f"pictures/gallery/{id}/{name}" for id in ("%2E.%2Fexact%202", "exact")
             for name in ("times.png", "toy-points.svg", "toy-step.svg")]  # fmt: skip
    before = files(root)
    assert list(before) == names
    listed = (root / "digests.txt").read_text()
    assert all(name in listed for name in names)
    runs.report(root, tmp_path / "other")
    assert files(tmp_path / "other") == before
    runs.report(root, tmp_path / "other", formats=("csv",))
    assert not (tmp_path / "other/pictures").exists()
    (root / "pictures/gallery/exact/old.png").write_bytes(b"")
    shutil.rmtree(root / "pictures/gallery/%2E.%2Fexact%202")
    runs.report(root)
    assert files(root) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b" "), "times.png is not what the records give"),
        (lambda path: path.unlink(), "times.png is not there"),
        (lambda path: path.with_name("new.png").write_bytes(b""), "new.png is no picture that the records give"),
    ],
)
def test_verify_finds_a_picture_that_does_not_follow(root: Path, change: Callable[[Path], object], said: str) -> None:
    change(root / "pictures/gallery/exact/times.png")
    checks = {check.name: check for check in whole.verify(root)}
    assert checks["pictures"].state == "FAILED"
    assert said in checks["pictures"].details[0]
    assert checks["figures"].state == "ok"


def test_verify_passes_what_a_run_wrote(made: Path) -> None:
    checks = {check.name: check for check in whole.verify(made)}
    assert checks["pictures"].state == "ok"
    assert checks["pictures"].said.startswith("6 files")


def test_pictures_that_fail_cost_nothing_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Gallery.pictures

    def broken(self: Gallery, records: Any) -> Iterator[Picture]:
        yield from list(true(self, records))[:1]
        yield picture(name="/etc/passwd")

    figures = (root / "metrics.csv").read_bytes()
    monkeypatch.setattr(Gallery, "pictures", broken)
    done = runs.report(root)
    assert (root / "metrics.csv").read_bytes() == figures
    assert [failure["reason"].partition(":")[0] for failure in done.failures] == ["its pictures cannot be drawn"] * 2
    assert not files(root)
    monkeypatch.undo()
    assert not runs.report(root).failures
    assert not json.loads((root / "manifest.json").read_bytes())["failures"]
    assert len(files(root)) == 6
