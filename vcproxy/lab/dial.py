"""Clients: dial from any place of the lab and say what happened, as data.

`tcp_request`, `udp_request` and `sctp_request` return an outcome and never raise for what a network does: that a tenant
is refused is a result that tests compare and the demo prints. `TcpSession` is a connection to hold on to. Sockets are
made in the place's namespace and used from here; no process is started, and calls may run in threads side by side.

Connections end with a reset (SO_LINGER 0), so no TIME_WAIT keeps a source port: the next call may take the same port at
once.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import random
import select
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from vcproxy.lab import netns, sctp

_RECVERR = {
    socket.AF_INET: (socket.IPPROTO_IP, 11),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25),
}  # <linux/in.h>, <linux/in6.h>

Address = tuple[str, int]
"""IP address and port."""


class Place(Protocol):
    """Where one can dial from: a pod, a node, a client."""

    @property
    def ns(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Somebody answered."""

    pod: str
    """Who: the name it was served under."""
    peer: Address
    """The client as the server saw it, behind all translation."""
    local: Address
    """The server's own address, which the dialled one was translated to."""
    source: Address
    """The client's address as the client has it."""
    seconds: float
    """From the first packet to the answer."""


@dataclass(frozen=True)
class HttpReply:
    """A web server answered."""

    status: int
    headers: Mapping[str, str]
    body: str


@dataclass(frozen=True)
class Refused:
    """A TCP reset or an ICMP "port unreachable": nobody serves there, or a Service has no endpoint."""


@dataclass(frozen=True)
class TimedOut:
    """Nothing came back: dropped on the way there or on the way back."""


@dataclass(frozen=True)
class Unreachable:
    """The network said so: no route, an ICMP "host unreachable", a local rule."""

    error: str
    """The errno's name: EHOSTUNREACH, ENETUNREACH, EACCES or EPERM."""


@dataclass(frozen=True)
class Broken:
    """A connection that was made, and then ended before the answer."""


Failure = Refused | TimedOut | Unreachable | Broken
Outcome = Reply | Failure


class DialFailed(Exception):
    """A `TcpSession` could not be made, or broke; `outcome` says how."""

    def __init__(self, dst: Address, outcome: Failure) -> None:
        super().__init__(f"{dst[0]} port {dst[1]}: {outcome}")
        self.outcome = outcome


class TcpSession:
    """A TCP connection to one of the lab's servers, open until closed. `reply` is what the server said on connect.

    `source_port` binds the client's port, so that two tenants can hold the same five-tuple at the same time. `device`
    sends through that device of a node (SO_BINDTODEVICE), as a probe of the host into a tenant's network does.
    `timeout` is for connecting and for each exchange, in seconds. Raises `DialFailed`.
    """

    def __init__(
        self,
        place: Place,
        dst: str,
        port: int,
        *,
        timeout: float = 2.0,
        source_port: int = 0,
        device: str | None = None,
    ) -> None:
        self._dst = (dst, port)
        self._unread = b""
        self._sock = _socket(place, socket.SOCK_STREAM, dst, source_port=source_port, device=device, timeout=timeout)
        started = time.perf_counter()
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                _connect(self._sock, self._dst, timeout)
            except OSError as error:
                raise DialFailed(self._dst, _failure(error)) from error
            self.reply = _reply(self._receive(), self._sock, started)
        except BaseException:
            self._sock.close()
            raise

    def ask(self, line: str) -> str:
        """Send one line (without its end), return the server's line: "NAME line". Raises `DialFailed` if the connection
        does not carry it.
        """
        try:
            self._sock.sendall(line.encode() + b"\n")
        except OSError as error:
            raise DialFailed(self._dst, _failure(error)) from error
        return self._receive().decode()

    def close(self) -> None:
        """Reset the connection."""
        self._sock.close()

    def __enter__(self) -> TcpSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> bytes:
        while b"\n" not in self._unread:
            try:
                data = self._sock.recv(65536)
            except OSError as error:
                raise DialFailed(self._dst, _failure(error)) from error
            if not data:
                raise DialFailed(self._dst, Broken())
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def tcp_request(
    place: Place, dst: str, port: int, *, timeout: float = 2.0, source_port: int = 0, device: str | None = None
) -> Outcome:
    """Connect, read who answers, reset. Parameters as in `TcpSession`."""
    try:
        with TcpSession(place, dst, port, timeout=timeout, source_port=source_port, device=device) as session:
            return session.reply
    except DialFailed as failed:
        return failed.outcome


def udp_request(
    place: Place, dst: str, port: int, *, timeout: float = 2.0, source_port: int = 0, device: str | None = None
) -> Outcome:
    """Send one datagram (it is not repeated), and wait for the answer. The socket is connected: an answer from any
    address but `dst` does not count.
    """
    with _socket(place, socket.SOCK_DGRAM, dst, source_port=source_port, device=device, timeout=timeout) as sock:
        started = time.perf_counter()
        try:
            sock.connect((dst, port))
            # Or "host unreachable" is kept from us: to UDP it is no fatal error (__udp4_lib_err).
            sock.setsockopt(*_RECVERR[sock.family], 1)
            sock.send(b"who?")
            return _reply(sock.recv(65536), sock, started)
        except OSError as error:
            return _failure(error)


