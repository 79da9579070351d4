"""Files of weights that attack: none runs anything, takes much memory or time, or ends in more than one line."""

import pickle
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from robustbench_diffaug import pickles
from robustbench_diffaug.files import Weights
from robustbench_diffaug.state import load_state
from tests.hostile_files import LONGEST, bombs, cases, flipped, good, saved

WATCHED: list[str] = []
# Of eval and exec a canary tells: late imports raise their event too.
FORBIDDEN = ("os.system", "os.mkdir", "subprocess.Popen", "webbrowser.open", "os.exec", "os.posix_spawn")
listening = False


def _hear(event: str, arguments: Sequence[object]) -> None:
    if listening and event in FORBIDDEN:
        WATCHED.append(event)


def test_hostile_files_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    global listening
    monkeypatch.setattr(pickles, "LONGEST", LONGEST)
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    path.write_bytes(saved(good()))
    load_state(torch.nn.Linear(3, 2), Weights(uri=str(path)))  # a good one passes, and imports what is imported late
    found = cases(canary)
    assert len(found) >= 480
    sys.addaudithook(_hear)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong = []
    for name, content in found.items():
        path.write_bytes(content)
        began, listening = time.monotonic(), True
        try:
            load_state(torch.nn.Linear(3, 2), Weights(uri=str(path)))
            wrong.append(f"{name}: was loaded")
        except ValueError as error:
            text = str(error)
            if "\n" in text or len(text) > 500 or not text.startswith(str(path)):
                wrong.append(f"{name}: {text[:700]!r}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            listening = False
        if time.monotonic() - began > 10:
            wrong.append(f"{name}: took {time.monotonic() - began:.0f} s")
    assert not wrong, "\n".join(wrong)
    assert not WATCHED and not canary.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < 2**20  # KiB, so 1 GiB


def test_the_bombs_are_live(tmp_path: Path) -> None:
    """A canary that nothing could raise would prove nothing."""
    for number, name in enumerate(("os.mkdir-2-epoch", "loads-4-epoch", "exec-0-epoch")):
        canary = tmp_path / f"canary-{number}"
        pickle.loads(dict(bombs(canary))[name])
        assert canary.exists()


def test_flipped_bytes_are_refused_in_one_line_or_do_no_harm(tmp_path: Path) -> None:
    path, refused = tmp_path / "weights.pth", 0
    for name, content in flipped():
        path.write_bytes(content)
        network = torch.nn.Linear(3, 2)
        try:
            load_state(network, Weights(uri=str(path)))
            assert all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()), name
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 500, name
    assert 60 < refused < 180


@pytest.mark.parametrize("name", ["os.system-2-root", "storage-of-1e9", "slip-../evil", "zip-no-end", "torch-nan"])
def test_the_check_of_a_suite_and_of_a_file_agree(name: str, tmp_path: Path) -> None:
    """All but wrong numbers are found without a network, before a run."""
    path = tmp_path / "weights.pth"
    path.write_bytes(cases(tmp_path / "canary")[name])
    if name == "torch-nan":
        assert Weights(uri=str(path)).check() == path
    else:
        with pytest.raises(ValueError, match=r"weights\.pth "):
            Weights(uri=str(path)).check()
