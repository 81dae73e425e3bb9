"""All streams of a node: the leading one, and beside it, where brains share tenants, one to each brain.

The leading session is what a node always has: a stream to any brain, to another one when it ends. If that brain says
that it has a part of the tenants only, content sessions are opened to every address that the configured names stand
for, now and again: brains come and go. Their contents meet in the same holdings; which of them is listened to for a
tenant is decided in `offers`. If the leading brain has all tenants, there are none.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Never

from vcproxy.backend.protocol import Rejection
from vcproxy.node.holdings import Connected, Disconnected, Holdings, SessionEvent, TenantGone, TenantsComplete
from vcproxy.node.offers import Offers
from vcproxy.node.session import Connect, Session
from vcproxy.ops import logs, metrics

RESOLVE_SECONDS = 5.0
AWAIT_SECONDS = 60.0
"""How long a node that starts is not ready for want of a tenant that no brain has told it."""

_log = logs.get("session")


class Sessions:
    """One node's streams; arguments as of Session. All methods belong to the event loop's thread.

    `resolve`: all addresses that a host:port stands for; blocks, raises OSError. `every`: seconds between look-ups.
    """

    def __init__(
        self,
        *,
        node: str,
        brains: Sequence[str],
        connect: Connect,
        holdings: Holdings,
        sink: Callable[[SessionEvent], None],
        resolve: Callable[[str], Iterable[str]] | None = None,
        every: float = RESOLVE_SECONDS,
        **how: Any,
    ) -> None:
        self._node = node
        self._brains = tuple(brains)
        self._connect = connect
        self._holdings = holdings
        self._sink = sink
        self._resolve = resolve or look_up
        self._every = every
        self._how = how
        self._sharded = False
        self._wake = asyncio.Event()
        self._offers = Offers(holdings, lambda uid: sink(TenantGone(uid)))
        self._leading = Session(node=node, brains=brains, connect=connect, holdings=holdings, sink=self._lead, **how)
        self._shares: dict[str, tuple[Session, asyncio.Task[Never]]] = {}
        self._found: dict[str, tuple[str, ...]] = {}
        self._named_at: float | None = None

    @property
    def awaited(self) -> int:
        """Of how many tenants of this node no brain has told all yet; a tenant that none can read is given up."""
        if self._named_at is None or time.monotonic() - self._named_at > AWAIT_SECONDS:
            return 0
        return self._offers.missing

    async def run(self) -> None:
        """Hold streams for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._leading.run())
            group.create_task(self._keep(group))

    def committed(
        self, uid: str, revision: int, digest: bytes, rejections: Sequence[Rejection], microseconds: int
    ) -> None:
        """As Session, to whom it concerns."""
        self._of(uid).committed(uid, revision, digest, rejections, microseconds)

    def failed(self, uid: str, revision: int, error: str) -> None:
        """As Session, to whom it concerns."""
        self._of(uid).failed(uid, revision, error)

    @property
    def problems(self) -> tuple[str, ...]:
        """For people."""
        return self._leading.problems

    def streams(self) -> list[Mapping[str, Any]]:
        """Content streams, for people."""
        return [
            {
                "address": address,
                "brain": session.brain or None,
                "tenants": self._offers.fed(session),
                "disconnected": None if session.brain else session.reason,
            }
            for address, (session, _) in sorted(self._shares.items())
        ]

    def _of(self, uid: str) -> Session:
        found = self._offers.feeder(uid)
        return found if isinstance(found, Session) else self._leading

    def _lead(self, event: SessionEvent) -> None:
        """What the leading stream says."""
        self._sink(event)
        match event:
            case Connected(sharded=sharded):
                self._sharded = sharded
                self._wake.set()
            case TenantsComplete(uids=uids) if self._sharded:
                self._named_at = self._named_at or time.monotonic()
                self._offers.name(uids)
            case Disconnected():
                self._offers.name(None)

    async def _keep(self, group: asyncio.TaskGroup) -> Never:
        """Content sessions as they are to be."""
        while True:
            self._wake.clear()
            wanted = await self._addresses() if self._sharded else {}
            for address, (session, task) in list(self._shares.items()):
                # An address that is gone may lead on: a brain that ends leaves its name first.
                if address not in wanted and not (self._sharded and session.brain):
                    task.cancel()
                    del self._shares[address]
            for address, host in wanted.items():
                if address not in self._shares:
                    session = self._share(address, host)
                    self._shares[address] = session, group.create_task(session.run())
            metrics.FEEDERS.set(sum(1 for session, _ in self._shares.values() if session.brain))
            try:
                async with asyncio.timeout(self._every if self._sharded else None):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _share(self, address: str, host: str) -> Session:
        return Session(
            node=self._node,
            brains=(address,),
            connect=self._connect,
            host=host,
            holdings=self._holdings,
            sink=self._sink,
            offers=self._offers,
            **self._how,
        )

    async def _addresses(self) -> dict[str, str]:
        """What to dial, and the host that it was looked up for."""
        wanted: dict[str, str] = {}
        for brain in self._brains:
            if brain.startswith("unix:"):
                wanted[brain] = ""
                continue
            try:
                self._found[brain] = tuple(await asyncio.to_thread(self._resolve, brain))
            except OSError as error:
                _log.warning("a name cannot be looked up; its last addresses count", name=brain, error=str(error))
            host = brain.rpartition(":")[0].strip("[]")
            wanted |= dict.fromkeys(self._found.get(brain, ()), host)
        return wanted


def look_up(address: str) -> list[str]:
    """All addresses that host:port stands for, with the port. Blocks. Raises OSError."""
    host, _, port = address.rpartition(":")
    infos = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    ips = [str(name[0]) for _, _, _, _, name in infos]
    return [f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips]
