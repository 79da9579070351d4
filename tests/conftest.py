"""For all tests: no network, one thread, and the options --full and --ray."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

LOOPBACK = ("127.", "::1", "localhost")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long simulations and the whole of the fuzzing")
    parser.addoption("--ray", action="store_true", help="the tests of Ray too, which needs the extra of that name")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ray is none of the packages that all tests are run with."""
    return True if collection_path.name == "test_ray.py" and not config.getoption("--ray") else None


def pytest_configure(config: pytest.Config) -> None:
    """Property tests try the same examples always, and others with --full; none is failed for a slow machine."""
    from hypothesis import settings

    settings.register_profile("rdiff", derandomize=not config.getoption("--full"), database=None, deadline=None)
    settings.load_profile("rdiff")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that two workers end together."""
    items.sort(key=lambda item: item.path.name not in ("test_quickstart.py", "test_bundled.py", "test_runs.py"))


def pytest_sessionstart() -> None:
    sys.addaudithook(_refuse_network)
    # Not above: jaxtyping must see the package's first import.
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the long simulations are wanted."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def board_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs for boards, made once for all of their tests."""
    from tests.board_runs import made_runs

    return made_runs(tmp_path_factory.mktemp("boards"))


@pytest.fixture
def roots(tmp_path: Path, board_runs: Path) -> Path:
    """Copies of the runs of alice, of bob, and of both."""
    for name in ("alice", "bob", "both"):
        shutil.copytree(board_runs / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def rdiff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process, in a folder of its own: exit code, standard output, standard error."""
    from robustbench_diffaug import cli  # not above: jaxtyping must see the package's first import

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(words))
        shown = capsys.readouterr()
        return int(caught.value.code or 0), shown.out, shown.err

    return call


def _refuse_network(event: str, arguments: Sequence[object]) -> None:
    """Lets Python's sockets reach this machine alone."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a text or bytes is a Unix socket's path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and name and not name.startswith(LOOPBACK):
        raise RuntimeError(f"a test reached for {name}; tests use no network")
