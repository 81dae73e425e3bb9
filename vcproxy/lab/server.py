"""The program behind every pod of a lab: one process that answers for all of them. Run as a script; stdlib only.

Its sockets come from its parent, over the control socket on descriptor 0 (SCM_RIGHTS, unix(7)): the parent makes and
binds them in the pods' namespaces, so a port that cannot be had is the parent's exception, a port is open from the
moment it was asked for, and this process needs no rights. It ends when the parent's end of the control socket closes,
however that came about; so it never outlives a killed test.

Control messages are single packets of JSON: {"serve": NAME} with sockets, for raw ones with "sctp": [PORT, ...], and
{"stop": NAME}; each is answered with {} when done.

What a client sees: TCP sends one line of JSON on connect, {"pod": NAME, "peer": [ip, port], "local": [ip, port]}: who
answers, and what connection it sees on its side of all translation. Then each line received comes back as "NAME line".
UDP answers each datagram with the line of JSON, SCTP each INIT (see `sctp`; its sockets are raw, one for each address).
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcproxy.lab import sctp
else:  # as a script without a search path (python -I)
    sys.path.append(str(Path(__file__).parent))
    import sctp

MAX_SOCKETS = 250  # in one control message; the kernel's limit is 253 (SCM_MAX_FD)
_CHUNK = 65536


class Pod:
    """The listening and connected sockets of one name."""

    def __init__(self, name: str, selector: selectors.BaseSelector) -> None:
        self.name = name
        self.selector = selector
        self._sockets: set[socket.socket] = set()

    def listen(self, sock: socket.socket, sctp_ports: set[int]) -> None:
        if sock.type == socket.SOCK_RAW:
            self.watch(sock, lambda _: self._associate(sock, sctp_ports))
        else:
            serve = self._accept if sock.type == socket.SOCK_STREAM else self._answer
            self.watch(sock, lambda _: serve(sock))

    def stop(self) -> None:
        for sock in list(self._sockets):
            self.drop(sock)

    def watch(self, sock: socket.socket, ready: Callable[[int], None]) -> None:
        sock.setblocking(False)
        self._sockets.add(sock)
        self.selector.register(sock, selectors.EVENT_READ, ready)

    def drop(self, sock: socket.socket) -> None:
        self._sockets.discard(sock)
        self.selector.unregister(sock)
        sock.close()

    def _answer(self, sock: socket.socket) -> None:
        try:
            _, peer = sock.recvfrom(_CHUNK)
            sock.sendto(self._line(peer, sock.getsockname()), peer)
        except OSError:  # an ICMP error about an earlier answer: its client has gone
            pass

    def _associate(self, sock: socket.socket, ports: set[int]) -> None:
        try:
            octets, peer = sock.recvfrom(_CHUNK)
            asked = sctp.parse(octets if sock.family == socket.AF_INET6 else sctp.payload(octets))
            if asked is None or asked.chunk != sctp.INIT or asked.destination not in ports:
                return
            line = self._line((peer[0], asked.source), (sock.getsockname()[0], asked.destination))
            answer = sctp.Packet(asked.destination, asked.source, asked.initiate, sctp.INIT_ACK, 1, line)
            sock.sendto(answer.octets(), (peer[0], 0))
        except OSError:  # an ICMP error about an earlier answer: its client has gone
            pass

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
            line = self._line(peer, sock.getsockname())
        except OSError:  # reset before we came to it
            return
        Session(self, sock, greeting=line)

    def _line(self, peer: tuple[Any, ...], local: tuple[Any, ...]) -> bytes:
        return json.dumps({"pod": self.name, "peer": peer[:2], "local": local[:2]}).encode() + b"\n"


class Session:
    """One TCP connection. It reads only while it has nothing left to write, so a client that never reads costs one
    chunk, not all memory.
    """

    def __init__(self, pod: Pod, sock: socket.socket, *, greeting: bytes) -> None:
        self._pod = pod
        self._sock = sock
        self._unread = b""
        self._unsent = greeting
        pod.watch(sock, self._ready)
        self._ready(selectors.EVENT_WRITE)

    def _ready(self, events: int) -> None:
        try:
            if events & selectors.EVENT_READ and not self._read():
                self._pod.drop(self._sock)
                return
            if self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._pod.drop(self._sock)
            return
        self._pod.selector.modify(
            self._sock, selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ, self._ready
        )

    def _read(self) -> bool:
        data = self._sock.recv(_CHUNK)
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._unsent += b"".join(b"%s %s\n" % (self._pod.name.encode(), line) for line in lines)
        return bool(data)


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    selector = selectors.DefaultSelector()
    pods: dict[str, Pod] = {}
    with socket.socket(fileno=0) as control:

        def command(_: int) -> None:
            message, descriptors, _flags, _address = socket.recv_fds(control, _CHUNK, MAX_SOCKETS)
            if not message:
                sys.exit()
            order: dict[str, Any] = json.loads(message)
            match order:
                case {"serve": name}:
                    pod = pods.setdefault(name, Pod(name, selector))
                    for descriptor in descriptors:
                        pod.listen(socket.socket(fileno=descriptor), set(order.get("sctp", ())))
                case {"stop": name}:
                    pods.pop(name).stop()
            control.send(b"{}")

        selector.register(control, selectors.EVENT_READ, command)
        while True:
            for key, events in selector.select():
                # A handler before it in the same round may have closed it, and even reused its descriptor.
                if selector.get_map().get(key.fd) is key:
                    key.data(events)


if __name__ == "__main__":
    main()
