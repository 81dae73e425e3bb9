"""No node goes back in time, whatever replica of the brain it is moved to, and none stays behind for ever.

The API server of these tests is a history: two kinds of objects in one count of versions, that now and then is restored
from a backup and counts from a lower one. Content tells which of its states it shows, so that "older" is a fact. Brains
and nodes are the real ones, joined hand to hand; only the reading of the API server is played.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.distribution.rig import ACME, Certificates, Placed, brain, node, service_port, until
from vcproxy.brain import encoding
from vcproxy.brain.admission import Admission
from vcproxy.brain.chronicle import Chronicle
from vcproxy.brain.distribution import parse_hello
from vcproxy.brain.encoding import Snapshot, Version
from vcproxy.brain.store import Store
from vcproxy.brain.stream import Stream
from vcproxy.model.mark import LARGEST, Mark, Position, lacking, parse_version, raised
from vcproxy.model.tenant import TenantModel
from vcproxy.node.holdings import Connected, Disconnected, Held, Holdings, TenantChanged
from vcproxy.node.outbox import Outbox
from vcproxy.node.receiver import Receiver
from vcproxy.ops import metrics
from vcproxy.pb import distribution_pb2

SERVICE, SLICE = "Service", "EndpointSlice"
KINDS = (SERVICE, SLICE)
BACKUP = 10_000
"""Versions between a backup and its restoration: more than any test makes changes."""

clock = itertools.count(1_700_000_000.0)


class Api:
    """A history. `states`: how often each kind has changed, over all rewrites, so that a higher one is newer."""

    def __init__(self) -> None:
        self.version = 10 * BACKUP
        self.history = 0
        self.states = dict.fromkeys(KINDS, 0)

    def change(self, kind: str) -> None:
        self.version += 1
        self.states[kind] += 1

    def pass_time(self) -> None:
        self.version += 1  # by objects of other kinds

    def restore(self) -> None:
        self.version -= BACKUP
        self.history += 1
        for kind in KINDS:
            self.states[kind] += 1


class Replica:
    """A brain that reads `api` when it is told to."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.reachable = True
        self.begin()

    def begin(self) -> None:
        """A fresh process: nothing is known."""
        self.store = Store()
        self.store.add_tenant(ACME)
        self.chronicle = Chronicle(wall=lambda: next(clock))
        self.store.follow(ACME.uid, self)
        self.history: int | None = None
        self.versions: dict[str, str] = {}
        self.shown = dict.fromkeys(KINDS, 0)

    def mark(self) -> Mark:
        return self.chronicle.at(self.versions)

    def overtaken(self, by: Mark) -> None:
        self.chronicle.overtaken(by)

    def list(self) -> None:
        if not self.reachable:
            return
        self.history = self.api.history
        self.chronicle.listing()
        self._take(KINDS, listed=True)
        self.store.set_synced(ACME.uid)

    def watch(self, kind: str) -> None:
        """All that one watch has to say, be it but a bookmark; a watch of a history that is no more says nothing."""
        if self.reachable and self.history == self.api.history:
            changed = self.shown[kind] != self.api.states[kind]
            self.versions[kind] = str(self.api.version)
            if changed:
                self._take((kind,), listed=False)

    def answer(self) -> None:
        """Do what a feed does when a node is ahead."""
        if self.chronicle.behind(self.mark()):
            self.list()

    def _take(self, kinds: tuple[str, ...], *, listed: bool) -> None:
        for kind in kinds:
            self.versions[kind] = str(self.api.version)
            self.shown[kind] = self.api.states[kind]
        self.chronicle.taken(self.versions, touched=kinds, listed=kinds if listed else ())
        port = service_port("web", self.shown[SLICE] + 1, number=self.shown[SERVICE] + 1)
        self.store.replace(ACME.uid, [port])
        self.chronicle.settled()
        self.store.announce(ACME.uid)