def sctp_request(place: Place, dst: str, port: int, *, source_port: int, timeout: float = 2.0) -> Outcome:
    """Ask for an association, and give it up when somebody agrees (see `sctp`). `source_port` must be the caller's own:
    no socket holds it.
    """
    family = socket.AF_INET6 if ":" in dst else socket.AF_INET
    with netns.socket_in(place.ns, family, socket.SOCK_RAW, sctp.PROTOCOL) as sock:
        started = time.perf_counter()
        deadline = started + timeout
        mine = random.getrandbits(32) | 1
        try:
            sock.connect((dst, 0))
            sock.setsockopt(*_RECVERR[sock.family], 1)
            with suppress(PermissionError):  # a host's own rule rejects; what it answers is told to the socket
                sock.send(sctp.Packet(source_port, port, 0, sctp.INIT, mine).octets())
            while (left := deadline - time.perf_counter()) > 0:
                sock.settimeout(left)
                try:
                    octets = sock.recv(65536)
                except OSError as error:
                    if error.errno is None or _concerns(sock, source_port):
                        return _failure(error)
                    continue
                answer = sctp.parse(octets if family == socket.AF_INET6 else sctp.payload(octets))
                if answer and (answer.source, answer.destination, answer.tag) == (port, source_port, mine):
                    if answer.chunk != sctp.INIT_ACK:
                        return Refused()
                    sock.send(sctp.Packet(source_port, port, answer.initiate, sctp.ABORT).octets())
                    return _told(answer.cookie, (sock.getsockname()[0], source_port), started)
        except OSError as error:
            return _failure(error)
    return TimedOut()


def _concerns(sock: socket.socket, source_port: int) -> bool:
    """Whether an error is about a packet from this port: the kernel tells all raw sockets of an address (raw_err)."""
    about = False
    sock.setblocking(False)
    while True:
        try:
            packet, _, _, _ = sock.recvmsg(65536, 0, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return about
        about |= packet[:2] == source_port.to_bytes(2, "big")


def http_get(place: Place, dst: str, port: int, path: str = "/", *, timeout: float = 5.0) -> HttpReply | Failure:
    """One GET over a connection of its own."""
    with _socket(place, socket.SOCK_STREAM, dst, source_port=0, device=None, timeout=timeout) as sock:
        connection = http.client.HTTPConnection(dst, port)
        try:
            _connect(sock, (dst, port), timeout)
            connection.sock = sock
            connection.request("GET", path)
            answer = connection.getresponse()
            return HttpReply(answer.status, dict(answer.getheaders()), answer.read().decode())
        except http.client.RemoteDisconnected:
            return Broken()
        except OSError as error:
            return _failure(error)


def _socket(
    place: Place, kind: socket.SocketKind, dst: str, *, source_port: int, device: str | None, timeout: float
) -> socket.socket:
    family = socket.AF_INET6 if ":" in dst else socket.AF_INET
    sock = netns.socket_in(place.ns, family, kind)
    try:
        sock.settimeout(timeout)
        if device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        if source_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", source_port))
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, dst: Address, timeout: float) -> None:
    sock.setblocking(False)
    number = sock.connect_ex(dst)
    if number == errno.EINPROGRESS:
        # In a lab the whole path can run inside our system call: an ICMP error then finds the socket locked by us, and
        # the kernel only
        # notes it as a soft error and waits for the next SYN, a second later (tcp_v6_err). Asking fetches it now.
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number == 0:
        ready = select.poll()
        ready.register(sock, select.POLLOUT)
        if not ready.poll(timeout * 1000):
            raise TimeoutError
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))
    sock.settimeout(timeout)


def _reply(line: bytes, sock: socket.socket, started: float) -> Reply:
    return _told(line, sock.getsockname()[:2], started)


def _told(line: bytes, source: Address, started: float) -> Reply:
    answer = json.loads(line)
    return Reply(
        pod=answer["pod"],
        peer=tuple(answer["peer"]),
        local=tuple(answer["local"]),
        source=source,
        seconds=time.perf_counter() - started,
    )


def _failure(error: OSError) -> Failure:
    match error.errno:
        case errno.ECONNREFUSED:
            return Refused()
        case errno.EHOSTUNREACH | errno.ENETUNREACH | errno.EACCES | errno.EPERM as number:
            return Unreachable(errno.errorcode[number])
        case errno.ECONNRESET | errno.EPIPE:
            return Broken()
        case None | errno.ETIMEDOUT:  # None: Python's own timeout has no errno
            return TimedOut()
    raise error  # not the network's doing, such as a source port that is taken
