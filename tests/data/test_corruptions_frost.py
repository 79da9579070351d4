"""Frost and spatter against OpenCV and imagecorruptions on the same draws, and the textures that are drawn."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.data import astronaut, chelsea

from robustbench_diffaug.data import frost, spatter
from robustbench_diffaug.data.corrupted import Corrupted, Corruptions
from robustbench_diffaug.data.corruptions import CONSTANTS, corrupt
from robustbench_diffaug.data.embedded import Mnist5k
from robustbench_diffaug.rng import key, normal, uniform

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import imagecorruptions

OFFICIAL = Path(imagecorruptions.__file__).parent / "frost"
TABLES = tuple(CONSTANTS)


def picture(side: int, subject: str = "astronaut") -> NDArray[np.uint8]:
    photograph = Image.fromarray(astronaut() if subject == "astronaut" else chelsea())  # type: ignore[no-untyped-call]
    return np.asarray(photograph.resize((side, side), Image.Resampling.BICUBIC))


def corrupted(
    levels: NDArray[np.uint8], name: str, severity: int, table: str, keys: list[int], textures: Path | None = None
) -> NDArray[np.float64]:
    """The image under a corruption, once for each key, (keys, height, width, channels)."""
    images = torch.from_numpy(levels.copy()).permute(2, 0, 1).div(255).repeat(len(keys), 1, 1, 1)
    result = corrupt(images, name, severity, table, keys, textures)
    return np.asarray((result.double() * 255).round().permute(0, 2, 3, 1).numpy())


def strength(images: NDArray[np.float64], levels: NDArray[np.uint8]) -> float:
    return float(np.abs(images - levels).mean())


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize(("table", "side"), [("imagenet-c", 224), ("cifar-c", 32), ("imagenet-c", 32)])
def test_frost_with_the_official_textures_is_the_published_formula(table: str, side: int, severity: int) -> None:
    levels = picture(side)
    share, weight, scale = CONSTANTS[table]["frost"][severity - 1]
    keys = [key("frost test", table, severity, index) for index in range(12)]
    seen = set()
    for ours, image_key in zip(corrupted(levels, "frost", severity, table, keys, OFFICIAL), keys, strict=True):
        which, down, right = uniform(image_key, range(1), (3,))[0]
        seen.add(int(5 * which))
        file = OFFICIAL / ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")[int(5 * which)]
        texture = cv2.imread(str(file))
        assert texture is not None
        texture = cv2.resize(texture, (0, 0), fx=scale, fy=scale)
        top, left = int(down * (texture.shape[0] - side)), int(right * (texture.shape[1] - side))
        piece = texture[top : top + side, left : left + side][..., [2, 1, 0]]
        theirs = np.clip(share * levels + weight * piece, 0, 255).astype(np.uint8)
        assert np.abs(ours - theirs).max() <= 1  # two decoders of JPEG
    assert len(seen) > 2


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_frost_is_as_strong_as_imagecorruptions(severity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, keys = picture(224), [key("frost strength", index) for index in range(20)]
    draws: Iterator[float] = iter(())

    def drawn(low: int, high: int | None = None) -> int:
        # The sixth texture is left out, as in the code that the published data were made with.
        return int(5 * next(draws)) if high is None else low + int((high - low) * next(draws))

    monkeypatch.setattr("numpy.random.randint", drawn)
    theirs = []
    for image_key in keys:
        draws = iter(uniform(image_key, range(1), (3,))[0])
        theirs.append(imagecorruptions.corrupt(levels, severity, "frost"))
    official = corrupted(levels, "frost", severity, "imagenet-c", keys, OFFICIAL)
    assert strength(official, levels) == pytest.approx(strength(np.stack(theirs).astype(float), levels), rel=0.03)


@pytest.mark.parametrize(("table", "side", "count"), [("imagenet-c", 224, 15), ("cifar-c", 32, 300)])
@pytest.mark.parametrize("subject", ["astronaut", "chelsea"])
def test_drawn_frost_is_nearly_as_strong_as_the_official_one(table: str, side: int, count: int, subject: str) -> None:
    levels, keys = picture(side, subject), [key("drawn", index) for index in range(count)]
    for severity in (1, 5):
        ours, theirs = (
            strength(corrupted(levels, "frost", severity, table, keys, textures), levels)
            for textures in (None, OFFICIAL)
        )
        assert ours == pytest.approx(theirs, rel=0.05)


def test_drawn_textures_are_five_fixed_ones_of_the_official_tones() -> None:
    panes = [frost.draw(index) for index in range(5)]
    for index, pane in enumerate(panes):
        (*mean,), deviation = pane.mean(axis=(1, 2)), pane.std()
        official = np.asarray(Image.open(OFFICIAL / frost.FILES[index]).convert("RGB"), dtype=float)
        assert mean == pytest.approx(official.mean(axis=(0, 1)), abs=1.5)
        assert pane[1].std() == pytest.approx(official[..., 1].std(), abs=4), deviation
        # Crystals, not clouds or noise: much of the variance lies between 1 and 16 px, as in the photographs.
        for image in (pane[1].astype(float), official[..., 1]):
            fine, coarse = (gaussian_filter(image, sigma) for sigma in (1, 16))
            assert (fine - coarse).var() > 0.2 * image.var() or index == 0
    assert len({pane.tobytes() for pane in panes}) == 5
    again = frost.draw.__wrapped__(4)
    assert np.array_equal(again, panes[4])
    with pytest.raises(ValueError, match="read-only"):
        panes[4][0, 0, 0] = 1


@pytest.mark.parametrize("textures", [None, OFFICIAL])
def test_textures_grow_with_the_images(textures: Path | None) -> None:
    levels = np.zeros((700, 920, 3), dtype=np.uint8)
    first, second = corrupted(levels, "frost", 5, "imagenet-c", [1, 2], textures)
    assert first.shape == (700, 920, 3)
    assert first.std() > 5
    assert not np.array_equal(first, second)


def test_grey_frost_is_the_grey_of_the_texture() -> None:
    levels = np.full((64, 64, 3), 40, dtype=np.uint8)
    colour = corrupted(levels, "frost", 5, "imagenet-c", [3])[0]
    grey = corrupted(levels[..., :1], "frost", 5, "imagenet-c", [3])[0, ..., 0]
    assert np.abs(grey - colour @ [0.299, 0.587, 0.114]).max() <= 1.5


def test_what_is_no_folder_of_textures_is_refused(tmp_path: Path) -> None:
    image = picture(32)
    with pytest.raises(ValueError, match=r"has no frost1\.png; textures is a folder"):
        corrupted(image, "frost", 1, "cifar-c", [1], tmp_path)
    for name in frost.FILES:
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"frost\d\.\w+ is not a readable PNG or JPEG image"):
        corrupted(image, "frost", 1, "cifar-c", [1], tmp_path)
    assert np.isfinite(corrupted(image, "fog", 1, "cifar-c", [1], tmp_path)).all()  # not looked at


def test_records_depend_on_the_textures_of_frost_alone(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
        for name in frost.FILES:
            copyfile(OFFICIAL / name, folder / name)
    Image.fromarray(picture(300)).save(folders[2] / "frost2.png")

    def grid(textures: Path | None) -> list[str]:
        names = ("fog", "frost")
        place = str(textures) if textures else None
        whole = Corruptions(base=Mnist5k(limit=3), corruptions=names, constants="cifar-c", textures=place)
        return [part.fingerprint for part in whole.parts()]

    drawn, first, same, other = (grid(folder) for folder in (None, *folders))
    assert drawn[0] == first[0] == other[0]
    assert first == same
    assert len({drawn[1], first[1], other[1]}) == 3


def test_a_corrupted_dataset_reads_the_textures_that_it_names(tmp_path: Path) -> None:
    more = {"corruption": "frost", "severity": 4, "constants": "cifar-c"}
    base = Mnist5k(limit=6)
    drawn, given = (
        Corrupted.model_validate({"name": "frosty", "base": base, "textures": textures, **more})
        for textures in (None, str(OFFICIAL))
    )
    images, labels = given.opened().read(range(6))
    keys = [key("corruption", 0, "frost", 4, id) for id in base.opened().ids[:6]]
    clean = base.opened().read(range(6))
    assert torch.equal(images, corrupt(clean[0], "frost", 4, "cifar-c", keys, OFFICIAL))
    assert torch.equal(labels, clean[1])
    assert not torch.equal(images, drawn.opened().read(range(6))[0])
    missing = given.model_copy(update={"textures": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"there is no .*none; check the path"):
        missing.contents()


def test_what_the_base_says_in_vain_is_refused() -> None:
    for more in ({"on_bad_image": "skip"}, {"class_space": "full"}):
        ((word, _),) = more.items()
        base = Mnist5k.model_validate(more)
        fields = {"name": "x", "base": base, "corruption": "fog", "constants": "cifar-c"}
        with pytest.raises(ValueError, match=f"base says {word}.*write it beside base"):
            Corrupted.model_validate(fields)
        agreed = Corrupted.model_validate({**fields, **more})
        grid = Corruptions.model_validate({"base": base, "corruptions": ["fog"], "constants": "cifar-c", **more})
        (part,) = grid.parts()
        assert getattr(part, word) == getattr(agreed, word) == more[word]


def published_spatter(levels: NDArray[np.uint8], constants: tuple[float, ...], image_key: int) -> NDArray[np.uint8]:
    """Spatter by OpenCV, step by step as hendrycks/robustness has it, on the key's normals."""
    mean, scale, sigma, threshold, more, muddy = constants
    value = levels.astype(np.float32) / 255
    noise = mean + scale * normal(image_key, range(1), levels.shape[:2])[0].astype(np.float64)
    liquid = gaussian_filter(noise, sigma, mode="nearest", truncate=4)
    liquid[liquid < threshold] = 0
    if muddy:
        mask = gaussian_filter(np.where(liquid > threshold, 1, 0).astype(np.float32), more, mode="nearest", truncate=4)
        mask[mask < 0.8] = 0
        mud = np.array([63, 42, 20]) / 255 * mask[..., None]
        return np.asarray(np.clip(value * (1 - mask[..., None]) + mud, 0, 1) * 255).astype(np.uint8)
    drops = (liquid * 255).astype(np.uint8)
    away = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    _, away = cv2.threshold(away, 20, 20, cv2.THRESH_TRUNC)
    even = cv2.equalizeHist(cv2.blur(away, (3, 3)).astype(np.uint8))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    shade = cv2.blur(cv2.filter2D(even, cv2.CV_8U, emboss), (3, 3)).astype(np.float32)
    mask = drops * shade
    mask = mask / mask.max() * more
    return np.asarray(np.clip(value + mask[..., None] * np.array([175, 238, 238]) / 255, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize(("table", "side"), [("imagenet-c", 224), ("imagenet-c", 33), ("cifar-c", 32), ("cifar-c", 96)])
def test_spatter_is_the_published_one_on_the_same_noise(table: str, side: int, severity: int) -> None:
    levels, keys = picture(side), [key("spatter test", index) for index in range(4)]
    results = corrupted(levels, "spatter", severity, table, keys)
    for ours, image_key in zip(results, keys, strict=True):
        theirs = published_spatter(levels, CONSTANTS[table]["spatter"][severity - 1], image_key)
        assert np.abs(ours - theirs).max() <= 1
    assert strength(results, levels) > 0.05


@pytest.mark.parametrize("severity", range(1, 6))
def test_spatter_equals_imagecorruptions(severity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, image_key = picture(224, "chelsea"), key("spatter", severity)

    def noise(size: tuple[int, int], loc: float, scale: float) -> NDArray[np.float64]:
        return np.asarray(loc + scale * normal(image_key, range(1), size)[0].astype(np.float64))

    monkeypatch.setattr("numpy.random.normal", noise)
    theirs = imagecorruptions.corrupt(levels, severity, "spatter").astype(float)
    (ours,) = corrupted(levels, "spatter", severity, "imagenet-c", [image_key])
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("smooth", [0, 1, 2.5, 6])
def test_edges_distances_and_equalised_are_opencvs(smooth: float) -> None:
    for index, shape in enumerate([(60, 45), (8, 8), (33, 128)]):
        grey = normal(key("edges", smooth, index), range(1), shape)[0].astype(float)
        grey = gaussian_filter(grey, smooth) if smooth else grey
        levels = ((grey - grey.min()) / np.ptp(grey) * 255).astype(np.uint8)
        found = spatter.edges(levels)
        assert np.array_equal(found, cv2.Canny(levels, 50, 150) > 0)
        assert np.array_equal(spatter.equalised(levels), cv2.equalizeHist(levels))
        few = uniform(key("few", smooth, index), range(1), shape)[0] < 0.01
        for marked in (found, few):
            theirs = np.minimum(cv2.distanceTransform(255 - 255 * marked.astype(np.uint8), cv2.DIST_L2, 5), 20)
            np.testing.assert_allclose(spatter.distances(marked), theirs, atol=2e-4)


def test_no_drop_leaves_the_image_as_it_is() -> None:
    flat = np.zeros((16, 16))
    assert not spatter.water(flat, 0.6).any()
    assert not spatter.mud(flat, 1.5).any()
    assert np.array_equal(spatter.equalised(np.full((4, 4), 20, dtype=np.uint8)), np.full((4, 4), 20))