class Node:
    """A node that is moved from brain to brain and sees to it that it never holds anything older."""

    def __init__(self) -> None:
        self.holdings = Holdings()
        self.newest = (0, 0)
        self.errors: list[str] = []

    def connect(self, replica: Replica, *, agent: Callable[[bytes], bytes] = lambda raw: raw) -> None:
        outbox = Outbox(lambda: None, lambda delay, act: act())
        self.receiver = Receiver(holdings=self.holdings, sink=lambda _: None, outbox=outbox, call_later=self._never)
        self.stream = Stream(
            parse_hello(agent(self.receiver.start("n", "")), "n"),
            peer="",
            version="",
            store=replica.store,
            placement=Placed({"n": [ACME.uid]}),
            admission=Admission(slots=1, lease=60),
            wake=lambda: None,
        )
        replica.store.subscribe(self.stream.mark)

    def read(self, most: int = 1000) -> list[str]:
        kinds = []
        while most and (message := self.stream.next_message()) is not None:
            self.receiver.receive(message.data)
            kinds.append(message.kind)
            self.look()
            most -= 1
        return kinds

    @property
    def holds(self) -> tuple[int, int]:
        """The states of Services and slices that the content shows."""
        held = self.holdings.get(ACME.uid)
        if held is None or not held.model:
            return 0, 0
        (port,) = held.model
        address = port.frontends[0].address
        return int.from_bytes(address[2:], "big") - 1, int.from_bytes(port.endpoints4[2:4], "big") - 1

    def look(self) -> None:
        holds = self.holds
        assert all(new >= old for new, old in zip(holds, self.newest, strict=True)), f"{self.newest} -> {holds}"
        self.newest = holds

    @staticmethod
    def _never(_: float, __: object) -> asyncio.TimerHandle:
        raise AssertionError("a brain sent what the node had to refuse")


_brain = st.integers(0, 2)
_step = st.one_of(
    st.tuples(st.just("change"), st.sampled_from(KINDS)),
    st.tuples(st.just("watch"), _brain, st.sampled_from(KINDS)),
    st.tuples(st.just("watch"), _brain, st.sampled_from(KINDS)),
    st.tuples(st.just("list"), _brain),
    st.tuples(st.just("cut"), _brain),
    st.tuples(st.just("restart"), _brain),
    st.tuples(st.just("move"), _brain),
    st.tuples(st.just("move"), _brain),
    st.tuples(st.just("read"), st.integers(1, 4)),
    st.tuples(st.just("answer"), _brain),
    st.tuples(st.just("pass")),
    st.tuples(st.just("restore")),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_step, max_size=40))
def test_whatever_replicas_miss_no_node_goes_back_and_all_get_there(steps: list[tuple[Any, ...]]) -> None:
    async def play() -> None:
        api, node = Api(), Node()
        brains = [Replica(api) for _ in range(3)]
        for one in brains:
            one.list()
        node.connect(brains[0])
        node.read()
        for name, *arguments in steps:
            brain = brains[arguments[0]] if arguments and isinstance(arguments[0], int) and arguments[0] < 3 else None
            match name:
                case "change":
                    api.change(arguments[0])
                case "pass":
                    api.pass_time()
                case "restore":
                    api.restore()
                case "read":
                    node.read(arguments[0])
                case "watch":
                    assert brain
                    brain.watch(arguments[1])
                case "list":
                    assert brain
                    brain.list()
                case "cut":
                    assert brain
                    brain.reachable = not brain.reachable
                case "restart":
                    assert brain
                    brain.begin()
                case "move":
                    assert brain
                    node.connect(brain)
                case "answer":
                    assert brain
                    brain.answer()
        for brain in brains:
            brain.reachable = True
            if brain.history != api.history:  # a watch of what is no more ends, or is silent for too long
                brain.list()
            for kind in KINDS:
                brain.watch(kind)
        for brain in brains:
            node.connect(brain)
            node.read()
            brain.answer()
            node.read()
            assert node.holds == (api.states[SERVICE], api.states[SLICE])
            assert not node.holdings.tenants[ACME.uid].behind

    asyncio.run(play())


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def ahead(api: Api) -> Replica:
    replica = Replica(api)
    replica.list()
    return replica


@pytest.fixture
def lagging(api: Api, ahead: Replica) -> Replica:
    """It has seen nothing of the last change; `ahead` has."""
    replica = Replica(api)
    replica.list()
    api.change(SLICE)
    ahead.watch(SLICE)
    return replica


def moved(*replicas: Replica) -> Node:
    node = Node()
    for replica in replicas:
        node.connect(replica)
        node.read()
    return node


