"""What the tests of vcproxy.node share: service ports, and an agent on a fake backend with a scripted session."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack

import pytest

from tests.fakes.backend import FakeBackend, Kernel
from vcproxy.backend.protocol import Rejection
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.endpoints import READY, SERVING, Endpoint, name_id, pack
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.node.agent import Agent
from vcproxy.node.config import AddressAttachment, Attachment, NodeConfiguration
from vcproxy.node.holdings import (
    FactsChanged,
    Held,
    Holdings,
    PlacementChanged,
    TenantChanged,
    TenantGone,
    TenantsComplete,
    TenantSynced,
)
from vcproxy.node.nodestate import node_rules

NODE = "node-a"
FACTS = NodeFacts(zone="zone-a", addresses=(parse_address("192.168.0.2"),), pod_ranges=(parse_prefix("10.0.1.0/24"),))
FLAT = (Attachment(address=AddressAttachment()),)


def service_port(
    name: str, *pods: str, vip: str = "10.32.0.10", nodes: tuple[str, ...] = (), kind: int = 1
) -> ServicePort:
    """A TCP service port on port 80 of `vip` with ready endpoints POD:8080 on `nodes`."""
    packed4, packed6, hints = pack(
        Endpoint(parse_address(pod), 8080, READY | SERVING, name_id(nodes[at]) if nodes else 0)
        for at, pod in enumerate(pods)
    )
    return ServicePort(
        PortKey("default", name, "http", Protocol.TCP),
        (Frontend(FrontendKind(kind), parse_address(vip), 80),),
        hint_sets=hints,
        endpoints4=packed4,
        endpoints6=packed6,
    )


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Acks:
    """What the agent reported, in order."""

    def __init__(self) -> None:
        self.commits: list[tuple[str, int, bytes, tuple[Rejection, ...]]] = []
        self.failures: list[tuple[str, int, str]] = []

    def committed(
        self, uid: str, revision: int, digest: bytes, rejections: tuple[Rejection, ...], microseconds: int
    ) -> None:
        assert microseconds >= 0
        self.commits.append((uid, revision, digest, rejections))

    def failed(self, uid: str, revision: int, error: str) -> None:
        self.failures.append((uid, revision, error))

    @property
    def revisions(self) -> list[tuple[str, int]]:
        return [(uid, revision) for uid, revision, _, _ in self.commits]


class Recall:
    """What the agent asked to be remembered, in order."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.forgotten: list[str] = []
        self.node: tuple[NodeFacts | None, Mapping[bytes, str] | None] = (None, None)

    def changed(self, uid: str, touched: Iterable[PortKey] | None) -> None:
        pass

    def keep(self, uid: str) -> None:
        self.kept.append(uid)

    def forget(self, uid: str) -> None:
        self.forgotten.append(uid)

    def keep_node(self, facts: NodeFacts | None, placement: Mapping[bytes, str] | None) -> None:
        self.node = (facts, placement)


class Rig:
    """An agent, and a session that does what a test scripts: `settle` makes the agent do all that is due."""

    def __init__(
        self, agent: Agent, backend: FakeBackend, holdings: Holdings, clock: Clock, acks: Acks, memory: Recall
    ):
        self.agent, self.backend, self.holdings = agent, backend, holdings
        self.clock, self.acks, self.memory = clock, acks, memory

    async def settle(self, *, after: float = 0.0) -> None:
        self.clock.now += after
        await self.agent.settle()

    def sync(self, uid: str, *ports: ServicePort, revision: int = 1, name: str | None = None) -> Held:
        """A snapshot of the tenant arrives and is complete."""
        held = Held(Tenant(uid, name or uid), TenantModel(ports), revision, "brain-1", synced=True)
        self.holdings.put(held)
        self.agent.handle(TenantChanged(uid, None, revision))
        self.agent.handle(TenantSynced(uid))
        return held

    def change(self, uid: str, *ports: ServicePort, removed: tuple[PortKey, ...] = ()) -> Held:
        """A delta of the tenant arrives."""
        held = self.holdings.tenants[uid]
        for port in ports:
            held.model.put(port)
        for key in removed:
            held.model.remove(key)
        held.revision += 1
        touched = frozenset(port.key for port in ports) | frozenset(removed)
        self.agent.handle(TenantChanged(uid, touched, held.revision))
        return held

    def remove(self, uid: str) -> None:
        self.holdings.drop(uid)
        self.agent.handle(TenantGone(uid))

    def facts(self, facts: NodeFacts = FACTS) -> None:
        self.agent.handle(FactsChanged(facts))

    def place(self, addresses: Mapping[str, str]) -> None:
        self.agent.handle(PlacementChanged({parse_address(text): uid for text, uid in addresses.items()}))

    def complete(self, *uids: str) -> None:
        self.agent.handle(TenantsComplete(frozenset(uids)))

    def programmed(self, uid: str) -> set[str]:
        """Names of the services in the kernel."""
        return {key.service for key in self.backend.kernel.tables.get(uid, {})}


MakeRig = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    """make_rig(kernel=, remembered=, facts=, placement=, ...): a started agent; several in one test are restarts."""
    async with AsyncExitStack() as stack:

        async def make(
            *,
            kernel: Kernel | None = None,
            remembered: list[Held] | None = None,
            facts: NodeFacts | None = None,
            placement: Mapping[bytes, str] | None = None,
            attachments: tuple[Attachment, ...] = FLAT,
            config: NodeConfiguration | None = None,
            links: frozenset[str] = frozenset(),
            chunk: int = 2000,
            prepare: Callable[[FakeBackend], None] = lambda backend: None,
        ) -> Rig:
            backend, holdings, clock, acks, memory = FakeBackend(kernel=kernel), Holdings(), Clock(), Acks(), Recall()
            prepare(backend)
            agent = Agent(
                node=NODE,
                backend=backend,
                holdings=holdings,
                acknowledge=acks,
                memory=memory,
                attachments=attachments,
                rules=node_rules(config or NodeConfiguration()),
                clock=clock,
                chunk=chunk,
            )
            stack.push_async_callback(agent.close)
            agent.see_links(links, frozenset())
            await agent.start(remembered or [], facts, placement)
            return Rig(agent, backend, holdings, clock, acks, memory)

        yield make
