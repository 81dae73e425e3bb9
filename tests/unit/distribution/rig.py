"""A real brain server and real nodes on loopback, over mutual TLS, with everything in between as in production."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc

from vcproxy.brain.config import Listen
from vcproxy.brain.distribution import Distributor, Limits
from vcproxy.brain.server import serve
from vcproxy.brain.store import Store
from vcproxy.model.endpoints import READY, SERVING, Endpoint, HintSet, name_id, pack
from vcproxy.model.mark import Mark
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
from vcproxy.model.tenant import Tenant
from vcproxy.node.config import BrainAddress
from vcproxy.node.dialling import METHOD, Dialler
from vcproxy.node.holdings import Holdings, SessionEvent, TenantChanged, TenantSynced
from vcproxy.node.session import Session
from vcproxy.node.sessions import Sessions
from vcproxy.ops.pki import Authority, KeyPair
from vcproxy.pb import distribution_pb2

E = TypeVar("E")

ACME = Tenant("acme-1", "acme")
BETA = Tenant("beta-1", "beta")


def key(service: str, *, port: str = "http", protocol: Protocol = Protocol.TCP) -> PortKey:
    return PortKey("default", service, port, protocol)


def service_port(
    service: str, *pods: int, number: int = 0, hinted: bool = False, flags: int = READY | SERVING
) -> ServicePort:
    """Service `service` with ClusterIP 10.32.x.x and an endpoint 10.1.x.x for each of `pods`."""
    hints = HintSet((name_id("zone-a"),), ()) if hinted else None
    endpoints4, endpoints6, hint_sets = pack(
        Endpoint(bytes((10, 1, pod >> 8 & 255, pod & 255)), 8080, flags, name_id("node-a"), hints) for pod in pods
    )
    return ServicePort(
        key=key(service),
        frontends=(Frontend(FrontendKind.CLUSTER_IP, bytes((10, 32, number >> 8 & 255, number & 255 or 1)), 80),),
        hint_sets=hint_sets,
        endpoints4=endpoints4,
        endpoints6=endpoints6,
    )


async def until(condition: Callable[[], object], what: str = "", *, seconds: float = 15.0) -> None:
    """Wait until the condition holds; fails the test when it does not within the time."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds} s: {what or condition}"
        await asyncio.sleep(0.005)


class Placed:
    """A placement that a test sets."""

    def __init__(self, tenants: Mapping[str, Iterable[str]], *, ready: bool = True) -> None:
        self._tenants = {node: frozenset(uids) for node, uids in tenants.items()}
        self._pods: dict[str, dict[bytes, str]] = {}
        self._facts: dict[str, NodeFacts] = {}
        self._ready = ready
        self.at: Mark = {}
        self.ahead: list[Mark] = []
        self._callbacks: list[Callable[[str], None]] = []

    @property
    def ready(self) -> bool:
        return self._ready

    def mark(self) -> Mark:
        return self.at

    def overtaken(self, by: Mark) -> None:
        self.ahead.append(by)

    def reach(self, mark: Mark) -> None:
        """The super cluster was read up to there."""
        self.at = mark
        self._tell("")

    def become_ready(self) -> None:
        self._ready = True
        self._tell("")

    def pods(self, node: str) -> Mapping[bytes, str]:
        return self._pods.get(node, {})

    def tenants(self, node: str) -> frozenset[str]:
        return self._tenants.get(node, frozenset())

    def facts(self, node: str) -> NodeFacts:
        return self._facts.get(node, NodeFacts())

    def set(
        self,
        node: str,
        *,
        tenants: Iterable[str] | None = None,
        pods: dict[bytes, str] | None = None,
        facts: NodeFacts | None = None,
    ) -> None:
        if tenants is not None:
            self._tenants[node] = frozenset(tenants)
        if pods is not None:
            self._pods[node] = pods
        if facts is not None:
            self._facts[node] = facts
        self._tell(node)

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def _tell(self, node: str) -> None:
        for callback in list(self._callbacks):
            callback(node)


