"""The server process by itself, over loopback: what a client of a lab's pod sees, and when the process ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vcproxy.lab.server

SCRIPT = Path(vcproxy.lab.server.__file__)


class Server:
    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(10)
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-I", "-S", str(SCRIPT)], stdin=theirs.fileno())

    def serve(self, name: str, *kinds: socket.SocketKind, host: str = "127.0.0.1") -> list[int]:
        """Hand over one listening socket of each kind; their ports."""
        sockets = [socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) for kind in kinds]
        for sock in sockets:
            sock.bind((host, 0))
            if sock.type == socket.SOCK_STREAM:
                sock.listen()
        ports = [sock.getsockname()[1] for sock in sockets]
        socket.send_fds(self.control, [json.dumps({"serve": name}).encode()], [sock.fileno() for sock in sockets])
        for sock in sockets:
            sock.close()
        assert self.control.recv(64) == b"{}"
        return ports

    def stop(self, name: str) -> None:
        self.control.send(json.dumps({"stop": name}).encode())
        assert self.control.recv(64) == b"{}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.control.close()
        assert server.process.wait(10) == 0


def dial(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=10)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tcp_client_is_told_who_answers_and_then_echoed(server: Server, host: str) -> None:
    (port,) = server.serve("acme/web-1", socket.SOCK_STREAM, host=host)
    with dial(port, host) as client, client.makefile("rw", newline="\n") as lines:
        greeting = json.loads(lines.readline())
        assert greeting == {"pod": "acme/web-1", "peer": list(client.getsockname()[:2]), "local": [host, port]}
        lines.write("one\ntwo\nthr")
        lines.flush()
        assert [lines.readline(), lines.readline()] == ["acme/web-1 one\n", "acme/web-1 two\n"]
        lines.write("ee\n")
        lines.flush()
        assert lines.readline() == "acme/web-1 three\n"
        client.shutdown(socket.SHUT_WR)
        assert lines.readline() == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_udp_datagram_is_answered_with_one_line(server: Server, host: str) -> None:
    (port,) = server.serve("acme/dns", socket.SOCK_DGRAM, host=host)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect((host, port))
        for _ in range(3):
            client.send(b"who?")
            answer = client.recv(1000)
            assert answer.endswith(b"\n")
            assert json.loads(answer) == {
                "pod": "acme/dns",
                "peer": list(client.getsockname()[:2]),
                "local": [host, port],
            }


def test_stop_closes_ports_and_connections_of_that_name_only(server: Server) -> None:
    (gone, gone_udp) = server.serve("acme/gone", socket.SOCK_STREAM, socket.SOCK_DGRAM)
    (stays,) = server.serve("acme/stays", socket.SOCK_STREAM)
    with dial(gone) as client, dial(stays) as other, other.makefile("rw", newline="\n") as lines:
        assert client.recv(1000).endswith(b"\n")
        lines.readline()
        server.stop("acme/gone")
        assert client.recv(1000) == b""
        with pytest.raises(ConnectionRefusedError):
            dial(gone)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", gone_udp))  # free again
        lines.write("here\n")
        lines.flush()
        assert lines.readline() == "acme/stays here\n"


def test_client_that_never_reads_stops_no_other(server: Server) -> None:
    (port,) = server.serve("acme/web", socket.SOCK_STREAM)
    with dial(port) as deaf, dial(port) as other:
        deaf.setblocking(False)
        sent = 0
        try:
            while sent < 64 << 20:
                sent += deaf.send(b"x" * 999 + b"\n")
        except BlockingIOError:
            pass  # every buffer on the way is full: the server has stopped reading it
        assert sent < 64 << 20
        assert other.recv(1000).endswith(b"\n")
        other.sendall(b"hello\n")
        assert other.recv(1000) == b"acme/web hello\n"


def test_client_that_resets_harms_nobody(server: Server) -> None:
    (port,) = server.serve("acme/web", socket.SOCK_STREAM)
    for _ in range(50):
        with dial(port) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with dial(port) as client:
        assert json.loads(client.recv(1000))["pod"] == "acme/web"


def test_server_ends_when_its_parent_is_killed() -> None:
    server = Server()
    try:
        (port,) = server.serve("acme/web", socket.SOCK_STREAM)
        with dial(port) as client:
            client.recv(1000)
            server.control.shutdown(socket.SHUT_RDWR)  # what the kernel does with a dead process's descriptors
            assert server.process.wait(10) == 0
            assert client.recv(1000) == b""
    finally:
        server.control.close()
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