async def test_a_replica_that_lags_says_so_and_sends_when_it_has_caught_up(ahead: Replica, lagging: Replica) -> None:
    node = moved(ahead)
    node.connect(lagging)
    kinds = node.read()
    assert "behind" in kinds
    assert not {"snapshot", "delta", "synced"} & set(kinds)
    assert node.holds == (0, 1)
    assert "EndpointSlices up to version 100000, the node has version 100001" in node.holdings.tenants[ACME.uid].behind
    (row,) = node.stream.status().tenants
    assert "version 100001" in row.behind
    lagging.api.change(SLICE)
    lagging.watch(SLICE)
    assert node.read() == ["behind", "added", "snapshot", "synced"]
    assert node.holds == (0, 2)
    assert node.receiver.behind() == []


async def test_a_replica_whose_watch_is_quiet_does_not_lag(api: Api, ahead: Replica) -> None:
    other = Replica(api)
    other.list()
    for _ in range(5):
        api.pass_time()
    ahead.watch(SERVICE)  # bookmarks
    ahead.watch(SLICE)
    node = moved(ahead)
    api.change(SLICE)
    other.watch(SLICE)  # and no bookmark of Services
    node.connect(other)
    assert "behind" not in node.read()
    assert node.holds == (0, 1)


async def test_what_was_restored_from_a_backup_is_newer(api: Api, ahead: Replica, lagging: Replica) -> None:
    node = moved(ahead)
    api.restore()
    lagging.list()
    node.connect(lagging)
    assert "snapshot" in node.read(), "this replica has itself seen versions go back"
    node.connect(ahead)
    assert "behind" in node.read(), "it still has the old history, with higher versions"
    ahead.reachable = False
    ahead.answer()
    assert node.read() == []
    ahead.reachable = True
    ahead.answer()
    node.read()
    assert ahead.mark() == lagging.mark(), "the epoch travelled with the node"
    api.change(SERVICE)
    ahead.watch(SERVICE)
    assert node.read() == ["added", "delta"]
    assert node.holds == (2, 2)


async def test_a_fresh_replica_after_a_restoration_asks_before_it_contradicts(api: Api, ahead: Replica) -> None:
    node = moved(ahead)
    api.restore()
    fresh = Replica(api)
    fresh.list()
    node.connect(fresh)
    assert "behind" in node.read()
    fresh.answer()
    assert "snapshot" in node.read()
    assert fresh.mark()[SLICE].epoch


async def test_a_shared_snapshot_that_is_too_old_for_a_node_is_made_anew(api: Api, ahead: Replica) -> None:
    other = Replica(api)
    other.list()
    old = other.store.tenants()[ACME.uid].snapshot()
    api.change(SLICE)
    ahead.watch(SLICE)
    node = moved(ahead)
    api.change(SLICE)
    api.change(SERVICE)
    other.watch(SLICE)
    other.watch(SERVICE)
    assert other.store.tenants()[ACME.uid].snapshot() is old
    node.connect(other)
    node.read()
    assert node.holds == (1, 2)


@pytest.mark.parametrize("who", ["agent", "brain"])
async def test_older_peers_are_treated_as_ever(ahead: Replica, lagging: Replica, who: str) -> None:
    node = moved(ahead)
    node.look = lambda: None  # type: ignore[method-assign]
    if who == "agent":

        def forgetful(raw: bytes) -> bytes:
            message = distribution_pb2.NodeMessage.FromString(raw)
            for known in message.hello.known:
                known.ClearField("mark")
            return message.SerializeToString()

        node.connect(lagging, agent=forgetful)
        assert "snapshot" in node.read()
    else:
        lagging.store.follow(ACME.uid, _Unmarked())
        node.connect(lagging)
        assert "snapshot" in node.read()
        assert node.holdings.tenants[ACME.uid].mark == {}, "of unknown age"
        node.connect(ahead)
        assert "delta" in node.read()


class _Unmarked:
    def mark(self) -> Mark:
        return {}

    def overtaken(self, by: Mark) -> None:
        raise AssertionError


