"""Brains that share tenants: a node listens to one of them for each tenant, takes all else from one, and loses nothing."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.distribution.rig import ACME, BETA, Brain, Certificates, Placed, brain, node, service_port, until
from tests.unit.distribution.test_age import KINDS, SERVICE, SLICE, Api, Node, Replica
from vcproxy.brain import encoding
from vcproxy.brain.admission import Admission
from vcproxy.brain.chronicle import Chronicle
from vcproxy.brain.distribution import parse_hello, parse_known
from vcproxy.brain.stream import Stream
from vcproxy.model.addresses import parse_address
from vcproxy.model.node import NodeFacts
from vcproxy.model.tenant import SUPER_UID, Tenant, TenantModel
from vcproxy.node import sessions
from vcproxy.node.holdings import (
    Connected,
    FactsChanged,
    Holdings,
    PlacementChanged,
    TenantGone,
    TenantsComplete,
)
from vcproxy.node.offers import Offers
from vcproxy.node.outbox import Outbox
from vcproxy.node.receiver import ProtocolError
from vcproxy.node.sessions import Sessions, look_up
from vcproxy.node.share import ShareReceiver
from vcproxy.ops import metrics
from vcproxy.pb import distribution_pb2

A = "node-a"
WEB = [service_port(f"web-{n}", *range(20), number=n) for n in range(20)]


class Shared:
    """Two brains that share ACME and BETA, and have the super cluster both."""

    def __init__(self, first: Brain, second: Brain) -> None:
        self.first = first
        self.second = second
        for each in (first, second):
            each.tenant(Tenant(SUPER_UID, SUPER_UID), service_port("dns", 9, number=9))
        first.tenant(ACME, *WEB)
        second.tenant(BETA, *WEB)

    def digest(self, uid: str, of: Brain) -> bytes:
        return of.store.tenants()[uid].model.digest


@pytest.fixture
async def shared(certificates: Certificates) -> Any:
    tenants = {A: [SUPER_UID, ACME.uid, BETA.uid]}
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(brain(certificates, Placed(tenants), sharded=True)) for _ in range(2)]
        yield Shared(*made)


async def test_a_node_gets_each_tenant_from_the_brain_that_has_it_and_all_else_from_one(
    shared: Shared, certificates: Certificates
) -> None:
    first, second = shared.first, shared.second
    for one in (first, second):
        one.placement.set(A, pods={parse_address("10.0.0.1"): ACME.uid}, facts=NodeFacts(zone="z"))
    async with node(A, certificates.node(A), first.address, second.address, all_streams=True) as n:
        await until(lambda: n.has(shared.digest(ACME.uid, first)) and n.has(shared.digest(BETA.uid, second), BETA.uid))
        await until(lambda: n.has(shared.digest(SUPER_UID, first), SUPER_UID))
        (said,) = n.saw(TenantsComplete)
        assert said.uids == {SUPER_UID, ACME.uid, BETA.uid}
        assert len(n.saw(FactsChanged)) == len(n.saw(PlacementChanged)) == len(n.saw(Connected)) == 1
        for one in (first, second):
            row = sorted(found.stream for found in one.distributor.nodes())
            assert row in (["content"], ["content", "leading"])
        first.store.update(ACME.uid, [service_port("new", 1)], [])
        second.store.update(BETA.uid, [service_port("new", 2)], [])
        await until(lambda: n.has(shared.digest(ACME.uid, first)) and n.has(shared.digest(BETA.uid, second), BETA.uid))
        assert {row["tenants"] for row in n.session.streams()} == {1}  # type: ignore[union-attr]


async def test_a_tenant_that_moves_to_another_brain_costs_no_content_and_is_never_removed(
    shared: Shared, certificates: Certificates
) -> None:
    first, second = shared.first, shared.second
    async with node(A, certificates.node(A), first.address, second.address, all_streams=True, commit=True) as n:
        await until(lambda: n.has(shared.digest(ACME.uid, first)) and n.has(shared.digest(BETA.uid, second), BETA.uid))
        before = metrics.value("vcproxy_received_total", {"message": "snapshot"})
        first.store.drop(ACME.uid)
        await until(lambda: not any("acme-1" in _tenants(found) for found in first.distributor.nodes()))
        assert n.has(digest_of(WEB)), "nobody has it now, and the node keeps it"
        second.tenant(ACME, *WEB)

        def committed() -> bool:
            return any(
                row.uid == ACME.uid and row.current for found in second.distributor.nodes() for row in found.tenants
            )

        await until(committed, "the new brain is told what the node has")
        second.store.update(ACME.uid, [service_port("new", 1)], [])
        await until(lambda: n.has(shared.digest(ACME.uid, second)))
        assert metrics.value("vcproxy_received_total", {"message": "snapshot"}) == before
        assert not n.saw(TenantGone)


def digest_of(ports: list[Any]) -> bytes:
    return TenantModel(ports).digest


def _tenants(found: Any) -> set[str]:
    return {row.uid for row in found.tenants}


async def test_a_brain_that_does_not_know_that_it_lost_a_tenant_is_not_heard_and_heard_again_when_the_other_leaves(
    shared: Shared, certificates: Certificates
) -> None:
    first, second = shared.first, shared.second
    async with node(A, certificates.node(A), first.address, second.address, all_streams=True) as n:
        await until(lambda: n.has(shared.digest(ACME.uid, first)))
        second.tenant(ACME, service_port("of-second", 2))
        await until(lambda: n.has(shared.digest(ACME.uid, second)))
        first.store.update(ACME.uid, [service_port("of-first", 1)], [])
        second.store.update(ACME.uid, [service_port("also-of-second", 2)], [])
        await until(lambda: n.has(shared.digest(ACME.uid, second)))
        first.store.update(ACME.uid, [service_port("again-of-first", 1)], [])
        await until(lambda: _sent(first, ACME.uid) == first.store.tenants()[ACME.uid].revision)
        assert n.has(shared.digest(ACME.uid, second))
        second.store.drop(ACME.uid)
        await until(lambda: n.has(shared.digest(ACME.uid, first)), "the first one has had it all the while")
        assert not n.saw(TenantGone)


def _sent(one: Brain, uid: str) -> int:
    return max((row.sent for found in one.distributor.nodes() for row in found.tenants if row.uid == uid), default=0)


async def test_what_is_withheld_for_a_while_is_offered_again_and_has_not_changed(
    shared: Shared, certificates: Certificates
) -> None:
    first = shared.first
    async with node(A, certificates.node(A), first.address, shared.second.address, all_streams=True) as n:
        await until(lambda: n.has(shared.digest(ACME.uid, first)))
        held = shared.digest(ACME.uid, first)
        first.store.withhold(ACME.uid, True)
        first.store.update(ACME.uid, [service_port("new", 1)], [])
        shared.second.store.update(BETA.uid, [service_port("new", 1)], [])
        await until(lambda: n.has(shared.digest(BETA.uid, shared.second), BETA.uid))
        assert n.has(held), "nothing is said of it"
        first.store.withhold(ACME.uid, False)
        await until(lambda: n.has(shared.digest(ACME.uid, first)))


async def test_a_tenant_goes_when_the_leading_brain_does_not_name_it_and_no_brain_offers_it(
    shared: Shared, certificates: Certificates
) -> None:
    first, second = shared.first, shared.second
    async with node(A, certificates.node(A), first.address, second.address, all_streams=True) as n:
        await until(lambda: n.has(shared.digest(ACME.uid, first)) and n.has(shared.digest(BETA.uid, second), BETA.uid))
        leading = first if any(found.stream == "leading" for found in first.distributor.nodes()) else second
        other, uid = (second, BETA.uid) if leading is first else (first, ACME.uid)
        rest = {SUPER_UID, ACME.uid, BETA.uid} - {uid}
        leading.placement.set(A, tenants=rest)
        await until(lambda: len(n.saw(TenantsComplete)) == 2)
        assert uid in n.holdings, "the other one offers it still"
        other.placement.set(A, tenants=rest)
        await until(lambda: n.saw(TenantGone))
        assert [event.uid for event in n.saw(TenantGone)] == [uid]
        # And comes back with the next pod.
        other.placement.set(A, tenants={*rest, uid})
        await until(lambda: n.has(shared.digest(uid, other), uid))
        leading.placement.set(A, tenants={*rest, uid})
        # It was deleted, though pods of its are still there.
        for one in (first, second):
            one.store.remove_tenant(uid)
        await until(lambda: len(n.saw(TenantGone)) == 2)


async def test_a_brain_that_dies_takes_nothing_with_it(certificates: Certificates, shared: Shared) -> None:
    first = shared.first
    tenants = {A: [SUPER_UID, ACME.uid, BETA.uid, "gamma-1"]}
    async with AsyncExitStack() as stack:
        third = await stack.enter_async_context(brain(certificates, Placed(tenants), sharded=True))
        third.tenant(Tenant(SUPER_UID, SUPER_UID), service_port("dns", 9, number=9))
        third.tenant(Tenant("gamma-1", "gamma"), *WEB)
        async with node(A, certificates.node(A), third.address, first.address, all_streams=True) as n:
            await until(lambda: n.has(shared.digest(ACME.uid, first)) and n.has(digest_of(WEB), "gamma-1"))
            await stack.aclose()
            await until(lambda: any(found.stream == "leading" for found in first.distributor.nodes()))
            first.store.update(ACME.uid, [service_port("new", 1)], [])
            await until(lambda: n.has(shared.digest(ACME.uid, first)))
            await until(lambda: n.saw(TenantGone), "the other brain does not place it here, and its brain is gone")


async def test_a_brain_with_all_tenants_needs_no_further_streams(certificates: Certificates) -> None:
    async with (
        brain(certificates, Placed({A: [ACME.uid]})) as b,
        node(A, certificates.node(A), b.address, all_streams=True) as n,
    ):
        b.tenant(ACME, *WEB)
        await until(lambda: n.has(b.store.tenants()[ACME.uid].model.digest))
        assert [found.stream for found in b.distributor.nodes()] == ["whole"]
        assert not n.session.streams()  # type: ignore[union-attr]
        b.placement.set(A, tenants=())
        await until(lambda: n.saw(TenantGone))


async def test_an_agent_that_knows_nothing_of_shards_gets_what_the_brain_has(
    shared: Shared, certificates: Certificates
) -> None:
    async with node(A, certificates.node(A), shared.first.address) as n:
        # A Session alone says that its agent knows; its stream leads, and others are not there.
        await until(lambda: n.saw(TenantsComplete))
        await until(lambda: n.has(shared.digest(SUPER_UID, shared.first), SUPER_UID))
        assert ACME.uid not in n.holdings


async def test_a_node_awaits_what_is_named_and_no_brain_has_told(
    shared: Shared, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (shared.first, shared.second):
        one.placement.set(A, tenants=[SUPER_UID, ACME.uid, BETA.uid, "gamma-1"])
    addresses = shared.first.address, shared.second.address
    async with node(A, certificates.node(A), *addresses, all_streams=True) as n:
        assert isinstance(n.session, Sessions)
        assert n.session.awaited == 0, "nobody has named anything"
        await until(lambda: isinstance(n.session, Sessions) and n.session.awaited == 1)
        assert {SUPER_UID, ACME.uid, BETA.uid} <= n.holdings.tenants.keys()
        shared.second.tenant(Tenant("gamma-1", "gamma"))
        await until(lambda: isinstance(n.session, Sessions) and n.session.awaited == 0)
        shared.second.placement.set(A, tenants=[SUPER_UID, ACME.uid, BETA.uid, "gamma-1", "delta-1"])
        shared.first.placement.set(A, tenants=[SUPER_UID, ACME.uid, BETA.uid, "gamma-1", "delta-1"])
        await until(lambda: isinstance(n.session, Sessions) and n.session.awaited == 1)
        monkeypatch.setattr(sessions, "AWAIT_SECONDS", 0.0)
        assert n.session.awaited == 0, "an API server that nobody can read keeps no node from being ready"


async def test_two_addresses_of_one_brain_are_one_stream(shared: Shared, certificates: Certificates) -> None:
    port = shared.first.address.rpartition(":")[2]
    tls = certificates.node(A)
    async with node(A, tls, shared.first.address, f"localhost:{port}", shared.second.address, all_streams=True) as n:
        await until(lambda: n.has(shared.digest(ACME.uid, shared.first)))
        await until(lambda: n.has(shared.digest(BETA.uid, shared.second), BETA.uid))
        assert sum(found.stream == "content" for found in shared.first.distributor.nodes()) == 1


def test_names_are_looked_up_with_their_ports() -> None:
    assert look_up("127.0.0.1:7443") == ["127.0.0.1:7443"]
    assert look_up("[::1]:7443") == ["[::1]:7443"]
    assert "127.0.0.1:7443" in look_up("localhost:7443")


# --- hand to hand -----------------------------------------------------------------------------------------------------


class Line:
    """A content stream between a replica and a node, on which messages of both ways are under way for as long as the
    test likes.
    """

    def __init__(self, owner: Many, replica: Replica) -> None:
        self._owner = owner
        self.replica = replica
        self._outbox = Outbox(lambda: None, lambda delay, act: act())
        self._to_node: deque[bytes] = deque()
        self.receiver = ShareReceiver(
            offers=owner.offers,
            by=self,
            holdings=owner.holdings,
            sink=lambda _: None,
            outbox=self._outbox,
            call_later=lambda delay, act: self,
        )
        self.stream: Stream | None = None
        self.connect()

    def ask(self, uid: str) -> None:
        self._outbox.ask(uid)

    def cancel(self) -> None:
        """As a timer."""

    def connect(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self._unsubscribe()
        self._to_node.clear()
        self.stream = Stream(
            parse_hello(self.receiver.start("n", ""), "n"),
            peer="",
            version="",
            sharded=True,
            store=self.replica.store,
            placement=Placed({"n": [ACME.uid]}),
            admission=Admission(slots=1, lease=60),
            wake=lambda: None,
        )
        self._unsubscribe = self.replica.store.subscribe(self.stream.mark)

    def send(self, most: int = 1000) -> None:
        """The brain writes."""
        assert self.stream is not None
        while most and (message := self.stream.next_message()) is not None:
            self._to_node.append(message.data)
            most -= 1

    def arrive(self, most: int = 1000) -> None:
        """The node reads."""
        while most and self._to_node:
            try:
                self.receiver.receive(self._to_node.popleft())
            except ProtocolError:
                self.connect()
            self._owner.look()
            most -= 1

    def answer(self) -> None:
        """The brain reads."""
        assert self.stream is not None
        while (raw := self._outbox.take()) is not None:
            message = distribution_pb2.NodeMessage.FromString(raw)
            match message.WhichOneof("message"):
                case "ack":
                    self.stream.acknowledged(message.ack)
                case "subscribe":
                    self.stream.subscribed(message.subscribe.tenant, refresh=message.subscribe.refresh)
                case "known":
                    self.stream.answered(*parse_known(message.known))


class Many(Node):
    """A node with a stream to every replica."""

    def __init__(self, replicas: list[Replica]) -> None:
        super().__init__()
        self.offers = Offers(self.holdings, lambda uid: None)
        self.lines = [Line(self, replica) for replica in replicas]

    def settle(self) -> None:
        for _ in range(20):
            for line in self.lines:
                line.send()
                line.arrive()
                line.answer()


def gives(replica: Replica) -> None:
    """The shard is another's, or nobody's."""
    replica.store.drop(ACME.uid)


def takes(replica: Replica) -> None:
    """The shard is this one's: a feed begins with empty hands, and lists."""
    if ACME.uid in replica.store.tenants():
        return
    store = replica.store
    replica.begin()
    replica.store = store
    store.add_tenant(ACME)
    store.follow(ACME.uid, replica)
    replica.list()


