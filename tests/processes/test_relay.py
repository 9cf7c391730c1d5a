"""Relayed connections to a service stay open when the service is gone."""

import socket

import pytest

from puzzle_jax.processes.relay import host_and_port, keep_alive, start_relay


@pytest.fixture
def service():
    with socket.create_server(("localhost", 0)) as listener:
        yield listener


def connected(path) -> socket.socket:
    near = socket.socket(socket.AF_UNIX)
    near.settimeout(30)
    near.connect(str(path))
    return near


def test_bytes_go_both_ways_and_the_near_end_outlives_the_service(service, tmp_path):
    start_relay(tmp_path / "socket", f"localhost:{service.getsockname()[1]}")
    with connected(tmp_path / "socket") as near:
        far, _ = service.accept()
        near.sendall(b"register")
        assert far.recv(100) == b"register"
        far.sendall(b"welcome")
        assert near.recv(100) == b"welcome"
        far.close()
        near.settimeout(0.3)
        with pytest.raises(TimeoutError):  # a closed connection would give b""
            near.recv(100)


def test_a_service_that_is_not_there_yet_is_waited_for(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start_relay(tmp_path / "socket", f"localhost:{port}")
    with connected(tmp_path / "socket") as near:
        near.sendall(b"early")
        with socket.create_server(("localhost", port)) as service:
            far, _ = service.accept()
            with far:
                assert far.recv(100) == b"early"


@pytest.mark.parametrize(
    ("address", "parts"),
    [("host:12", ("host", 12)), ("10.0.0.1:12", ("10.0.0.1", 12)), ("[fe80::1]:12", ("fe80::1", 12))],
)
def test_addresses(address, parts):
    assert host_and_port(address) == parts


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="names of Linux")
def test_a_host_that_does_not_answer_is_given_up_in_time():
    with socket.socket() as connection:
        keep_alive(connection, 20)
        read = [connection.getsockopt(socket.IPPROTO_TCP, name) for name in (4, 5, 6, 18)]  # as in linux/tcp.h
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    idle, interval, probes, unanswered_ms = read
    assert idle + interval * probes <= 20 and unanswered_ms == 20_000
