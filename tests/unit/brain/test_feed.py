"""One tenant from its API server to the store: what is complete, what is stale, what fails alone."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import msgspec
import pytest

from tests.fakes.apiserver import FakeApiServer, Fault, fail, html
from tests.unit.brain.kinds import endpoint_slice, service, service_cidr
from tests.unit.brain.polling import settle, until
from vcproxy.brain.feed import Feed
from vcproxy.brain.guard import UNRESTRICTED, Limits, Policy
from vcproxy.brain.inputs import TENANT_KINDS, ApiInput
from vcproxy.brain.sources import ObjectSink
from vcproxy.brain.store import Store, Stored
from vcproxy.kube.backoff import Backoff
from vcproxy.kube.client import Limits as ClientLimits
from vcproxy.kube.decode import PODS
from vcproxy.kube.errors import ShapeError, Unreachable
from vcproxy.kube.reflector import Broken, Deleted, Listed, Malformed, Recovered, Upserted
from vcproxy.kube.reflector import Timing as ReflectorTiming
from vcproxy.model.addresses import format_target, parse_address
from vcproxy.model.endpoints import unpack
from vcproxy.model.mark import Mark, Position
from vcproxy.model.tenant import Tenant
from vcproxy.model.timing import Timing

UID = "t1"
BEGIN = Listed((), ())


class Hand:
    """An input that a test plays by hand."""

    def __init__(self) -> None:
        self.sink: ObjectSink | None = None
        self.runs = 0
        self.fault: asyncio.Future[None] | None = None
        self.versions: dict[str, str] = {}

    async def run(self, sink: ObjectSink) -> NoReturn:
        self.sink, self.runs = sink, self.runs + 1
        self.fault = asyncio.get_running_loop().create_future()
        await self.fault
        raise AssertionError


class Watched(Store):
    """A store that remembers the timing of updates."""

    def __init__(self) -> None:
        super().__init__()
        self.timings: list[Timing] = []

    def update(self, uid: str, put: Any, removed: Any, timing: Timing | None = None) -> int | None:
        revision = super().update(uid, put, removed, timing)
        if revision is not None and timing is not None:
            self.timings.append(timing)
        return revision


def quick() -> Backoff:
    return Backoff(base=0.01, cap=0.05, uniform=lambda low, high: high)


@contextlib.asynccontextmanager
async def fed(source: Any, *, policy: Policy = UNRESTRICTED, **more: Any) -> AsyncIterator[tuple[Watched, Feed]]:
    store = more.pop("store", None) or Watched()
    feed = Feed(Tenant(UID, "acme"), source, store=store, policy=policy, backoff=quick(), **more)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(feed.run())
        await settle()
        try:
            yield store, feed
        finally:
            task.cancel()


def held(store: Store) -> Stored:
    return store.tenants()[UID]


def targets(store: Store) -> dict[str, list[str]]:
    """Service -> its IPv4 endpoints."""
    return {
        key.service: [format_target(found.address, found.port) for found in unpack(port.endpoints4, 4)]
        for key, port in held(store).model.ports.items()
    }


async def begin(hand: Hand, services: tuple[Any, ...] = (), slices: tuple[Any, ...] = ()) -> None:
    assert hand.sink is not None
    hand.sink("ServiceCIDR", BEGIN)
    hand.sink("Service", Listed(services, ()))
    hand.sink("EndpointSlice", Listed(slices, ()))
    await settle()


async def test_synced_only_when_all_has_been_listed() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        assert hand.sink is not None
        assert not held(store).synced
        hand.sink("Service", Listed((service(),), ()))
        await settle()
        assert not held(store).synced
        assert len(held(store).model) == 0, "half of the objects is a wrong state"
        hand.sink("EndpointSlice", Listed((endpoint_slice(["10.0.0.1"]),), ()))
        await settle()
        assert targets(store) == {"web": ["10.0.0.1:8080"]}
        assert not held(store).synced, "the ServiceCIDRs are still unknown"
        hand.sink("ServiceCIDR", Listed((service_cidr("10.96.0.0/16"),), ()))
        await settle()
        assert held(store).synced
        assert [str(prefix) for prefix in held(store).tenant.virtual_ranges] == ["10.96.0.0/16"]


async def test_an_empty_tenant_is_synced_too() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        await begin(hand)
        assert held(store).synced


async def test_what_was_compiled_is_not_held_until_the_next_change() -> None:
    hand = Hand()
    async with fed(hand):
        found = service(), endpoint_slice(["10.0.0.1"])
        before = [sys.getrefcount(one) for one in found]
        await begin(hand, found[:1], found[1:])
        assert [sys.getrefcount(one) for one in found] == before, "a list is many times what is packed of it"


async def test_service_cidrs_that_are_not_served_hold_nothing_up() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        assert hand.sink is not None
        hand.sink("ServiceCIDR", Broken(Unreachable(tenant=UID, path="/", message="404"), 1.0))
        hand.sink("Service", BEGIN)
        hand.sink("EndpointSlice", BEGIN)
        await settle()
        assert held(store).synced
        assert held(store).stale_since is None


async def test_a_broken_connection_is_stale_and_wipes_nothing() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        await begin(hand, (service(),), (endpoint_slice(["10.0.0.1"]),))
        assert hand.sink is not None
        hand.sink("Service", Broken(Unreachable(tenant=UID, path="/s", message="gone"), 7.0))
        hand.sink("EndpointSlice", Broken(Unreachable(tenant=UID, path="/e", message="gone"), 5.0))
        assert held(store).stale_since == 5.0
        assert "gone" in held(store).stale_reason
        hand.sink("EndpointSlice", Recovered())
        assert held(store).stale_since == 7.0
        hand.sink("Service", Recovered())
        assert held(store).stale_since is None
        await settle()
        assert targets(store) == {"web": ["10.0.0.1:8080"]}


async def test_a_complete_empty_list_does_delete() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        await begin(hand, (service("a"), service("b")), ())
        assert hand.sink is not None
        hand.sink("Service", Listed((service("b"),), ()))
        await settle()
        assert set(targets(store)) == {"b"}
        hand.sink("Service", BEGIN)
        await settle()
        assert targets(store) == {}
        assert held(store).synced


async def test_what_a_list_could_not_read_stays() -> None:
    def bad(key: tuple[str, str] | None) -> ShapeError:
        return ShapeError(tenant=UID, kind="Service", key=key, field="$.spec.ports", reason="Expected array")

    hand = Hand()
    async with fed(hand) as (store, feed):
        await begin(hand, (service("a"), service("b")), ())
        assert hand.sink is not None
        hand.sink("Service", Listed((), (bad(("default", "a")),)))
        await settle()
        assert set(targets(store)) == {"a"}
        assert [said.field for said in feed.compiler.refusals()] == ["$.spec.ports"]
        hand.sink("Service", Listed((), (bad(None),)))
        await settle()
        assert set(targets(store)) == {"a"}
        hand.sink("Service", Malformed(bad(("default", "a"))))
        await settle()
        assert set(targets(store)) == {"a"}


async def test_a_flood_of_changes_to_one_object_is_one_revision() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        await begin(hand, (service(),), ())
        assert hand.sink is not None
        before = held(store).revision
        for number in range(1000):
            hand.sink("EndpointSlice", Upserted(endpoint_slice([f"10.0.{number // 250}.{number % 250}"])))
        await settle()
        assert targets(store) == {"web": ["10.0.3.249:8080"]}
        assert held(store).revision == before + 1


async def test_beyond_its_rate_a_tenant_waits() -> None:
    hand = Hand()
    async with fed(hand, events_per_second=10) as (store, _):
        await begin(hand, (service(),), ())
        assert hand.sink is not None
        for number in range(15):  # five more than a second allows: half a second of patience
            hand.sink("EndpointSlice", Upserted(endpoint_slice([f"10.0.0.{number}"], name=f"web-{number}")))
        await settle()
        assert len(targets(store)["web"]) == 15
        began = asyncio.get_running_loop().time()
        hand.sink("EndpointSlice", Upserted(endpoint_slice(["10.0.1.1"], name="other")))
        await settle()
        assert len(targets(store)["web"]) == 15
        await until(lambda: len(targets(store)["web"]) == 16)
        assert asyncio.get_running_loop().time() - began > 0.3


async def test_a_flood_of_changes_to_one_object_is_paid_for_as_one() -> None:
    hand = Hand()
    async with fed(hand, events_per_second=10) as (store, _):
        await begin(hand, (service(),), ())
        assert hand.sink is not None
        for number in range(1000):
            hand.sink("EndpointSlice", Upserted(endpoint_slice([f"10.0.{number // 250}.{number % 250}"])))
        await settle()
        hand.sink("EndpointSlice", Upserted(endpoint_slice(["10.0.9.9"])))
        await settle()
        assert targets(store) == {"web": ["10.0.9.9:8080"]}


async def test_an_endpoint_that_moves_between_slices_of_a_list_is_never_missing() -> None:
    hand = Hand()
    seen: list[list[str]] = []
    async with fed(hand) as (store, _):
        await begin(hand, (service(),), (endpoint_slice(["10.0.0.1", "10.0.0.2"], name="old"),))
        store.subscribe(lambda uid: seen.append(targets(store)["web"]))
        assert hand.sink is not None
        moved = (endpoint_slice(["10.0.0.1"], name="old"), endpoint_slice(["10.0.0.2", "10.0.0.3"], name="new"))
        hand.sink("EndpointSlice", Listed(moved, ()))
        await settle()
        assert seen == [["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"]]


async def test_a_change_deleted_before_it_was_compiled_is_gone() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        await begin(hand)
        assert hand.sink is not None
        hand.sink("Service", Upserted(service()))
        hand.sink("Service", Deleted(("default", "web"), ""))
        hand.sink("Service", Upserted(service("other")))
        hand.sink("Service", BEGIN)  # what waits is subject to the list, too
        await settle()
        assert targets(store) == {}


async def test_timing_travels_along() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        await begin(hand, (service(),), ())
        assert hand.sink is not None
        hand.sink("EndpointSlice", Upserted(endpoint_slice(["10.0.0.1"], trigger="2026-01-02T03:04:05.5Z")))
        await settle()
        timing = store.timings[-1]
        assert timing.event == 1767323045_500_000_000
        assert 0 < timing.received <= timing.compiled
        hand.sink("EndpointSlice", Upserted(endpoint_slice(["10.0.0.2"], trigger="a year ago")))
        await settle()
        assert store.timings[-1].event == 0


async def test_a_fault_ends_in_a_new_start_with_the_last_good_content() -> None:
    hand = Hand()
    async with fed(hand) as (store, feed):
        await begin(hand, (service("a"), service("b")), ())
        assert hand.fault is not None
        seen: list[tuple[int, float | None]] = []
        store.subscribe(lambda uid: seen.append((len(held(store).model), held(store).stale_since)))
        hand.fault.set_exception(RuntimeError("a fault of ours"))
        await until(lambda: hand.runs == 2)
        assert set(targets(store)) == {"a", "b"}
        assert held(store).synced
        assert any(since for _, since in seen), "it was stale meanwhile"
        assert "a fault of ours" in feed.last_error
        assert feed.restarts == 1
        await begin(hand, (service("b"), service("c")), ())
        assert set(targets(store)) == {"b", "c"}
        assert all(count >= 2 for count, _ in seen), "nothing was ever wiped"
        assert held(store).stale_since is None


async def test_one_tenants_faults_are_its_own() -> None:
    bad, good = Hand(), Hand()
    store = Watched()
    async with fed(bad, store=store), asyncio.TaskGroup() as group:
        other = Feed(Tenant("t2", "globex"), good, store=store, policy=UNRESTRICTED)
        task = group.create_task(other.run())
        await settle()
        for _ in range(3):
            await until(lambda: bad.fault is not None and not bad.fault.done())
            assert bad.fault is not None
            bad.fault.set_exception(ValueError("bad"))
            await settle()
        await begin(good, (service(),), ())
        assert store.tenants()["t2"].synced
        assert other.restarts == 0
        task.cancel()


async def test_room_below_a_limit_asks_for_a_new_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcproxy.brain.feed.RELIST_SECONDS", 0.0)
    hand = Hand()
    policy = msgspec.structs.replace(UNRESTRICTED, limits=Limits(services=1))
    async with fed(hand, policy=policy) as (store, feed):
        await begin(hand, (service("a"), service("b")), ())
        assert set(targets(store)) == {"a"}
        assert feed.compiler.degraded
        assert hand.sink is not None
        hand.sink("Service", Deleted(("default", "a"), ""))
        await until(lambda: hand.runs == 2)
        await begin(hand, (service("b"),), ())
        assert set(targets(store)) == {"b"}
        assert not feed.compiler.degraded
        assert feed.restarts == 0


async def test_a_tenants_service_cidr_counts_within_its_grant() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        assert hand.sink is not None
        hand.sink("ServiceCIDR", Listed((service_cidr("10.96.0.0/16", "fd00::/112", "rubbish"),), ()))
        assert len(held(store).tenant.virtual_ranges) == 2
        hand.sink("ServiceCIDR", Upserted(service_cidr("10.97.0.0/16", name="more")))
        assert len(held(store).tenant.virtual_ranges) == 3
        hand.sink("ServiceCIDR", Deleted(("", "more"), ""))
        assert len(held(store).tenant.virtual_ranges) == 2


# --- against an API server --------------------------------------------------------------------------------------------


def as_json(name: str, address: str = "10.0.0.1") -> tuple[dict[str, Any], dict[str, Any]]:
    metadata = {"namespace": "default", "name": name}
    owner = {"kubernetes.io/service-name": name}
    return (
        {"metadata": metadata, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}},
        {
            "metadata": {**metadata, "labels": owner},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address]}],
            "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        },
    )


def publish(api: FakeApiServer, name: str, address: str = "10.0.0.1") -> None:
    found, endpoints = as_json(name, address)
    api.put("Service", found)
    api.put("EndpointSlice", endpoints)


def reading(api: FakeApiServer, **how: Any) -> ApiInput:
    return ApiInput(api.credentials, tenant=UID, resources=TENANT_KINDS, limits=ClientLimits(), **how)


@pytest.fixture
async def api() -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer() as server:
        yield server


async def test_lists_and_watches(api: FakeApiServer) -> None:
    publish(api, "a")
    async with fed(reading(api)) as (store, _):
        await until(lambda: held(store).synced)
        assert targets(store) == {"a": ["10.0.0.1:8080"]}
        await api.watching("EndpointSlice")
        publish(api, "a", "10.0.0.2")
        await until(lambda: targets(store) == {"a": ["10.0.0.2:8080"]})


async def test_an_api_server_that_is_away_wipes_nothing(api: FakeApiServer) -> None:
    publish(api, "a")
    async with fed(reading(api)) as (store, _):
        await until(lambda: held(store).synced)
        await api.watching("Service")
        api.faults.append(Fault(html(502)))
        api.end_watches()
        await until(lambda: held(store).stale_since is not None)
        assert targets(store) == {"a": ["10.0.0.1:8080"]}
        api.faults.clear()
        await until(lambda: held(store).stale_since is None, timeout=30)
        assert targets(store) == {"a": ["10.0.0.1:8080"]}


async def test_never_reachable_is_never_empty(api: FakeApiServer) -> None:
    api.faults.append(Fault(fail(403)))
    async with fed(reading(api)) as (store, _):
        await until(lambda: held(store).stale_since is not None)
        assert not held(store).synced


async def test_a_wiped_etcd_does_delete(api: FakeApiServer) -> None:
    for name in "abc":
        publish(api, name)
    async with fed(reading(api)) as (store, _):
        await until(lambda: held(store).synced)
        for kind in ("Service", "EndpointSlice"):
            await api.watching(kind)
        api.wipe()
        publish(api, "new")
        for kind in ("Service", "EndpointSlice"):
            await api.watching(kind)
            api.bookmark(kind)  # with a version before the one that the watch began from
        await until(lambda: targets(store) == {"new": ["10.0.0.1:8080"]}, timeout=30)


async def test_without_service_cidrs_the_tenant_is_well(api: FakeApiServer) -> None:
    api.faults.append(Fault(fail(404), path="/apis/networking.k8s.io"))
    publish(api, "a")
    async with fed(reading(api)) as (store, _):
        await until(lambda: held(store).synced)
        assert held(store).stale_since is None


async def test_credentials_rotate_without_a_list_or_a_gap(api: FakeApiServer) -> None:
    publish(api, "a")
    source = reading(api)
    async with fed(source) as (store, _):
        await until(lambda: held(store).synced)
        for kind in ("Service", "EndpointSlice", "ServiceCIDR"):
            await api.watching(kind)
        stale: list[float | None] = []
        store.subscribe(lambda uid: stale.append(held(store).stale_since))
        api.token = "fresh"
        seen = len(api.requests)
        await source.rotate(api.credentials)
        await until(lambda: sum(verb == "watch" for verb, *_ in api.requests[seen:]) >= 3)
        publish(api, "a", "10.0.0.2")
        await until(lambda: targets(store) == {"a": ["10.0.0.2:8080"]})
        assert not [verb for verb, *_ in api.requests[seen:] if verb == "list"]
        assert not any(stale)


async def test_new_credentials_are_tried_at_once_where_the_old_were_refused(api: FakeApiServer) -> None:
    publish(api, "a")
    source = reading(api, timing=ReflectorTiming(backoff_base=1e6, backoff_cap=1e6))
    api.token = "fresh"
    async with fed(source) as (store, _):
        await until(lambda: held(store).stale_since is not None)
        await api.until(lambda: len(api.requests) >= 3)
        await source.rotate(api.credentials)
        await until(lambda: targets(store) == {"a": ["10.0.0.1:8080"]} and held(store).stale_since is None)


async def test_another_server_is_another_history(api: FakeApiServer) -> None:
    publish(api, "a")
    publish(api, "b")
    source = reading(api)
    async with fed(source) as (store, _):
        await until(lambda: held(store).synced)
        async with FakeApiServer() as elsewhere:
            publish(elsewhere, "b")
            await source.rotate(elsewhere.credentials)
            await until(lambda: set(targets(store)) == {"b"})


async def overtaken(hand: Hand, store: Store, feed: Feed) -> list[str]:
    """A feed at version 5, and a node with slices of version 9. Returns where announcements of the tenant go."""
    hand.versions = {"Service": "5", "EndpointSlice": "5"}
    await begin(hand, (service("a"),), (endpoint_slice(["10.0.0.1"], service="a"),))
    assert held(store).mark == {kind: Position(5, 5) for kind in hand.versions}
    told: list[str] = []
    store.subscribe(told.append)
    held(store).overtaken({"EndpointSlice": Position(9, 9)})
    return told


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcproxy.brain.overtaking.OVERTAKEN_SECONDS", 0)


@pytest.mark.usefixtures("at_once")
async def test_a_node_that_is_ahead_makes_the_brain_list_again() -> None:
    hand = Hand()
    async with fed(hand) as (store, feed):
        told = await overtaken(hand, store, feed)
        await until(lambda: hand.runs == 2)
        assert hand.sink is not None
        assert not told
        hand.versions = {"EndpointSlice": "9"}  # Services have not been listed yet
        hand.sink("EndpointSlice", Listed((endpoint_slice(["10.0.0.2"], service="a"),), ()))
        await until(lambda: UID in told)
        assert targets(store) == {"a": ["10.0.0.2:8080"]}
        assert held(store).mark == {"Service": Position(5, 5), "EndpointSlice": Position(9, 9)}
        held(store).overtaken({"EndpointSlice": Position(9, 9)})
        await settle()
        assert hand.runs == 2


@pytest.mark.usefixtures("at_once")
async def test_a_brain_that_catches_up_by_itself_does_not_list() -> None:
    hand = Hand()
    async with fed(hand) as (store, feed):
        told = await overtaken(hand, store, feed)
        hand.versions["EndpointSlice"] = "10"  # a bookmark
        await until(lambda: UID in told)
        assert hand.runs == 1
        assert held(store).mark["EndpointSlice"] == Position(5, 10)


@pytest.mark.usefixtures("at_once")
async def test_a_complete_list_that_is_below_a_nodes_version_is_the_truth() -> None:
    hand = Hand()
    async with fed(hand) as (store, feed):
        told = await overtaken(hand, store, feed)
        await until(lambda: hand.runs == 2)
        await begin(hand)
        await until(lambda: UID in told)
        assert targets(store) == {}
        found = held(store).mark
        assert found["Service"] == Position(5, 5)
        assert found["EndpointSlice"].epoch > 0


@pytest.mark.usefixtures("at_once")
async def test_many_nodes_that_are_ahead_do_not_make_many_lists() -> None:
    hand = Hand()
    async with fed(hand) as (store, feed):
        await overtaken(hand, store, feed)
        await until(lambda: hand.runs == 2)
        for version in range(10, 20):
            held(store).overtaken({"EndpointSlice": Position(version, version)})
            await settle()
        assert hand.runs == 2


async def test_what_waits_or_is_half_compiled_is_not_seen_yet() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        hand.versions = {"Service": "5", "EndpointSlice": "5"}
        await begin(hand, (service("a"),))
        assert hand.sink is not None
        hand.versions["EndpointSlice"] = "6"
        hand.sink("EndpointSlice", Upserted(endpoint_slice(["10.0.0.1"], service="a")))
        assert held(store).mark["EndpointSlice"] == Position(5, 5)
        await settle()
        assert held(store).mark["EndpointSlice"] == Position(6, 6)


async def test_each_revision_is_as_new_as_it_was() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        hand.versions = {"Service": "5", "EndpointSlice": "5"}
        await begin(hand, (service("a"),))
        assert hand.sink is not None
        before, made = held(store).model.digest, []
        for version in (6, 7):
            hand.versions["EndpointSlice"] = str(version)
            hand.sink("EndpointSlice", Upserted(endpoint_slice([f"10.0.0.{version}"], service="a")))
            await settle()
            delta = held(store).delta(before)
            assert delta is not None
            made.append(delta.after)
        assert [version.mark["EndpointSlice"] for version in made] == [Position(6, 5), Position(7, 6)]


async def test_objects_without_history_have_no_mark() -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        hand.versions = {"Service": "5", "EndpointSlice": "not-a-number"}
        await begin(hand)
        assert held(store).mark == {"Service": Position(5, 5)}
        hand.versions = {}
        await begin(hand)
        assert held(store).mark == {}


async def test_a_real_stream_of_versions(api: FakeApiServer) -> None:
    publish(api, "a")
    async with fed(reading(api)) as (store, _):
        await until(lambda: held(store).synced)
        for kind in ("Service", "EndpointSlice"):
            await api.watching(kind)
        before = held(store).mark
        publish(api, "a", "10.0.0.2")
        await until(lambda: targets(store) == {"a": ["10.0.0.2:8080"]})
        await until(lambda: held(store).mark["EndpointSlice"].changed > before["EndpointSlice"].changed)
        quiet = held(store).mark
        api.bookmark("EndpointSlice")
        assert held(store).mark["EndpointSlice"].changed == quiet["EndpointSlice"].changed
        api.wipe()
        publish(api, "new")
        for kind in ("Service", "EndpointSlice"):
            await api.watching(kind)
            api.bookmark(kind)
        await until(lambda: targets(store) == {"new": ["10.0.0.1:8080"]}, timeout=30)
        await until(lambda: all(at.epoch for at in held(store).mark.values()))


class Ground:
    """What is known of the super cluster."""

    def __init__(self) -> None:
        self.ahead: list[Mark] = []
        self.reach(5)

    def reach(self, version: int) -> None:
        self.at: Mark = {PODS.path: Position(version, version)}

    def mark(self) -> Mark:
        return self.at

    def overtaken(self, by: Mark) -> None:
        self.ahead.append(by)


async def test_content_is_as_new_as_what_it_was_compiled_by() -> None:
    hand, ground = Hand(), Ground()
    hand.versions = {"Service": "50", "EndpointSlice": "50"}
    async with fed(hand, ground=ground) as (store, feed):
        assert PODS.path not in feed.age.mark(), "of what was there before nobody knows"
        await begin(hand, (service(),), (endpoint_slice(["10.0.0.1"]),))
        assert held(store).mark == {"Service": Position(50, 50), "EndpointSlice": Position(50, 50), **ground.at}
        before = dict(ground.at)
        ground.reach(9)
        feed._reconsider(parse_address("10.0.0.1"))
        assert held(store).mark[PODS.path] == before[PODS.path], "a right that may have changed waits to be compiled"
        await settle()
        assert held(store).mark[PODS.path] == Position(9, 9)
        feed.set_policy(msgspec.structs.replace(UNRESTRICTED, own_pods_only=True))
        assert PODS.path not in feed.age.mark(), "what new rules grant is not there yet"


async def test_who_lags_in_what_it_compiles_by_does_not_list_the_tenant() -> None:
    hand, ground = Hand(), Ground()
    async with fed(hand, ground=ground) as (_, feed):
        await begin(hand)
        ahead = {PODS.path: Position(70, 70)}
        feed.age.overtaken(ahead)
        assert ground.ahead == [ahead]
        assert not feed.age._chronicle.asked
        feed.age.overtaken({**ahead, "Service": Position(3, 3)})
        assert ground.ahead == [ahead, ahead]
        assert feed.age._chronicle.asked