_brain = st.integers(0, 2)
_step = st.one_of(
    st.tuples(st.just("change"), st.sampled_from(KINDS)),
    st.tuples(st.just("watch"), _brain, st.sampled_from(KINDS)),
    st.tuples(st.just("list"), _brain),
    st.tuples(st.just("cut"), _brain),
    st.tuples(st.just("gives"), _brain),
    st.tuples(st.just("takes"), _brain),
    st.tuples(st.just("send"), _brain),
    st.tuples(st.just("send"), _brain),
    st.tuples(st.just("arrive"), _brain),
    st.tuples(st.just("arrive"), _brain),
    st.tuples(st.just("answer"), _brain),
    st.tuples(st.just("pump"), _brain),
    st.tuples(st.just("pump"), _brain),
    st.tuples(st.just("pump"), _brain),
    st.tuples(st.just("connect"), _brain),
    st.tuples(st.just("pass")),
    st.tuples(st.just("restore")),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_step, max_size=60), _brain)
def test_however_shards_move_and_messages_linger_no_node_goes_back_and_all_get_there(
    steps: list[tuple[Any, ...]], last: int
) -> None:
    async def play() -> None:
        api = Api()
        replicas = [Replica(api) for _ in range(3)]
        replicas[0].list()
        for replica in replicas[1:]:
            gives(replica)
        many = Many(replicas)
        many.settle()
        for name, *arguments in steps:
            if name == "change":
                api.change(arguments[0])
                continue
            if name == "pass":
                api.pass_time()
                continue
            if name == "restore":
                api.restore()
                continue
            replica, line = replicas[arguments[0]], many.lines[arguments[0]]
            held = ACME.uid in replica.store.tenants()
            match name:
                case "watch" if held:
                    replica.watch(arguments[1])
                case "list" if held:
                    replica.list()
                case "cut":
                    replica.reachable = not replica.reachable
                case "gives":
                    gives(replica)
                case "takes":
                    takes(replica)
                case "send":
                    line.send()
                case "arrive":
                    line.arrive(1)
                case "answer":
                    line.answer()
                case "pump":
                    for _ in range(3):
                        line.send()
                        line.arrive()
                        line.answer()
                case "connect":
                    line.connect()
        for number, replica in enumerate(replicas):
            replica.reachable = True
            if number != last:
                gives(replica)
        final = replicas[last]
        takes(final)
        if final.history != api.history:
            final.list()
        for kind in KINDS:
            final.watch(kind)
        many.settle()
        final.answer()
        many.settle()
        assert many.holds == (api.states[SERVICE], api.states[SLICE])
        held_by = many.holdings.tenants[ACME.uid]
        assert held_by.synced
        assert not held_by.behind

    asyncio.run(play())


