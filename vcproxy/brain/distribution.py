"""The streams of nodes that stand: who watches what, and the two directions of each.

All that is decided about what to send is in `stream`; how octets travel is somebody else's business (`server` for
gRPC; a process that is brain and node at once needs none). A stream is two tasks of one group: one reads what the node
says, one writes what is next as soon as the transport takes it. Either end ends both.

What a node says is bounded (time until Hello, streams a node) and checked; what is wrong with it ends that stream with
a code that says why, and touches nothing else.
"""

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal

import msgspec
from google.protobuf.message import DecodeError

from vcproxy.brain import encoding
from vcproxy.brain.admission import Admission
from vcproxy.brain.greeting import Greeting, Kind
from vcproxy.brain.progress import NodeStatus
from vcproxy.brain.store import Store
from vcproxy.brain.stream import Placement, Stream
from vcproxy.model.mark import Mark, plausible
from vcproxy.ops import logs, metrics
from vcproxy.pb import convert, distribution_pb2
from vcproxy.pb.convert import MalformedModel

VERSION = importlib.metadata.version("vcproxy")

_log = logs.get("distribution")

Code = Literal["INVALID_ARGUMENT", "PERMISSION_DENIED", "DEADLINE_EXCEEDED", "ABORTED"]
"""gRPC's names."""

Write = Callable[[bytes], Awaitable[None]]
"""Sends a message, and returns when the transport takes the next one."""


class Refused(Exception):
    """A stream is ended because of what the peer said."""

    def __init__(self, code: Code, problem: str) -> None:
        super().__init__(problem)
        self.code = code
        self.problem = problem


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of streams, and of the server behind them. Times in seconds.

    `snapshots`: nodes that are sent snapshots at a time; `lease`: how long a node that does not read keeps its turn.
    `streams_per_node`: an agent that is being replaced and its successor overlap; of more, the oldest is ended.
    `keepalive`: between pings of a silent peer; `keepalive_timeout`: until one without an answer is given up. Agents
    ping three times as often: to ping a thousand nodes every 10 s as well took 4 % of a core.
    `message_octets`: of one message from a node: a Hello with ten thousand tenants fits.
    """

    snapshots: int = 16
    lease: float = 5.0
    streams_per_node: int = 4
    hello_timeout: float = 10.0
    keepalive: float = 30.0
    keepalive_timeout: float = 10.0
    message_octets: int = 1 << 20


class Distributor:
    """Serves the tenants of `store` to the nodes that `placement` puts them on.

    `sharded`: the store has a part of the tenants, other brains have the others.
    """

    def __init__(
        self, *, store: Store, placement: Placement, limits: Limits | None = None, sharded: bool = False
    ) -> None:
        self.limits = limits or Limits()
        self._sharded = sharded
        self._store = store
        self._placement = placement
        self._admission = Admission(slots=self.limits.snapshots, lease=self.limits.lease)
        self._streams: dict[str, list[_Connection]] = {}
        self._watching: dict[str, set[Stream]] = {}
        store.subscribe(self._changed)
        placement.subscribe(self._placed)

    def nodes(self) -> Sequence[NodeStatus]:
        """The streams that stand, by node, the oldest first."""
        return [c.stream.status() for node in sorted(self._streams) for c in self._streams[node]]

    def _changed(self, uid: str) -> None:
        for stream in self._watching.get(uid, ()):
            stream.mark(uid)

    def _placed(self, node: str) -> None:
        for name in (node,) if node else tuple(self._streams):
            for connection in self._streams.get(name, ()):
                self._plan(connection.stream)

    def _plan(self, stream: Stream) -> None:
        before = stream.entitled
        stream.plan()
        self._index(stream, before, stream.entitled)

    def _index(self, stream: Stream, before: frozenset[str], after: frozenset[str]) -> None:
        for uid in before - after:
            watching = self._watching[uid]
            watching.discard(stream)
            if not watching:
                del self._watching[uid]
        for uid in after - before:
            self._watching.setdefault(uid, set()).add(stream)

    async def attend(self, node: str, peer: str, requests: AsyncIterator[bytes], write: Write) -> None:
        """One stream, until the node leaves. `node`: whose it is, as its credentials say. Raises Refused."""
        greeting = await self._greeting(requests, node)
        if greeting is None:
            return
        bell = _Bell()
        stream = Stream(
            greeting,
            peer=peer,
            version=VERSION,
            sharded=self._sharded,
            store=self._store,
            placement=self._placement,
            admission=self._admission,
            wake=bell.ring,
        )
        connection = _Connection(stream)
        self._open(connection)
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(_write(stream, bell, write))
                evicted = group.create_task(connection.evicted())
                await _read(stream, requests)
                writer.cancel()
                evicted.cancel()
        except* Refused as refusals:
            raise _first(refusals) from None
        finally:
            self._close(connection)

    async def _greeting(self, requests: AsyncIterator[bytes], node: str) -> Greeting | None:
        """The peer's Hello, None if it left without. Raises Refused."""
        try:
            async with asyncio.timeout(self.limits.hello_timeout):
                raw = await anext(requests, None)
        except TimeoutError:
            raise Refused("DEADLINE_EXCEEDED", "no Hello came in time") from None
        return None if raw is None else parse_hello(raw, node)

    def _open(self, connection: "_Connection") -> None:
        stream = connection.stream
        streams = self._streams.setdefault(stream.node, [])
        streams.append(connection)
        self._index(stream, frozenset(), stream.entitled)
        if len(streams) > self.limits.streams_per_node:
            streams[0].evict.set()
        metrics.NODES.set(len(self._streams))
        _log.info("node connected", node=stream.node, tenants=len(stream.entitled), stream=stream.kind.value)
        if self._sharded and stream.kind is Kind.WHOLE:
            _log.warning("this agent's version knows nothing of shards: it gets what this brain has", node=stream.node)

    def _close(self, connection: "_Connection") -> None:
        stream = connection.stream
        self._index(stream, stream.entitled, frozenset())
        stream.close()
        streams = self._streams[stream.node]
        streams.remove(connection)
        if not streams:
            del self._streams[stream.node]
        metrics.NODES.set(len(self._streams))
        _log.info("node disconnected", node=stream.node)


