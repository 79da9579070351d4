"""Tests cannot reach the network."""

import socket

import pytest


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org"])
def test_no_other_machine_is_reached(host: str) -> None:
    with pytest.raises(RuntimeError, match="no network"):
        socket.create_connection((host, 80), timeout=1)
    with pytest.raises(RuntimeError, match="no network"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.sendto(b"", ("192.0.2.1", 80))


def test_this_machine_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