def sharing(count: int = 2) -> tuple[Api, list[Replica], Many]:
    """The first replica has the tenant, and the node all of it."""
    api = Api()
    replicas = [Replica(api) for _ in range(count)]
    replicas[0].list()
    for replica in replicas[1:]:
        gives(replica)
    many = Many(replicas)
    many.settle()
    return api, replicas, many


async def test_what_an_old_holder_still_sends_is_older_and_not_heard() -> None:
    api, (old, new), many = sharing()
    api.change(SLICE)
    takes(new)
    many.settle()
    assert many.holds == (0, 1)
    old.store.replace(ACME.uid, [service_port("web", 1, number=1), service_port("more", 1)])  # with no mark of its own
    many.settle()
    assert many.holds == (0, 1)
    gives(new)
    gives(old)
    many.settle()
    assert many.holds == (0, 1)


async def test_a_holder_that_was_away_is_told_how_new_the_node_is() -> None:
    """Its stream stood all the while; what it sends must not be older than what another brain sent meanwhile."""
    api, (old, new), many = sharing()
    gives(old)
    many.settle()
    api.change(SLICE)
    takes(new)
    many.settle()
    gives(new)
    many.settle()
    api.states, newest = dict.fromkeys(KINDS, 0), api.states  # an API server that lags
    api.version -= 1
    takes(old)
    many.settle()
    assert many.holds == (0, 1)
    assert many.holdings.tenants[ACME.uid].behind
    api.states, api.version = newest, api.version + 1
    old.watch(SLICE)
    many.settle()
    assert many.holds == (0, 1)
    assert not many.holdings.tenants[ACME.uid].behind


