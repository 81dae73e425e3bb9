"""NodePorts on 127.0.0.1 and ::1, for TCP: a relay in user space, as kube-proxy 1.37 has it (KEP-6032).

The kernel will not route loopback addresses off the node. `route_localnet` lifts that for IPv4, and with it the
protection that services on 127.0.0.1 count on (CVE-2020-8558); for IPv6 there is nothing of the kind. A relay needs no
sysctl and works for both. It listens on exactly the NodePorts that are programmed, and connects from the node's own
address to an endpoint that a client outside would get: so with external traffic policy Local, one of this node's.

What is programmed is learnt at the one place that knows: the backend's own calls are watched as they return, so what
the backend rejected is not listened on. Clients all have one source address, so session affinity keeps a port's clients
together, as in kube-proxy. A relay ends with this process; so do its connections.

Loopback is the node's own, so only the super cluster has it: what a tenant publishes is neither listened on where the
node's programs talk to each other, nor dialled from the node's network.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple, NoReturn, cast

from vcproxy.backend.protocol import Applied, Backend, TenantUpdate
from vcproxy.model.addresses import format_address
from vcproxy.model.forwarding import ForwardedPort
from vcproxy.model.services import FrontendKind, PortKey, Protocol
from vcproxy.model.tenant import SUPER_UID
from vcproxy.ops import logs

LOOPBACK = {4: "127.0.0.1", 6: "::1"}
CONNECT_TIMEOUT = 5.0
LISTEN_AGAIN = 30.0
CHUNK = 1 << 16

log = logs.get("localhost")

Place = tuple[int, int]
"""Family and port to listen on."""


class Pool(NamedTuple):
    """Where connections go. `targets`: packed (address, port) records of 6 or 18 octets. 0 seconds: no affinity."""

    targets: bytes
    affinity_seconds: int

    def all(self, family: int) -> list[tuple[str, int]]:
        """As addresses and ports."""
        width = 6 if family == 4 else 18
        records = (self.targets[at : at + width] for at in range(0, len(self.targets), width))
        return [(format_address(record[:-2]), int.from_bytes(record[-2:], "big")) for record in records]


def pools(port: ForwardedPort, families: Collection[int]) -> dict[Place, Pool]:
    """What to listen on for a service port; pools without targets are not among them."""
    if port.key.protocol is not Protocol.TCP:
        return {}
    return {
        (frontend.family, frontend.port): Pool(targets, port.affinity_seconds)
        for frontend in port.frontends
        if frontend.kind is FrontendKind.NODE_PORT and frontend.family in families
        if (targets := port.pool(frontend.outside, frontend.family))
    }


class Listener:
    """One port that is listened on, and its connections."""

    def __init__(self, family: int, pool: Pool, clock: Callable[[], float]) -> None:
        self.pool = pool
        self._family = family
        self._clock = clock
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._pinned: tuple[str, int] | None = None
        self._used = 0.0

    async def start(self, port: int) -> None:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_server(self._relay, LOOPBACK[self._family], port)

    def stop(self) -> None:
        """Listen no longer, and end all connections."""
        if self._server is not None:
            self._server.close()
        for writer in self._open:
            writer.transport.abort()

    def choose(self) -> tuple[str, int]:
        """The target of a new connection."""
        targets = self.pool.all(self._family)
        now, seconds = self._clock(), self.pool.affinity_seconds
        if not seconds or self._pinned not in targets or now - self._used > seconds:
            self._pinned = random.choice(targets)
        self._used = now
        return self._pinned

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._held(writer):
            target = self.choose()
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    far_reader, far_writer = await asyncio.open_connection(*target)
            except (OSError, TimeoutError) as error:
                log.info("an endpoint does not answer", endpoint=f"{target[0]} port {target[1]}", error=str(error))
                return
            with self._held(far_writer), contextlib.suppress(OSError):
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pump(reader, far_writer))
                    group.create_task(_pump(far_reader, writer))

    @contextlib.contextmanager
    def _held(self, writer: asyncio.StreamWriter) -> Iterator[None]:
        self._open.add(writer)
        try:
            yield
        finally:
            self._open.discard(writer)
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one direction to its end, and pass on the end: the other direction may go on (a half-closed connection)."""
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.transport.abort()


class LocalhostNodePorts:
    """Keeps the relays in step with what a backend has programmed. `families`: 4, 6 or both."""

    def __init__(self, families: Collection[int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._families = frozenset(families)
        self._clock = clock
        self._wanted: dict[PortKey, dict[Place, Pool]] = {}
        self._listeners: dict[Place, Listener] = {}
        self._failing: set[Place] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()

    def watch(self, backend: Backend) -> Backend:
        """The same backend, whose calls are learnt from."""
        return cast("Backend", _Watched(backend, self))

    def applied(self, update: TenantUpdate, rejected: Collection[PortKey]) -> None:
        """An update was programmed but for `rejected`, which keep what they had. On the backend's thread."""
        if update.uid != SUPER_UID:
            return
        put = {port.key: pools(port, self._families) for port in update.put if port.key not in rejected}
        self._tell(lambda: self._note(update, put, frozenset(rejected)))

    def removed(self, uid: str) -> None:
        """A tenant is gone. On the backend's thread."""
        if uid == SUPER_UID:
            self._tell(self._wanted.clear)

    def _tell(self, change: Callable[[], object]) -> None:
        def do() -> None:
            change()
            self._changed.set()

        if self._loop is None:
            do()  # before `run`, which looks at everything first
        else:
            self._loop.call_soon_threadsafe(do)

    def _note(
        self, update: TenantUpdate, put: Mapping[PortKey, dict[Place, Pool]], rejected: frozenset[PortKey]
    ) -> None:
        held = self._wanted
        stays = put.keys() | rejected
        gone = [key for key in held if key not in stays] if update.complete else update.removed
        for key in gone:
            held.pop(key, None)
        for key, places in put.items():
            if places:
                held[key] = places
            else:
                held.pop(key, None)

    async def run(self) -> NoReturn:
        """Listen on what is wanted, for ever; a port that is taken is tried again."""
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                self._changed.clear()
                await self._sync()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LISTEN_AGAIN if self._failing else None):
                        await self._changed.wait()
        finally:
            self._loop = None
            for listener in self._listeners.values():
                listener.stop()
            self._listeners.clear()

    async def _sync(self) -> None:
        wanted: dict[Place, Pool] = {}
        for places in self._wanted.values():
            wanted.update(places)
        for place in self._listeners.keys() - wanted.keys():
            self._listeners.pop(place).stop()
        self._failing &= wanted.keys()
        for place, pool in wanted.items():
            if (listener := self._listeners.get(place)) is not None:
                listener.pool = pool
                continue
            family, port = place
            listener = Listener(family, pool, self._clock)
            try:
                await listener.start(port)
            except OSError as error:
                if place not in self._failing:
                    log.warning(
                        "a NodePort cannot be served on loopback; stop what listens there",
                        address=LOOPBACK[family], port=port, error=str(error),
                    )  # fmt: skip
                self._failing.add(place)
            else:
                self._failing.discard(place)
                self._listeners[place] = listener


class _Watched:
    """A Backend that tells of its calls when they have returned; all else is the backend's own."""

    def __init__(self, backend: Backend, ports: LocalhostNodePorts) -> None:
        self._backend = backend
        self._ports = ports

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def apply(self, update: TenantUpdate) -> Applied:
        applied = self._backend.apply(update)
        self._ports.applied(update, {rejection.key for rejection in applied.rejections})
        return applied

    def remove_tenant(self, uid: str) -> None:
        self._backend.remove_tenant(uid)
        self._ports.removed(uid)
