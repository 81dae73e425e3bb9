"""The parent's side of the server process (see `server.py`): sockets are made here, in the pods' namespaces, and handed
over.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vcproxy.lab import netns
from vcproxy.lab.errors import LabError
from vcproxy.lab.sctp import PROTOCOL
from vcproxy.lab.server import MAX_SOCKETS

_SCRIPT = Path(__file__).with_name("server.py")
_BACKLOG = 1024
_PATIENCE = 10.0  # seconds that the server may take to answer or to end; it needs about a millisecond


class Servers:
    """One process that serves under many names. Started by the first `serve`; ended by `close`, or by the end of this
    process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def serve(
        self,
        name: str,
        *,
        ns: str,
        addresses: Iterable[str],
        tcp: Iterable[int] = (),
        udp: Iterable[int] = (),
        sctp: Iterable[int] = (),
    ) -> None:
        """Open the ports on the addresses in the namespace, answering as `name`. They are open when this returns.

        Raises `LabError` naming the port, when it is taken or the namespace has no such address; then none of them is
        open.
        """
        sctp_ports = list(sctp)
        wanted = [(socket.SOCK_STREAM, port) for port in tcp] + [(socket.SOCK_DGRAM, port) for port in udp]
        if sctp_ports:
            wanted.append((socket.SOCK_RAW, PROTOCOL))
        sockets: list[socket.socket] = []
        try:
            for address in addresses:
                sockets += (_listening(ns, address, kind, port) for kind, port in wanted)
            for start in range(0, len(sockets), MAX_SOCKETS):
                self._command({"serve": name, "sctp": sctp_ports}, sockets[start : start + MAX_SOCKETS])
        finally:
            for sock in sockets:
                sock.close()

    def stop(self, name: str) -> None:
        """Close all ports and connections of a name: from now on its kernel refuses."""
        self._command({"stop": name}, [])

    def close(self) -> None:
        """End the process. Its sockets close with it."""
        if self._control:
            self._control.close()
        if self._process:
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._control = None

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _command(self, message: Mapping[str, Any], sockets: list[socket.socket]) -> None:
        control = self._control or self._start()
        try:
            socket.send_fds(control, [json.dumps(message).encode()], [sock.fileno() for sock in sockets])
            answered = control.recv(64)
        except OSError as error:
            raise LabError(f"the lab's server process did not answer to {message}: {error}") from error
        if not answered:
            raise LabError(f"the lab's server process ended at {message}; its traceback is on standard error")

    def _start(self) -> socket.socket:
        # Packets, so that a message and its descriptors stay together whatever their number.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_PATIENCE)
        with theirs:
            # -I -S: no site-packages, half the memory and start. A session of its own: Ctrl-C is for the parent, which
            # then closes in order.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SCRIPT)], stdin=theirs.fileno(), start_new_session=True
            )
        return self._control


def _listening(ns: str, address: str, kind: socket.SocketKind, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = netns.socket_in(ns, family, kind, port if kind == socket.SOCK_RAW else 0)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
        sock.bind((address, 0 if kind == socket.SOCK_RAW else port))
        if kind == socket.SOCK_STREAM:
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        what = {socket.SOCK_STREAM: f"tcp port {port}", socket.SOCK_DGRAM: f"udp port {port}"}.get(kind, "sctp")
        raise LabError(f"cannot serve {what} of {address} in namespace {ns}: {error.strerror}") from error
    return sock
