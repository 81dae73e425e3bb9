"""The node's stream from a brain: connect, say what is held, take what comes, and do so again for ever.

What messages mean is in `receiver`, what is said in `outbox`, how octets travel in `dialling`; this module owns the
connection. Any replica of the brain will do, because what is held is named by digests: addresses are tried in turn, in
an order of each node's own, so that nodes spread. A pause between attempts grows with each round and is jittered, so
that a brain that comes back is not met by a thousand nodes at the same instant.

A brain that is behind this node in some tenant (it says so, see receiver) sends nothing of it until it has caught up.
It gets `PATIENCE` for that; then another replica is tried, and again ever more seldom: where no replica can read the
tenant's API server, moving on is of no use.
"""

import asyncio
import importlib.metadata
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Never, Protocol

from vcproxy.backend.protocol import Rejection
from vcproxy.node.holdings import Disconnected, Holdings, SessionEvent
from vcproxy.node.offers import Offers
from vcproxy.node.outbox import Outbox
from vcproxy.node.receiver import ProtocolError, Receiver
from vcproxy.node.share import Redundant, ShareReceiver
from vcproxy.ops import logs, stopping

VERSION = importlib.metadata.version("vcproxy")

IN_PROCESS = "in-process"
"""The address of a brain in the same process."""

WELCOME_TIMEOUT = 10.0
FIRST_PAUSE = 0.25
LONGEST_PAUSE = 10.0
NEEDLESS_PAUSE = 60.0
STABLE = 10.0
"""Seconds after which a stream that ends counts as a success: pauses start small again."""

PATIENCE = 10.0
LONGEST_PATIENCE = 640.0
"""Seconds that a brain may be behind before another is tried; doubled each time, until nothing is behind."""
LOOK_EVERY = 1.0

_log = logs.get("session")


class StreamEnded(Exception):
    """A stream could not be made, or is over; the text says why."""


class NeedlessStream(StreamEnded):
    """It leads to where another one leads."""


class Link(Protocol):
    """A stream of messages in both directions."""

    async def read(self) -> bytes:
        """The next message. Raises StreamEnded when there is none and will be none."""

    async def write(self, data: bytes) -> None:
        """Send a message; returns when there is room for the next. On a stream that is over: nothing."""


Connect = Callable[[str, str], AbstractAsyncContextManager[Link]]
"""A stream to the brain at an address, while its context is open. Second, the host that was looked up for it, which its
certificate must name unless the configuration has another name; "": the address says it. Raises StreamEnded."""


