"""The one thread that a backend is called from, seen from the event loop.

A backend may block (a netlink transaction of a million elements takes seconds) and is promised one caller at a time, so
it lives on a thread of its own. Resolving happens there too: its input is immutable, and the loop, which must keep
reading the stream and answering health checks, should not stand still while 100,000 ports are resolved.

A call is never abandoned half-way: if the task that awaits it is cancelled, the call is waited for, because what it
programs must be complete when the process ends.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, ParamSpec, TypeVar

import msgspec

from vcproxy.backend.protocol import Applied, Backend, Drift, TenantUpdate
from vcproxy.model.addresses import Prefix
from vcproxy.model.services import PortKey, ServicePort
from vcproxy.node.localpolicy import LocalPort, local_ports
from vcproxy.node.resolver import NodeView, resolve
from vcproxy.node.screen import Denied, screen

P = ParamSpec("P")
T = TypeVar("T")


class Order(msgspec.Struct, frozen=True):
    """One tenant's change, before this node's choices: `complete` if `ports` is all there is, as in TenantUpdate."""

    uid: str
    ports: Sequence[ServicePort]
    removed: tuple[PortKey, ...]
    complete: bool
    virtual_ranges: tuple[Prefix, ...]
    view: NodeView
    denied: Denied = Denied()


class Done(msgspec.Struct, frozen=True):
    """What became of an order, and what it took: seconds to resolve and to program. `local`: see localpolicy."""

    applied: Applied
    resolve_seconds: float
    apply_seconds: float
    families: tuple[str, ...]
    local: tuple[LocalPort, ...] = ()


class Mended(NamedTuple):
    """What a repair found, None if none was due, and the descriptor to watch from now on (-1: none)."""

    drift: Drift | None
    fileno: int


class Worker:
    """Calls `backend` from one thread, one call at a time, in the order in which they were made."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="backend")

    async def call(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run `function` on the backend's thread. Cancelling waits for its end, then cancels."""
        future = self._executor.submit(function, *arguments, **named)
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.wait([waiting])
                if not waiting.cancelled():
                    waiting.exception()  # seen: the caller that wanted to know has gone
            raise

    async def program(self, order: Order) -> Done:
        """Resolve and apply. Raises BackendError."""
        return await self.call(self._program, order)

    def _program(self, order: Order) -> Done:
        started = time.perf_counter()
        ports, rejections = screen(order.uid, order.ports, order.denied)
        put = tuple(resolve(ports, order.view))
        local = local_ports(ports, order.view.node_id)
        resolved = time.perf_counter()
        applied = self._backend.apply(TenantUpdate(order.uid, put, order.removed, order.complete, order.virtual_ranges))
        applied = msgspec.structs.replace(applied, rejections=applied.rejections + rejections)
        return Done(applied, resolved - started, time.perf_counter() - resolved, _families(order.ports), local)

    async def mend(self, *, known_bad: bool) -> Mended:
        """Repair if something drifted, or if that is `known_bad`. Raises BackendError."""
        return await self.call(self._mend, known_bad)

    def _mend(self, known_bad: bool) -> Mended:
        drifted = self._backend.drifted()
        drift = self._backend.repair() if drifted or known_bad else None
        return Mended(drift, self._backend.fileno())

    async def close(self) -> None:
        """Close the backend after the calls made so far, and end the thread. What is programmed stays."""
        try:
            await self.call(self._backend.close)
        finally:
            self._executor.shutdown(wait=True)


def _families(ports: Sequence[ServicePort]) -> tuple[str, ...]:
    """`IPv4` and `IPv6` as the ports are dialled, for kube-proxy's metric labels; of many ports the first few count."""
    lengths = {len(frontend.address) for port in ports[:16] for frontend in port.frontends}
    return tuple(name for length, name in ((4, "IPv4"), (16, "IPv6")) if length in lengths)
