"""The API servers of all tenants, in one process: `python -m benchmarks.brain.apiservers DIRECTORY TENANTS`.

The last one is the super cluster's, which says on which nodes the tenants' pods are.

Each has a port of its own, over TLS with client certificates, and speaks as much HTTP/1.1 as a list and a watch need.
Bodies are made by one formatting of octets, so that what is measured is the reader. Orders come by standard input, one
line each, and are answered on standard output when they have been carried out:

    objects SERVICES ENDPOINTS         what every tenant holds from now on; for a brain that is yet to come
    steady RATE SECONDS [TENANT RATE]  so many events a second, over all tenants in turns; and so many more of one

An event is sent when its time has come, and dated then. Of the one that floods, events that would only wait in this
process are left out: an API server, too, keeps few for a watch that is read slowly.
"""

import asyncio
import itertools
import json
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import uvloop

from benchmarks.brain.objects import Objects, bookmark, whereabouts

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_TICK = 0.001
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"


class ApiServer:
    """One tenant's. `watches`: open ones, by path; `waiting`: those whose reader is behind."""

    def __init__(self, tenant: int, held: "Held") -> None:
        self.tenant = tenant
        self.watches: dict[str, set[asyncio.Transport]] = {}
        self.waiting: set[asyncio.Transport] = set()
        self._held = held

    def answer(self, target: str, transport: asyncio.Transport) -> None:
        """One GET."""
        path, _, query = target.partition("?")
        if "watch=true" in query:
            self.watches.setdefault(path, set()).add(transport)
            transport.write(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            return
        if self.tenant == self._held.tenants:
            body = whereabouts(path, self.tenant)
        else:
            body = self._held.objects.listed(path, self.tenant)
        transport.write(_HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        transport.write(body)

    def change(self, turn: int) -> None:
        """One endpoint of one Service changes; that of the next Service at the next turn."""
        line = self._held.objects.event(self.tenant, turn % self._held.objects.services, next(self._held.versions))
        self.send(SLICES, line)

    def flood(self) -> Iterator[None]:
        """One change after the other, as cheap as they can be made."""
        for line in itertools.cycle(self._held.objects.flood(self.tenant)):
            self.send(SLICES, line % next(self._held.versions))
            yield

    def send(self, path: str, line: bytes) -> None:
        """Write a line to the watches."""
        for transport in self.watches.get(path, ()):
            transport.write(b"%x\r\n%s\r\n" % (len(line), line))

    def left(self, transport: asyncio.Transport) -> None:
        """The reader is gone."""
        for open_ones in self.watches.values():
            open_ones.discard(transport)
        self.waiting.discard(transport)


class Held:
    """What all have in common."""

    def __init__(self, tenants: int) -> None:
        self.tenants = tenants
        self.objects = Objects(1, 1)
        self.versions = itertools.count(2)


class Connection(asyncio.Protocol):
    """Requests without bodies, one after the other."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            assert self._transport is not None
            self._server.answer(head.split(b" ", 2)[1].decode(), self._transport)

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._server.waiting.add(self._transport)

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._server.waiting.discard(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:  # else it left in the middle of a handshake
            self._server.left(self._transport)


async def steady(
    servers: list[ApiServer], rate: float, seconds: float, noisy: int = -1, more: float = 0
) -> dict[str, float]:
    """Events over all tenants in turns, and `more` a second of the tenant `noisy`."""
    flood = servers[noisy].flood() if more else None
    began = time.monotonic()
    sent = extra = left_out = 0
    late = 0.0
    while (elapsed := time.monotonic() - began) < seconds:
        while sent < elapsed * rate:
            late = max(late, elapsed - sent / rate)
            servers[sent % len(servers)].change(sent // len(servers))
            sent += 1
        for _ in range(min(200, int(elapsed * more) - extra)):  # what is more than that comes at the next tick
            extra += 1
            if flood is not None and not servers[noisy].waiting:
                next(flood)
            else:
                left_out += 1
        await asyncio.sleep(_TICK)
    return {"sent": sent, "more": extra - left_out, "seconds": elapsed, "late": late}


async def main(directory: Path, count: int) -> None:
    """Serve, and do as told."""
    loop = asyncio.get_running_loop()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "apiserver.crt", directory / "apiserver.key")
    context.load_verify_locations(directory / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    held, ports = Held(count), []
    servers = [ApiServer(tenant, held) for tenant in range(count + 1)]
    for server in servers:
        listening = await loop.create_server(lambda server=server: Connection(server), "127.0.0.1", 0, ssl=context)
        ports.append(listening.sockets[0].getsockname()[1])
    _say(ports)
    tenants = servers[:-1]
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with asyncio.TaskGroup() as group:
        talk = group.create_task(_bookmarks(servers, held))
        while order := (await orders.readline()).split():
            match order[0], [float(number) for number in order[1:]]:
                case b"objects", [services, endpoints]:
                    held.objects = Objects(int(services), int(endpoints))
                    _say({})
                case b"steady", [rate, seconds]:
                    _say(await steady(tenants, rate, seconds))
                case b"steady", [rate, seconds, noisy, more]:
                    _say(await steady(tenants, rate, seconds, int(noisy), more))
        talk.cancel()


async def _bookmarks(servers: list[ApiServer], held: Held) -> None:
    """Once a minute, as API servers do, spread over the minute."""
    while True:
        for server in servers:
            line = bookmark(next(held.versions))
            for path in server.watches:
                server.send(path, line)
            await asyncio.sleep(60 / len(servers))


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), int(sys.argv[2])))