class Certificates:
    """A CA, the brain's certificate and those of nodes, as files below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority()
        self.ca = directory / "ca.crt"
        self.ca.write_bytes(self.authority.certificate)
        self.server, self.server_key = self.authority.server(["localhost", "127.0.0.1"]).write(directory, "brain")

    def listen(self) -> Listen:
        return Listen(
            address="127.0.0.1:0",
            cert_file=str(self.server),
            key_file=str(self.server_key),
            client_ca_file=str(self.ca),
        )

    def node(self, name: str, pair: KeyPair | None = None, *, server_name: str = "") -> BrainAddress:
        crt, private = (pair or self.authority.node(name)).write(self.directory, f"node-{name}")
        return BrainAddress(cert_file=str(crt), key_file=str(private), ca_file=str(self.ca), server_name=server_name)


class Brain:
    def __init__(self, store: Store, placement: Placed, distributor: Distributor, port: int) -> None:
        self.store = store
        self.placement = placement
        self.distributor = distributor
        self.address = f"127.0.0.1:{port}"

    def tenant(self, tenant: Tenant, *ports: ServicePort) -> None:
        self.store.add_tenant(tenant)
        self.store.replace(tenant.uid, ports)
        self.store.set_synced(tenant.uid)


@contextlib.asynccontextmanager
async def brain(
    certificates: Certificates,
    placement: Placed,
    *,
    store: Store | None = None,
    limits: Limits | None = None,
    port: int = 0,
    sharded: bool = False,
) -> AsyncIterator[Brain]:
    store = store or Store()
    distributor = Distributor(store=store, placement=placement, limits=limits, sharded=sharded)
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    listen = certificates.listen()
    if port:
        listen = Listen(
            address=f"127.0.0.1:{port}",
            cert_file=listen.cert_file,
            key_file=listen.key_file,
            client_ca_file=listen.client_ca_file,
        )
    async with asyncio.TaskGroup() as group:
        server = group.create_task(serve(distributor, listen, bound=bound.set_result))
        try:
            yield Brain(store, placement, distributor, await bound)
        finally:
            server.cancel()


class Node:
    def __init__(self, holdings: Holdings, session: Session | Sessions, events: list[SessionEvent]) -> None:
        self.holdings = holdings
        self.session = session
        self.events = events

    def has(self, stored_digest: bytes, uid: str = ACME.uid) -> bool:
        held = self.holdings.get(uid)
        return held is not None and held.synced and held.model.digest == stored_digest

    def saw(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


@contextlib.asynccontextmanager
async def node(
    name: str,
    tls: BrainAddress,
    *brains: str,
    holdings: Holdings | None = None,
    keepalive: float = 10.0,
    commit: bool = False,
    all_streams: bool = False,
) -> AsyncIterator[Node]:
    """A node's session, running. `commit`: it acknowledges every content as programmed, as an agent would.

    `all_streams`: it has further ones to brains that share tenants, as an agent has.
    """
    held = holdings if holdings is not None else Holdings()
    events: list[SessionEvent] = []

    def sink(event: SessionEvent) -> None:
        events.append(event)
        if commit and isinstance(event, TenantChanged | TenantSynced):
            tenant = held.tenants[event.uid]
            session.committed(event.uid, tenant.revision, tenant.model.digest, (), 7)

    async def pause(_: float) -> None:
        await asyncio.sleep(0.02)

    how: dict[str, Any] = {
        "node": name,
        "brains": brains,
        "connect": Dialler(tls, keepalive=keepalive, keepalive_timeout=keepalive),
        "holdings": held,
        "sink": sink,
        "sleep": pause,
        "chance": random.Random(1),
    }
    session = Sessions(every=0.05, **how) if all_streams else Session(**how)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(session.run())
        try:
            yield Node(held, session, events)
        finally:
            running.cancel()


class Wire:
    """A node's stream without a session: what is sent and received is in a test's hands."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self._call = call

    async def say(self, **message: object) -> None:
        await self._call.write(distribution_pb2.NodeMessage(**message).SerializeToString())  # type: ignore[arg-type]

    async def write(self, raw: bytes) -> None:
        await self._call.write(raw)

    async def hello(self, name: str, known: Mapping[str, bytes] | None = None) -> None:
        await self.say(
            hello=distribution_pb2.Hello(
                node=name,
                known=[distribution_pb2.Known(tenant=uid, digest=digest) for uid, digest in (known or {}).items()],
            )
        )

    async def next(self) -> distribution_pb2.BrainMessage | None:
        """The next message, None at the end of the stream."""
        async with asyncio.timeout(15):
            raw = await self._call.read()
        return distribution_pb2.BrainMessage.FromString(raw) if isinstance(raw, bytes) else None

    async def kinds(self, last: str, count: int = 1) -> list[str]:
        """The kinds of messages up to the `count`-th of kind `last`."""
        kinds: list[str] = []
        while kinds.count(last) < count:
            message = await self.next()
            assert message is not None, f"the stream ended after {kinds}"
            kinds.append(message.WhichOneof("message") or "")
        return kinds

    async def refusal(self) -> tuple[grpc.StatusCode, str]:
        """How the brain ends the stream."""
        try:
            while await self.next() is not None:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""


@contextlib.asynccontextmanager
async def wire(tls: BrainAddress | None, address: str, ca: Path) -> AsyncIterator[Wire]:
    """`tls` None: without a client certificate."""
    pair = (Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes()) if tls else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *pair)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 16 << 20)]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(METHOD)()
        try:
            yield Wire(call)
        finally:
            call.cancel()
