"""Letters and noise: against matplotlib's own outlines, exact shifts, and closed-form distributions."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import get_data_path
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw
from pydantic import ValidationError
from scipy.stats import kstest

from robustbench_diffaug.data import glyphs
from robustbench_diffaug.data.glyphs import EM, FONTS, LETTERS, Form, Letters, Noise
from robustbench_diffaug.data.photographs import Mode
from robustbench_diffaug.testing import check_dataset


def images(dataset: Letters | Noise) -> torch.Tensor:
    return dataset.opened().read(range(dataset.available()))[0]


def outline(font: str, letter: str) -> tuple[np.ndarray, float, float]:
    """A letter filled from its outline, as matplotlib reads it: pixels, height and width."""
    file = f"{get_data_path()}/fonts/ttf/{font}.ttf"
    path = TextPath((0, 0), letter, size=EM, prop=FontProperties(fname=file))
    box = path.get_extents()
    size = round(box.width), round(box.height)
    inside = np.zeros(size[::-1], bool)
    for polygon in path.to_polygons():
        part = Image.new("1", size)
        ImageDraw.Draw(part).polygon([(x - box.x0 - 0.5, box.y1 - y - 0.5) for x, y in np.asarray(polygon)], fill=1)
        inside ^= np.array(part)
    return inside, box.height, box.width


@pytest.mark.parametrize("font", FONTS)
def test_glyphs_are_the_letters_of_the_fonts(font: str) -> None:
    """Drawn by FreeType through Pillow, and filled from the outlines: the same shape, and nothing around it."""
    shapes = {}
    for letter in "AGJQW":
        expected, height, width = outline(font, letter)
        glyph = glyphs._glyph(font, letter)
        assert abs(glyph.height - height) <= 3 and abs(glyph.width - width) <= 3
        found = np.array(glyph.resize(expected.shape[::-1])) > 127
        assert (found & expected).sum() / (found | expected).sum() > 0.75
        shapes[letter] = found
    assert len({shape.tobytes() for shape in shapes.values()}) == 5


def placed(letter: str, size: float = 0.5, turn: float = 0.5, right: float = 0.5, down: float = 0.5) -> torch.Tensor:
    return glyphs._placed(glyphs._glyph("DejaVuSerif", letter), np.array([size, turn, right, down]))[0]


def test_shifts_are_exact() -> None:
    still = placed("B")
    assert torch.equal(placed("B", right=1.0), still.roll(2, 1))
    assert torch.equal(placed("B", right=0.0), still.roll(-2, 1))
    assert torch.equal(placed("B", down=1.0, right=0.75), still.roll((2, 1), (0, 1)))


def test_nothing_is_cut_off() -> None:
    """A square of the greatest size, turned and shifted as far as it can be, has all of its ink."""
    square = Image.new("L", (90, 90), 255)
    for turn in (0.0, 0.5, 1.0):
        ink = float(glyphs._placed(square, np.array([1.0, turn, 0.5, 0.5])).sum())
        assert ink == pytest.approx(20**2, rel=0.02)
        for right, down in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
            assert float(glyphs._placed(square, np.array([1.0, turn, right, down])).sum()) == pytest.approx(ink)


def inked(image: torch.Tensor) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero((image > 0.5).any(axis).numpy()) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


@pytest.mark.parametrize(("size", "pixels"), [(0.0, 16), (0.5, 18), (1.0, 20)])
@pytest.mark.parametrize("letter", ["E", "W"])
def test_the_longer_side_has_the_drawn_length_and_the_middle_is_the_middle(
    letter: str, size: float, pixels: int
) -> None:
    top, bottom, left, right = inked(placed(letter, size))
    assert max(bottom - top, right - left) + 1 == pytest.approx(pixels, abs=1)
    assert (top + bottom) / 2 == pytest.approx(15.5, abs=0.5)
    assert (left + right) / 2 == pytest.approx(15.5, abs=0.5)


@pytest.mark.parametrize(("turn", "degrees"), [(0.0, 10), (0.25, 5), (1.0, -10)])
def test_turns_are_those_of_pillow(turn: float, degrees: int) -> None:
    """About the middle; a letter that is turned the other way, or not, is farther off."""
    upright = Image.fromarray((255 * placed("H", 1.0)).byte().numpy())

    def distance(angle: int) -> float:
        turned = np.asarray(upright.rotate(angle, Image.Resampling.BICUBIC)) / 255
        return float(np.abs(turned - placed("H", 1.0, turn).numpy()).mean())

    assert distance(degrees) < 0.02
    assert distance(degrees) < 0.4 * min(distance(0), distance(-degrees))


def test_letters_are_even_whole_and_all_different() -> None:
    near, other = images(Letters(count=567)), images(Letters(count=480, letters="KLMNPQRSTUVWXYZ"))
    together = torch.cat([near, other])
    assert len({image.numpy().tobytes() for image in together}) == 567 + 480
    assert together.amax((1, 2, 3)).min() > 0.6
    source = Letters(count=567).opened()
    counts = {letter: sum(id.endswith(letter) for id in source.ids) for letter in "ABCDEFGHJ"}
    assert set(counts.values()) == {63}  # three of each of 21 fonts
    assert source.labels is not None and set(source.labels) == {-1}


def test_all_sizes_places_and_turns_are_drawn() -> None:
    """Centres of ink of one outline spread as shifts that are uniform on [-2, 2] do, whose deviation is 2 / sqrt(3)."""
    same = images(Letters(letters="H", count=840))[::21, 0]
    place = torch.arange(32.0)
    centres = torch.stack([(same.sum(axis) * place).sum(1) / same.sum((1, 2)) for axis in (1, 2)])
    assert centres.mean(1).numpy() == pytest.approx(15.5, abs=0.5)
    assert centres.std(1).numpy() == pytest.approx(2 / 3**0.5, abs=0.25)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["letters", "uniform", "gaussian", "blobs"]))
def test_fewer_images_are_the_first_of_more(few: int, more: int, kind: str) -> None:
    few, more = sorted((few, more))

    def made(count: int, draw: int = 0) -> Letters | Noise:
        form: Form = kind  # type: ignore[assignment]
        return Letters(count=count, draw=draw) if kind == "letters" else Noise(form=form, count=count, draw=draw)

    assert torch.equal(images(made(more))[:few], images(made(few)))
    assert list(made(more).opened().ids[:few]) == list(made(few).opened().ids)
    assert not torch.equal(images(made(few, 1)), images(made(few)))
    assert made(few, 1).fingerprint != made(few).fingerprint


def test_another_process_draws_the_same_and_imports_only_what_it_draws_with() -> None:
    program = (
        "import sys\n"
        "from robustbench_diffaug.data.glyphs import Letters\n"
        "import robustbench_diffaug.data.photographs\n"
        "print(sorted({'matplotlib', 'skimage', 'sklearn'} & set(sys.modules)))\n"
        "print(Letters(count=50).contents())"
    )
    glyphs._letters.cache_clear()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", Letters(count=50).contents()]


@pytest.mark.parametrize(
    ("letters", "message"),
    [
        ("ABI", "'I' is no letter to draw: in many fonts it is a digit"),
        ("O", "'O' is no letter"),
        ("Ab", f"'b' is no letter to draw: there are {LETTERS}"),
        ("ABCA", "'A' stands there more than once"),
        ("", "at least 1 character"),
    ],
)
def test_bad_letters_are_refused(letters: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Letters(letters=letters)


def test_a_missing_font_is_named(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    glyphs._glyph.cache_clear()
    with pytest.raises(ValueError, match=r"matplotlib has no font cmr10\.ttf"):
        glyphs._glyph("cmr10", "A")


def test_uniform_and_gaussian_noise_have_their_distributions() -> None:
    flat = images(Noise(form="uniform", count=40)).flatten().double().numpy()
    assert kstest(flat, "uniform").pvalue > 0.01
    gauss = images(Noise(form="gaussian", count=40)).flatten().double().numpy()
    inner = gauss[(gauss > 0) & (gauss < 1)]
    assert 1 - len(inner) / len(gauss) == pytest.approx(2 * 0.0227501, abs=0.003)  # beyond two deviations
    assert kstest(inner, "truncnorm", (-2, 2, 0.5, 0.25)).pvalue > 0.01


def test_blobs_are_half_white_and_as_wide_as_the_blur() -> None:
    """Signs of a Gaussian field whose correlation is rho are correlated by 2 asin(rho) / pi; less, as they sum to 0."""
    signs = 2 * images(Noise(form="blobs", count=400)) - 1
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert not signs.sum((1, 2, 3)).any()
    lags = np.minimum(np.arange(32), 32 - np.arange(32))
    free = 2 / np.pi * np.arcsin(np.exp(-(lags[:, None] ** 2 + lags**2) / (4 * 2.0**2)))
    expected = (free - free.mean()) / (1 - free.mean())
    for lag in (1, 2, 4, 10):
        for axis in (2, 3):
            assert float((signs * signs.roll(lag, axis)).mean()) == pytest.approx(expected[0, lag], abs=0.01)


@pytest.mark.parametrize("form", ["uniform", "gaussian", "blobs"])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_noise_has_the_channels_asked_for(form: Form, mode: Mode, channels: int) -> None:
    dataset = Noise(form=form, mode=mode, count=6)
    check_dataset(dataset)
    found = images(dataset)
    assert found.shape == (6, channels, 32, 32)
    assert channels == 1 or torch.equal(found[:, 0], found[:, 1]) == (form == "blobs")


def test_letters_keep_the_promises_of_datasets() -> None:
    check_dataset(Letters(count=30))