async def test_an_epoch_of_a_clock_that_ran_far_ahead_stops_no_other_brain() -> None:
    api, (ahead, other), many = sharing()
    ahead.chronicle = Chronicle(ahead.chronicle.mark, wall=lambda: time.time() + 30 * 86_400)
    api.restore()
    ahead.list()
    many.lines[0].connect()
    many.settle()
    assert many.holdings.tenants[ACME.uid].mark[SLICE].epoch > (time.time() + 86_400) * 1000
    gives(ahead)
    api.change(SLICE)
    takes(other)
    many.settle()
    assert many.holds == (api.states[SERVICE], api.states[SLICE])
    assert many.holdings.tenants[ACME.uid].mark == other.mark()


async def test_a_brain_asks_anew_when_it_had_left_though_its_stream_took_nothing_meanwhile() -> None:
    api, (old, new), many = sharing()
    gives(old)
    takes(new)
    for line in many.lines[1:]:
        for act in (line.send, line.arrive, line.answer, line.send, line.arrive):
            act()
    api.change(SERVICE)
    new.watch(SERVICE)
    many.lines[1].send()
    many.lines[1].arrive()
    gives(new)
    takes(old)
    assert [message.kind for message in iter(many.lines[0].stream.next_message, None)][:2] == ["released", "added"]  # type: ignore[union-attr]


def test_an_older_brain_is_left_alone() -> None:
    holdings = Holdings()
    receiver = ShareReceiver(
        offers=Offers(holdings, lambda uid: None),
        by=Asked(),
        holdings=holdings,
        sink=lambda event: None,
        outbox=Outbox(lambda: None, lambda delay, act: act()),
        call_later=lambda delay, act: Asked(),
    )
    receiver.start("n", "")
    with pytest.raises(ProtocolError, match="knows nothing of shards"):
        receiver.receive(encoding.encode_welcome("brain", "0.1.0"))


class Asked:
    """An offerer that remembers, and a timer."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, uid: str) -> None:
        self.asked.append(uid)

    def cancel(self) -> None:
        """As a timer."""


def test_when_the_feeder_leaves_all_others_are_asked_to_offer_again() -> None:
    offers = Offers(Holdings(), lambda uid: None)
    a, b, c = Asked(), Asked(), Asked()
    for one in (a, b, c):
        offers.offered("x", one)
    offers.released("x", a)
    assert offers.feeder("x") is c
    assert not b.asked
    offers.closed(c)
    assert offers.feeder("x") is None, "nobody is heard before it has offered anew"
    assert (a.asked, b.asked) == ([], ["x"])