class Case:
    """A node that holds content at version 50 and meets a brain that checks nothing."""

    def __init__(self) -> None:
        self.holdings, self.outbox = Holdings(), Outbox(lambda: None, lambda delay, act: act())
        self.receiver = Receiver(
            holdings=self.holdings, sink=lambda _: None, outbox=self.outbox, call_later=lambda *_: _Timer()
        )
        self.meet(Position(50, 50))
        self.give(1, Position(50, 50))

    def meet(self, *at: Position) -> None:
        self.receiver.start("n", "")
        self.receiver.receive(encoding.encode_welcome("b", ""))
        self.receiver.receive(encoding.encode_added(ACME, dict(zip(KINDS, at, strict=False))))

    def give(self, pod: int, at: Position) -> bool:
        """Whether the node took it."""
        model = TenantModel([service_port("web", pod)])
        self.receiver.receive(Snapshot(ACME.uid, Version(1, model.digest, {SERVICE: at}), model).part(0))
        return self.holdings.tenants[ACME.uid].model.digest == model.digest


class _Timer:
    def cancel(self) -> None:
        pass


@pytest.mark.parametrize(
    ("at", "taken"),
    [
        ([Position(40, 49)], False),
        ([Position(40, 50)], True),
        ([Position(10, 10, epoch=1)], True),
        ([], True),
    ],
)
def test_a_node_refuses_what_may_be_older_whatever_a_brain_thinks(at: list[Position], taken: bool) -> None:
    case = Case()
    case.meet(*at)
    assert case.give(2, Position(60, 60)) == taken
    refused = [distribution_pb2.NodeMessage.FromString(raw).ack.error for raw in iter(case.outbox.take, None)]
    assert any("may be older than what is held" in error for error in refused) != taken


def test_a_node_that_took_content_of_a_stream_trusts_its_order() -> None:
    case = Case()
    case.meet(Position(55, 55))
    assert case.give(2, Position(60, 55))  # half-way to 60
    case.receiver.receive(encoding.encode_added(ACME, {SERVICE: Position(60, 55)}))
    assert case.give(3, Position(60, 55))


class _At:
    """A follower that stays where it is."""

    def __init__(self, version: int) -> None:
        self._mark = {SERVICE: Position(version, version)}

    def mark(self) -> Mark:
        return self._mark

    def overtaken(self, by: Mark) -> None:
        pass


