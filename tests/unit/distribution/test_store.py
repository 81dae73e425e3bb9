"""The store's revisions and deltas: whatever happened, a node that follows holds byte for byte what the brain holds."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.distribution.models import keys, ports
from tests.unit.distribution.rig import ACME, BETA, Placed, key, service_port
from vcproxy.brain import store as store_module
from vcproxy.brain.admission import Admission
from vcproxy.brain.encoding import CHUNK_OCTETS, encode_batch, encode_together, port_bound
from vcproxy.brain.store import Store, UnknownTenant
from vcproxy.brain.stream import BATCH_OCTETS, Greeting, Stream
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.model.timing import Timing
from vcproxy.node.holdings import Holdings
from vcproxy.node.outbox import Outbox
from vcproxy.node.receiver import ProtocolError, Receiver
from vcproxy.pb import distribution_pb2, features


def synced(*held: ServicePort) -> Store:
    store = Store(clock=lambda: 1700000000.0)
    store.add_tenant(ACME)
    store.replace("acme-1", held)
    store.set_synced("acme-1")
    return store


class Follower:
    """A node joined to a brain without a network: the brain's stream and the node's receiver, hand to hand."""

    def __init__(
        self, store: Store, holdings: Holdings, *, batches: bool = False, admission: Admission | None = None
    ) -> None:
        known = {uid: held.model.digest for uid, held in holdings.tenants.items()}
        self.stream = Stream(
            Greeting("n", "", known, features=frozenset({features.BATCH} if batches else ())),
            peer="",
            version="",
            store=store,
            placement=Placed({"n": ["acme-1", "beta-1"]}),
            admission=admission or Admission(slots=1, lease=60),
            wake=lambda: None,
        )
        store.subscribe(self.stream.mark)
        outbox = Outbox(lambda: None, lambda delay, act: None)
        self.receiver = Receiver(holdings=holdings, sink=lambda _: None, outbox=outbox, call_later=_never)
        self.receiver.start("n", "")
        self.kinds: list[str] = []

    def take(self, most: int = 10_000) -> None:
        while most and (messages := self.stream.next_messages()):
            self.kinds.extend(message.kind for message in messages)
            self.receiver.receive(encode_together([message.data for message in messages]))
            most -= 1


def _never(_: float, __: object) -> asyncio.TimerHandle:
    raise AssertionError("nothing is refused here")


_update = st.tuples(st.just("update"), st.lists(ports, max_size=3), st.lists(keys, max_size=2))
_replace = st.tuples(st.just("replace"), st.lists(ports, max_size=6))
_read = st.tuples(st.just("read"), st.integers(1, 3))
_other = st.tuples(st.sampled_from(["reconnect", "restart", "stale", "removed"]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_update | _update | _replace | _read | _other, max_size=15),
    st.sampled_from([200, 1 << 20]),
    st.booleans(),
)
def test_a_node_that_follows_holds_what_the_brain_holds(
    steps: list[tuple],  # type: ignore[type-arg]
    room: int,
    batches: bool,
) -> None:
    async def follow() -> None:
        store, holdings = synced(), Holdings()
        follower = Follower(store, holdings, batches=batches)
        for name, *arguments in steps:
            match name:
                case "update":
                    store.update("acme-1", *arguments)
                case "replace":
                    store.replace("acme-1", *arguments)
                case "read":  # behind: only some of what there is to read
                    follower.take(*arguments)
                case "reconnect":
                    follower = Follower(store, holdings, batches=batches)
                case "restart":
                    store = synced(*store.tenants()["acme-1"].model)
                    follower = Follower(store, holdings, batches=batches)
                case "stale":
                    store.set_stale("acme-1", 3.0, "down")
                case "removed":
                    store.remove_tenant("acme-1")
                    store.add_tenant(ACME)
                    store.set_synced("acme-1")
        follower.take()
        wanted, held = store.tenants()["acme-1"], holdings.tenants["acme-1"]
        assert dict(held.model.ports) == dict(wanted.model.ports)
        assert held.model.digest == wanted.model.digest == TenantModel(wanted.model).digest
        assert held.synced
        assert wanted.octets == sum(map(port_bound, wanted.model))
        assert held.stale_since == wanted.stale_since

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "HISTORY_OCTETS", room)
        asyncio.run(follow())


async def test_what_waits_for_a_busy_transport_goes_in_one() -> None:
    store, holdings = synced(service_port("web", 1)), Holdings()
    store.add_tenant(BETA)
    store.set_synced("beta-1")
    for batches, goes in ((True, [2]), (False, [1, 1])):
        follower = Follower(store, holdings, batches=batches)
        assert [message.kind for message in follower.stream.next_messages()] == ["welcome"], "read before all else"
        follower = Follower(store, holdings, batches=batches)
        follower.take()
        for number in range(2, 5):  # while the transport is busy
            store.update("acme-1", [service_port("web", number, 10 * goes[0] + number)], ())
            store.update("beta-1", [service_port("api", number, 10 * goes[0] + number)], ())
        seen = []
        while messages := follower.stream.next_messages():
            seen.append(len(messages))
            follower.receiver.receive(encode_together([message.data for message in messages]))
        assert seen == goes, "one step of each tenant"
        assert {uid: held.model.digest for uid, held in holdings.tenants.items()} == {
            uid: stored.model.digest for uid, stored in store.tenants().items()
        }


async def test_one_go_is_bounded() -> None:
    store = synced(*(service_port(f"web-{number}", *range(400), number=number) for number in range(100)))
    assert store.tenants()["acme-1"].octets > 2 * CHUNK_OCTETS
    store.add_tenant(BETA)
    store.set_synced("beta-1")
    stream = Follower(store, Holdings(), batches=True).stream
    while messages := stream.next_messages():
        size = sum(len(message.data) for message in messages)
        assert size - len(messages[-1].data) < BATCH_OCTETS


async def test_a_snapshot_of_what_is_no_more_is_ended_before_the_next_and_its_slot_given_back() -> None:
    small, large = [service_port("web", 1)], [service_port(f"web-{n}", *range(400), number=n) for n in range(100)]
    store, holdings, admission = synced(*small), Holdings(), Admission(slots=1, lease=60)
    follower = Follower(store, holdings, admission=admission)
    follower.take()
    store.replace("acme-1", large)
    follower.take(1)
    assert follower.kinds[-1] == "snapshot"
    store.replace("acme-1", small)  # what the node holds, while it is half-way to what it does not
    follower.take()
    assert holdings.tenants["acme-1"].model.digest == store.tenants()["acme-1"].model.digest
    newcomer = Follower(store, Holdings(), admission=admission)
    newcomer.take()
    assert "snapshot" in newcomer.kinds


async def test_a_batch_within_a_batch_makes_no_sense() -> None:
    follower = Follower(synced(), Holdings(), batches=True)
    (welcome,) = follower.stream.next_messages()
    follower.receiver.receive(welcome.data)
    with pytest.raises(ProtocolError):
        follower.receiver.receive(encode_batch([encode_batch([])]))
    with pytest.raises(ProtocolError):
        follower.receiver.receive(encode_batch([welcome.data]))


def test_revisions_count_changes_of_content_only() -> None:
    store = synced(service_port("web", 1))
    stored = store.tenants()["acme-1"]
    assert stored.revision == 1
    assert store.update("acme-1", [service_port("web", 1)], [key("unknown")]) is None
    assert store.replace("acme-1", [service_port("web", 1)]) is None
    assert stored.revision == 1
    assert store.update("acme-1", [service_port("web", 2)], []) == 2
    assert store.replace("acme-1", []) == 3
    assert stored.updated_at == 1700000000.0
    assert stored.octets == 0


def test_subscribers_are_told_of_changes_and_of_nothing_else() -> None:
    store, told = synced(), list[str]()
    cancel = store.subscribe(told.append)
    store.add_tenant(ACME)
    store.set_synced("acme-1")
    store.set_stale("acme-1", None)
    store.drop("unknown")
    store.withhold("acme-1", False)
    store.withhold("unknown", True)
    store.expect("unknown")
    assert told == []
    store.remove_tenant("unknown")  # another brain's: that it is gone counts for nodes all the same
    assert told == ["unknown"]
    assert store.gone("unknown")
    store.expect("unknown")
    assert not store.gone("unknown")
    told.clear()
    store.add_tenant(Tenant("acme-1", "renamed"))
    store.set_stale("acme-1", 1.0, "down")
    store.update("acme-1", [service_port("web", 1)], [])
    store.remove_tenant("acme-1")
    assert told == ["acme-1"] * 4
    cancel()
    store.add_tenant(ACME)
    assert len(told) == 4


def test_an_unknown_tenant_is_named() -> None:
    with pytest.raises(UnknownTenant, match="'nobody' is not in the store"):
        Store().update("nobody", [], [])


def test_a_removed_tenant_is_gone_and_an_unknown_one_is_not() -> None:
    store = synced()
    assert not store.gone("acme-1")
    assert not store.gone("other")
    store.remove_tenant("acme-1")
    assert store.gone("acme-1")
    store.add_tenant(ACME)
    assert not store.gone("acme-1")


def test_all_who_hold_the_same_get_the_same_bytes() -> None:
    store = synced(service_port("web", *range(100)))
    stored = store.tenants()["acme-1"]
    before = stored.model.digest
    store.update("acme-1", [service_port("web", *range(101))], [])
    first, second = stored.delta(before), stored.delta(before)
    assert first is not None
    assert second is not None
    assert first.message is second.message
    assert stored.snapshot().part(0) is stored.snapshot().part(0)


def test_a_snapshot_is_shared_while_a_small_delta_leads_on_from_it() -> None:
    store = synced(*[service_port(f"svc-{n}", *range(100), number=n) for n in range(50)])
    stored = store.tenants()["acme-1"]
    snapshot = stored.snapshot()
    store.update("acme-1", [service_port("svc-1", *range(101), number=1)], [])
    assert stored.snapshot() is snapshot
    store.replace("acme-1", [service_port(f"svc-{n}", *range(50), number=n) for n in range(50)])
    assert stored.snapshot() is not snapshot


def test_a_rollback_leads_back_by_the_shortest_way() -> None:
    one, two = service_port("web", 1), service_port("web", 2)
    store = synced(one)
    stored = store.tenants()["acme-1"]
    digest = stored.model.digest
    for port in (two, one, two, one):
        store.update("acme-1", [port], [])
    assert stored.model.digest == digest
    store.update("acme-1", [service_port("web", 3)], [])
    delta = stored.delta(digest)
    assert delta is not None
    message = distribution_pb2.BrainMessage.FromString(delta.message).delta
    assert len(message.operations) == 1
    assert (getattr(message, "from"), message.to) == (5, 6)


def test_a_long_way_is_cut_into_messages_of_bounded_size() -> None:
    store = synced(*[service_port(f"svc-{n}", *range(1000), number=n) for n in range(100)])
    stored = store.tenants()["acme-1"]
    digest = stored.model.digest
    for n in range(40):
        store.update("acme-1", [service_port(f"svc-{n}", *range(2000, 2500), number=n)], [])
    count = 0
    while digest != stored.model.digest:
        delta = stored.delta(digest)
        assert delta is not None
        assert len(delta.message) <= CHUNK_OCTETS + 200
        digest = delta.after.digest
        count += 1
    assert count > 1


def test_history_is_bounded() -> None:
    store = synced()
    stored = store.tenants()["acme-1"]
    for n in range(3000):
        store.update("acme-1", [service_port("web", n)], [])
    assert len(stored.history) == store_module.HISTORY_COUNT
    for n in range(200):
        store.update("acme-1", [service_port("web", *range(n, n + 500))], [])
        store.update("acme-1", [], [key("web")])
    assert stored.history.octets <= store_module.HISTORY_OCTETS


def test_timing_of_a_delta_is_that_of_its_oldest_change() -> None:
    store = synced(service_port("web", 1))
    stored = store.tenants()["acme-1"]
    digest = stored.model.digest
    store.update("acme-1", [service_port("web", 2)], [], Timing(event=50, received=60, compiled=70))
    store.update("acme-1", [service_port("web", 3)], [], Timing(event=0, received=80, compiled=90))
    store.update("acme-1", [service_port("web", 4)], [])
    delta = stored.delta(digest)
    assert delta is not None
    assert delta.timing == Timing(50, 60, 70)
