"""Connections that are held over all steps of a scenario: what a change of Services does to those that are made.

A TCP connection stays with its endpoint for ever. A UDP sender has no connection, only a port that it goes on sending
from, so a proxy has to end what connection tracking remembers of it when its endpoint is gone.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from types import TracebackType
from typing import Protocol, Self

from e2e.conformance.answers import Judge, Observation, Strange
from tests.conformance.model import DROP, Expectation, Hit, To
from vcproxy.lab import Outcome, Refused, Reply, TcpSession, TimedOut, Unreachable, netns
from vcproxy.lab.dial import DialFailed, Place

PATIENCE, IMPATIENCE = 2.0, 0.4
SETTLED_WITHIN = 6.0
"""Seconds until stale flows have ended, which proxies see to after they have programmed a change."""


class _Line(Protocol):
    def ask(self, timeout: float) -> Outcome: ...

    def close(self) -> None: ...


class Tcp:
    """A connection, made by the first `ask` that succeeds."""

    def __init__(self, place: Place, address: str, port: int) -> None:
        self._place, self._address, self._port = place, address, port
        self._session: TcpSession | None = None

    def ask(self, timeout: float) -> Outcome:
        try:
            if self._session is None:
                self._session = TcpSession(self._place, self._address, self._port, timeout=timeout)
            line = self._session.ask("still?")
        except DialFailed as failed:
            return failed.outcome
        assert line == f"{self._session.reply.pod} still?", line
        return self._session.reply

    def close(self) -> None:
        if self._session:
            self._session.close()


class Udp:
    """A socket that sends to one address from one port."""

    def __init__(self, place: Place, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._sock = netns.socket_in(place.ns, family, socket.SOCK_DGRAM)
        self._sock.connect((address, port))
        level, option = (socket.IPPROTO_IPV6, 25) if ":" in address else (socket.IPPROTO_IP, 11)
        self._sock.setsockopt(level, option, 1)  # IP_RECVERR, IPV6_RECVERR: "host unreachable" is told, too

    def ask(self, timeout: float) -> Outcome:
        self._sock.settimeout(timeout)
        started = time.perf_counter()
        try:
            self._sock.send(b"who?")
            said = json.loads(self._sock.recv(65536))
        except ConnectionRefusedError:
            return Refused()
        except TimeoutError:
            return TimedOut()
        except OSError as error:
            return Unreachable("EHOSTUNREACH" if error.errno == 113 else str(error))
        source = self._sock.getsockname()[:2]
        seconds = time.perf_counter() - started
        return Reply(
            pod=said["pod"], peer=tuple(said["peer"]), local=tuple(said["local"]), source=source, seconds=seconds
        )

    def close(self) -> None:
        self._sock.close()


class Lines:
    """The held connections of a run, by scenario, flow, family and protocol. For any number of threads."""

    def __init__(self) -> None:
        self._lines: dict[tuple[object, ...], _Line] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines.values():
            line.close()

    def watch(
        self, key: tuple[object, ...], place: Place, judge: Judge, dialled: tuple[str, int, str], expected: Expectation
    ) -> Observation:
        """What happens to a line, once that is what is expected or time is up; it must then stay so for two more."""
        address, port, protocol = dialled
        with self._lock:
            made = Tcp if protocol == "TCP" else Udp
            line = self._lines.get(key) or self._lines.setdefault(key, made(place, address, port))
        timeout = IMPATIENCE if expected is DROP else PATIENCE

        def found() -> Observation:
            read = judge.read(line.ask(timeout), address, port)
            return To(frozenset({read})) if isinstance(read, Hit) else read

        until = time.monotonic() + SETTLED_WITHIN
        seen = found()
        while not _fits(seen, expected) and time.monotonic() < until:
            time.sleep(0.02)
            seen = found()
        for again in (found(), found()):
            if again != seen:
                return Strange(f"first {seen}, then {again}")
        return expected if _fits(seen, expected) else seen


def _fits(seen: Observation, expected: Expectation) -> bool:
    """A line has one endpoint of those that may be."""
    if isinstance(seen, To) and isinstance(expected, To):
        return seen.hits <= expected.hits
    return seen == expected