class Session:
    """One node's connection to the brain. All methods belong to the event loop's thread.

    `brains`: host:port of every replica. `holdings` may have content from an earlier run. `sink` gets every event on
    the loop and must be quick. `host`: as of Connect. `offers`: the session is a content stream, one of several.
    Times in seconds.
    """

    def __init__(
        self,
        *,
        node: str,
        brains: Sequence[str],
        connect: Connect,
        holdings: Holdings,
        sink: Callable[[SessionEvent], None],
        host: str = "",
        offers: Offers | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: random.Random | None = None,
    ) -> None:
        if not brains:
            raise ValueError("no address of a brain: set brain.addresses")
        self._node = node
        self._connect = connect
        self._host = host
        self._sink = sink
        self._shares = offers is not None
        self.reason = "not connected yet"
        self._clock = clock
        self._sleep = sleep
        self._chance = chance or random.Random()
        self._brains = self._chance.sample(list(brains), len(brains))
        self._patience = PATIENCE
        self._wake = asyncio.Event()
        self._outbox = Outbox(self._wake.set, _call_later)
        how: dict[str, Any] = {
            "holdings": holdings,
            "sink": sink,
            "outbox": self._outbox,
            "call_later": _call_later,
        }
        self._receiver = ShareReceiver(offers=offers, by=self, **how) if offers is not None else Receiver(**how)

    @property
    def brain(self) -> str:
        """The run of the brain that the stream stands to; "" for none."""
        return self._receiver.brain

    @property
    def problems(self) -> tuple[str, ...]:
        """What the stream that stands does not bring."""
        behind = self._receiver.node_behind
        return (f"of this node's own pods, facts and tenants the brain says nothing new: {behind}",) if behind else ()

    async def run(self) -> Never:
        """Hold a stream for ever. Only cancellation ends it, and what the sink raises."""
        attempt = 0
        while True:
            address = self._brains[attempt % len(self._brains)]
            began = self._clock()
            try:
                await stopping.heeded(self._stream(address))
            except* StreamEnded as group:
                ended = _first(group)
            self.reason = str(ended)
            if isinstance(ended, NeedlessStream):
                _log.debug("no stream", brain=address, reason=self.reason)
                await self._sleep(NEEDLESS_PAUSE)
                continue
            _log.info("no stream", brain=address, reason=self.reason)
            if not self._shares:
                self._sink(Disconnected(self.reason))
            if self._clock() - began >= STABLE:
                # The one that just went away is the last to be asked again.
                self._brains.append(self._brains.pop(attempt % len(self._brains)))
                attempt = 0
            else:
                attempt += 1
            await self._sleep(self._pause(attempt))

    def committed(
        self, uid: str, revision: int, digest: bytes, rejections: Sequence[Rejection], microseconds: int
    ) -> None:
        """The backend programmed this content, but for `rejections`: all of the tenant's ports in quarantine now.

        Told to the brain if it is the one that sent this content. `revision` is what it was called when it was
        resolved; where another brain has taken over since, the digest says what that one calls it.
        """
        del revision
        known = self._receiver.revision_of(uid, digest)
        if known is not None:
            self._outbox.committed(uid, known, digest, rejections, microseconds)

    def failed(self, uid: str, revision: int, error: str) -> None:
        """The backend could not program this revision; it is tried again."""
        self._outbox.failed(uid, revision, error)

    def ask(self, uid: str) -> None:
        """Have the brain offer the tenant anew, if it still has it."""
        self._outbox.ask(uid)

    def _pause(self, attempt: int) -> float:
        rounds = attempt // len(self._brains)
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(rounds, 16))
        return self._chance.uniform(longest / 2, longest)

    async def _stream(self, address: str) -> None:
        """One stream from its Hello to its end. Raises StreamEnded, in an exception group."""
        hello = self._receiver.start(self._node, VERSION)
        self._wake.clear()
        try:
            async with asyncio.TaskGroup() as group, self._connect(address, self._host) as link:
                group.create_task(self._write(link, hello))
                if address != IN_PROCESS and not address.startswith("unix:") and not self._shares:
                    group.create_task(self._judge_brain())
                await self._read(link)
        finally:
            self._receiver.stop()

    async def _read(self, link: Link) -> Never:
        """Take what comes. Raises StreamEnded when there is no more."""
        deadline = asyncio.timeout(WELCOME_TIMEOUT)
        try:
            async with deadline:
                while True:
                    self._receiver.receive(await link.read())
                    deadline.reschedule(None)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise StreamEnded("the brain did not welcome this node in time") from None
        except Redundant as error:
            raise NeedlessStream(str(error)) from None
        except ProtocolError as error:
            raise StreamEnded(f"what the brain sent makes no sense: {error}") from None

    async def _judge_brain(self) -> Never:
        """Raises StreamEnded when the brain has been behind for long."""
        since: float | None = None
        while True:
            await self._sleep(LOOK_EVERY)
            behind, now = self._receiver.behind(), self._clock()
            if not behind:
                since, self._patience = None, PATIENCE
            elif since is None:
                since = now
            elif now - since >= self._patience:
                self._patience = min(2 * self._patience, LONGEST_PATIENCE)
                many = f"{behind[0]}" + (f" and {len(behind) - 1} more" if len(behind) > 1 else "")
                raise StreamEnded(f"this brain is behind in {many}; another is asked")

    async def _write(self, link: Link, hello: bytes) -> None:
        await link.write(hello)
        while True:
            data = self._outbox.take()
            if data is None:
                self._wake.clear()
                await self._wake.wait()
            else:
                await link.write(data)


def _call_later(delay: float, act: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(delay, act)


def _first(group: BaseExceptionGroup[StreamEnded]) -> StreamEnded:
    for error in group.exceptions:
        return error if isinstance(error, StreamEnded) else _first(error)
    raise AssertionError("an exception group is never empty")
