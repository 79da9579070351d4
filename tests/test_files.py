"""Files that users name, and files that are never half there."""

import hashlib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from robustbench_diffaug.files import Weights, atomic, existing, path_of, sha256


def test_atomic_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/file"
    with atomic(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(KeyError), atomic(path) as file:
        file.write(b"two")
        raise KeyError
    assert path.read_bytes() == b"one"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_digests_follow_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"one", b"another"):
        path.write_bytes(content)
        assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_bundled_files_stay_in_the_package() -> None:
    assert path_of("rdiff:cli.py").is_file()
    for uri in ("rdiff:../../etc/passwd", "rdiff:/etc/passwd"):
        with pytest.raises(ValueError, match="leads out of the package"):
            path_of(uri)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "none"), str(tmp_path / "a\0b")):
        with pytest.raises(ValueError, match=r"there is no .*; check the path"):
            existing(uri)
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        existing(str(tmp_path / ("x" * 300)))


def test_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    digest = sha256(path)
    weights = Weights.model_validate({"uri": "w.safetensors"}, context={"folder": tmp_path})
    assert weights.uri == str(path)
    assert weights.check() == path
    assert weights.contents() == digest
    stated = Weights(uri=str(path), sha256=digest.upper())
    assert stated.check() == path
    assert stated.identity() == weights.identity()  # upper case is no other digest
    for odd in ("abc", "sha256:" + digest, "0" * 63 + "g"):
        with pytest.raises(ValidationError, match="64 hexadecimal digits"):
            Weights(uri=str(path), sha256=odd)
    with pytest.raises(ValidationError, match="home of a user that there is not"):
        Weights.model_validate({"uri": "~nobody-at-all/w"}, context={"folder": tmp_path})
    with pytest.raises(ValueError, match="is a folder"):
        Weights(uri=str(tmp_path)).check()


@pytest.mark.parametrize("keep", [0, 7, 8, 20, 100, -1])
def test_weights_that_are_cut_off(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"w\.safetensors .*(cut off|holds only|damaged|no safetensors)"):
        Weights(uri=str(path)).check()
