"""What every test runs under."""

import socket
from typing import Any

import pytest
import torch

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before timm and diffusers, whoever imports them first)

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long simulations and the whole of the fuzzing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that two workers end together."""
    items.sort(key=lambda item: item.path.name not in ("test_quickstart.py", "test_bundled.py", "test_runs.py"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