class _Connection:
    """A stream that stands, and the way to end it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.evict = asyncio.Event()

    async def evicted(self) -> None:
        await self.evict.wait()
        raise Refused("ABORTED", f"node {self.stream.node} opened newer streams")


class _Bell:
    """An asyncio.Event for one waiter, at half the price: a thousand streams wait for the same change.

    What rings while nobody waits is forgotten: wait only after a look that found nothing.
    """

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake who waits."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def rung(self) -> asyncio.Future[None]:
        """Done once it rings."""
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        return waiter


async def _write(stream: Stream, bell: _Bell, write: Write) -> None:
    while True:
        messages = stream.next_messages()
        if not messages:
            await bell.rung()
            continue
        await write(encoding.encode_together([message.data for message in messages]))
        for message in messages:
            metrics.SENT_BYTES.add(message.kind, len(message.data))


async def _read(stream: Stream, requests: AsyncIterator[bytes]) -> None:
    """Act on what the node says until it leaves. Raises Refused."""
    async for raw in requests:
        message = _parse(raw)
        try:
            match message.WhichOneof("message"):
                case "ack":
                    stream.acknowledged(message.ack)
                case "subscribe":
                    stream.subscribed(message.subscribe.tenant, refresh=message.subscribe.refresh)
                case "unsubscribe":
                    stream.unsubscribed(message.unsubscribe.tenant)
                case "known":
                    stream.answered(*parse_known(message.known))
                case "hello":
                    raise Refused("INVALID_ARGUMENT", "a second Hello on one stream")
        except MalformedModel as error:
            raise Refused("INVALID_ARGUMENT", str(error)) from None


def parse_hello(raw: bytes, node: str) -> Greeting:
    """The first message of a stream whose credentials name `node`. Raises Refused."""
    message = _parse(raw)
    if message.WhichOneof("message") != "hello":
        raise Refused("INVALID_ARGUMENT", "the first message must be Hello")
    hello = message.hello
    if hello.node != node:
        raise Refused(
            "PERMISSION_DENIED",
            f"the client certificate names node {node!r}, Hello says {hello.node[:64]!r}: "
            "use the certificate of this node, or set nodeName to its name",
        )
    known: dict[str, bytes] = {}
    marks: dict[str, Mark] = {}
    unheard: dict[str, frozenset[str]] = {}
    try:
        for held in hello.known:
            uid, digest, mark, doubted = parse_known(held)
            if uid in known:
                raise MalformedModel(uid, None, "Hello names the tenant twice")
            known[uid], marks[uid], unheard[uid] = digest, mark, doubted
        own = plausible(convert.decode_mark("", hello.mark), time.time())
    except MalformedModel as error:
        raise Refused("INVALID_ARGUMENT", str(error)) from None
    return Greeting(node, hello.agent[:256], known, marks, unheard, frozenset(hello.features), own)


def parse_known(held: distribution_pb2.Known) -> tuple[str, bytes, Mark, frozenset[str]]:
    """Tenant, digest and mark of what a node holds, and the kinds whose mark is not believed. Raises MalformedModel."""
    uid = convert.decode_uid(held.tenant)
    said = convert.decode_mark(uid, held.mark)
    mark = plausible(said, time.time())  # a node may not use up all epochs
    return uid, convert.decode_digest(uid, held.digest), mark, frozenset(said.keys() - mark.keys())


def _parse(raw: bytes) -> distribution_pb2.NodeMessage:
    try:
        return distribution_pb2.NodeMessage.FromString(raw)
    except DecodeError:
        raise Refused("INVALID_ARGUMENT", "a message is not a vcproxy.v1.NodeMessage") from None


def _first(group: BaseExceptionGroup[Refused]) -> Refused:
    for error in group.exceptions:
        return error if isinstance(error, Refused) else _first(error)
    raise AssertionError("an exception group is never empty")