async def test_a_node_leaves_a_brain_that_stays_behind(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcproxy.node.session.PATIENCE", 0.1)
    placed = Placed({"n": [ACME.uid]})
    old, new = service_port("web", 1), service_port("web", 2)
    async with brain(certificates, placed) as lagging, brain(certificates, placed) as current:
        for one, port, version in ((lagging, old, 1), (current, new, 5)):
            one.tenant(ACME, port)
            one.store.follow(ACME.uid, _At(version))
        holdings = Holdings()
        held = Held(ACME, TenantModel([service_port("web", 3)]), synced=True, mark={SERVICE: Position(4, 4)})
        holdings.put(held)
        async with node("n", certificates.node("n"), lagging.address, current.address, holdings=holdings) as n:
            await until(lambda: current.distributor.nodes())
            await until(lambda: n.has(TenantModel([new]).digest))
            assert metrics.value("vcproxy_tenants_brain_behind") == 0
        reasons = [event.reason for event in n.saw(Disconnected)]
        assert any("this brain is behind in acme-1; another is asked" in reason for reason in reasons)
        assert not any(isinstance(event, TenantChanged) and event.revision == 0 for event in n.events)


async def test_a_name_with_several_addresses_leads_to_each_of_them(certificates: Certificates) -> None:
    placed = Placed({"n": []})
    async with brain(certificates, placed) as one, brain(certificates, placed) as two:
        both, met = f"ipv4:{one.address},{two.address}", set[str]()
        tls = certificates.node("n", server_name="localhost")
        for _ in range(50):
            async with node("n", tls, both) as n:
                await until(lambda: n.saw(Connected))
                met.add(n.saw(Connected)[0].brain)
            if len(met) == 2:
                break
        assert met == {one.store.brain_id, two.store.brain_id}


def test_a_node_may_not_use_up_all_epochs(ahead: Replica) -> None:
    def hello(epoch: int) -> Mark:
        known = distribution_pb2.Known(
            tenant=ACME.uid, digest=bytes(32), mark=[distribution_pb2.Position(kind=SERVICE, changed=7, epoch=epoch)]
        )
        message = distribution_pb2.NodeMessage(hello=distribution_pb2.Hello(node="n", known=[known]))
        return parse_hello(message.SerializeToString(), "n").marks[ACME.uid]

    assert hello(5) == {SERVICE: Position(7, 0, 5)}
    assert hello(LARGEST) == {}


async def test_an_epoch_of_a_clock_that_ran_far_ahead_stops_nobody(api: Api, ahead: Replica) -> None:
    ahead.chronicle = Chronicle(ahead.chronicle.mark, wall=lambda: time.time() + 30 * 86_400)
    api.restore()
    ahead.list()
    node = moved(ahead)
    other = Replica(api)
    other.list()
    node.connect(other)
    assert "synced" in node.read(), "the same content"
    api.change(SLICE)
    other.watch(SLICE)
    node.read()
    assert node.holds == (api.states[SERVICE], api.states[SLICE])
    assert node.holdings.tenants[ACME.uid].mark == other.mark(), "and what it had is no floor any more"
    node = moved(ahead)
    node.connect(other)
    node.read()
    assert node.holds == (api.states[SERVICE], api.states[SLICE]), "a snapshot is taken too"
    assert node.holdings.tenants[ACME.uid].mark == other.mark()


@pytest.mark.parametrize(
    ("text", "version"),
    [("7", 7), (str(LARGEST), LARGEST), (str(LARGEST + 1), None), ("", None), ("-1", None), ("1e3", None), ("٣", None)],
)
def test_versions_that_can_be_compared(text: str, version: int | None) -> None:
    assert parse_version(text) == version


def test_kinds_are_compared_one_by_one() -> None:
    floor = {SERVICE: Position(10, 20), SLICE: Position(30, 30)}
    assert lacking({SERVICE: Position(5, 10), SLICE: Position(29, 29)}, floor) == {SLICE: floor[SLICE]}
    assert lacking({SERVICE: Position(5, 10)}, floor) == {}
    assert raised(floor, {SERVICE: Position(5, 10), "Pod": Position(1, 1)}) == {
        SERVICE: floor[SERVICE],
        "Pod": Position(1, 1),
    }


def test_what_is_half_compiled_counts_as_neither() -> None:
    chronicle = Chronicle(wall=lambda: 1.0)
    chronicle.taken({SERVICE: "10", SLICE: "10"}, touched=KINDS, listed=KINDS)
    chronicle.settled()
    chronicle.taken({SERVICE: "20", SLICE: "10"}, touched=[SERVICE], listed=())
    assert chronicle.mark[SERVICE] == Position(20, 10)
    chronicle.settled()
    assert chronicle.mark == {SERVICE: Position(20, 20), SLICE: Position(10, 10)}


@pytest.mark.parametrize(
    ("held", "asked", "listed", "epoch"),
    [
        (Position(5, 9, 0), None, "9", 0),
        (Position(5, 9, 0), None, "8", 1000),
        (Position(5, 9, 0), Position(12, 0, 0), "12", 0),
        (Position(5, 9, 0), Position(12, 0, 0), "11", 1000),
        (Position(5, 9, 0), Position(3, 0, 700), "4", 700),
        (Position(5, 9, 0), Position(3, 0, 700), "2", 1000),
        (Position(5, 9, 5000), Position(3, 0, 700), "9", 5000),
        (Position(5, 9, 5000), None, "8", 5001),
        (None, Position(3, 0, 700), "4", 700),
    ],
)
def test_what_a_list_says_of_epochs(held: Position | None, asked: Position | None, listed: str, epoch: int) -> None:
    chronicle = Chronicle({SERVICE: held} if held else {}, wall=lambda: 1.0)
    if asked:
        chronicle.overtaken({SERVICE: asked})
    chronicle.listing()
    chronicle.taken({SERVICE: listed}, touched=[], listed=[SERVICE])
    chronicle.settled()
    assert chronicle.mark == {SERVICE: Position(int(listed), int(listed), epoch)}


def test_a_list_that_began_before_the_question_answers_nothing() -> None:
    chronicle = Chronicle({SERVICE: Position(9, 9)}, wall=lambda: 1.0)
    chronicle.listing()
    assert chronicle.overtaken({SERVICE: Position(12, 12)})
    assert not chronicle.overtaken({SERVICE: Position(11, 11)})
    chronicle.taken({SERVICE: "10"}, touched=[], listed=[SERVICE])
    chronicle.settled()
    assert chronicle.behind(chronicle.mark)
    assert chronicle.mark[SERVICE].epoch == 0
