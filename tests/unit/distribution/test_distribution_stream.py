"""Brain to node over mutual TLS: content arrives, resumes and recovers; nothing is lost when either side restarts."""

import random

import pytest

from tests.unit.distribution.rig import (
    ACME,
    BETA,
    Certificates,
    Placed,
    brain,
    key,
    node,
    service_port,
    until,
    wire,
)
from vcproxy.brain.distribution import Limits
from vcproxy.brain.store import Store
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import EMPTY_DIGEST, Tenant, TenantModel
from vcproxy.model.timing import Timing
from vcproxy.node.holdings import (
    Connected,
    Disconnected,
    FactsChanged,
    Held,
    Holdings,
    PlacementChanged,
    TenantChanged,
    TenantGone,
    TenantsComplete,
    TenantStale,
    TenantSynced,
)
from vcproxy.pb import distribution_pb2

A = "node-a"


def many(count: int, *, first: int = 0) -> list[ServicePort]:
    return [service_port(f"svc-{index}", index, index + 1, number=index) for index in range(first, first + count)]


async def test_node_gets_a_tenant_whole_and_then_its_changes(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME, service_port("web", 1, 2, 3))
        async with node(A, certificates.node(A), b.address) as n:
            stored = b.store.tenants()["acme-1"]
            await until(lambda: n.has(stored.model.digest))
            timing = Timing(1, 2, 3)
            revision = b.store.update("acme-1", [service_port("web", 1, 2, 3, 4)], [], timing)
            await until(lambda: n.has(stored.model.digest))
            assert dict(n.holdings.tenants["acme-1"].model.ports) == dict(stored.model.ports)
            assert n.events[-1] == TenantChanged("acme-1", frozenset({key("web")}), revision, timing)
            assert n.holdings.tenants["acme-1"].brain == b.store.brain_id
            assert n.holdings.tenants["acme-1"].revision == revision


async def test_one_endpoint_of_many_travels_as_one_endpoint(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME, service_port("web", *range(1000)))
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A)
            await w.kinds("synced")
            b.store.update("acme-1", [service_port("web", *range(1001))], [])
            message = await w.next()
            assert message is not None
            assert message.WhichOneof("message") == "delta"
            assert message.ByteSize() < 200


async def test_an_empty_tenant_is_synced_without_content(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME)
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A)
            assert await w.kinds("synced") == ["welcome", "facts", "placement", "complete", "added", "synced"]


async def test_a_node_with_the_same_digest_gets_no_content(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME, *many(500))
        digest = b.store.tenants()["acme-1"].model.digest
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A, {"acme-1": digest})
            kinds = await w.kinds("synced")
            assert "snapshot" not in kinds
            assert "delta" not in kinds


async def test_a_node_with_a_recent_digest_gets_one_delta_of_all_it_missed(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME, *many(500))
        digest = b.store.tenants()["acme-1"].model.digest
        for pod in range(10):
            b.store.update("acme-1", [service_port("web", pod)], [])
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A, {"acme-1": digest})
            kinds = await w.kinds("synced")
            assert kinds.count("delta") == 1
            assert "snapshot" not in kinds


async def test_a_node_with_an_unknown_digest_gets_a_snapshot_of_that_tenant_alone(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1", "beta-1"]})) as b:
        b.tenant(ACME, *many(50))
        b.tenant(BETA, *many(50))
        known = {"acme-1": bytes(range(32)), "beta-1": b.store.tenants()["beta-1"].model.digest}
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A, known)
            assert (await w.kinds("synced", 2)).count("snapshot") == 1


async def test_deltas_that_would_be_larger_than_the_snapshot_are_not_sent(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME, *many(100))
        digest = b.store.tenants()["acme-1"].model.digest
        for turn in range(10):
            b.store.replace("acme-1", many(100, first=turn % 2 * 1000))
        b.store.replace("acme-1", many(100, first=5000))
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A, {"acme-1": digest})
            kinds = await w.kinds("synced")
            assert "delta" not in kinds
            assert "snapshot" in kinds


async def test_brain_restart_with_other_revisions_costs_nothing_when_content_is_the_same(
    certificates: Certificates,
) -> None:
    holdings = Holdings()
    placement = Placed({A: ["acme-1"]})
    async with brain(certificates, placement) as first:
        first.tenant(ACME, *many(100))
        for pod in range(5):
            first.store.update("acme-1", [service_port("web", pod)], [])
        port = int(first.address.rpartition(":")[2])
        wanted = dict(first.store.tenants()["acme-1"].model.ports)
        async with node(A, certificates.node(A), first.address, holdings=holdings) as n:
            await until(lambda: n.has(first.store.tenants()["acme-1"].model.digest))
    model = holdings.tenants["acme-1"].model
    async with brain(certificates, placement, port=port) as second:
        second.tenant(ACME, *wanted.values())
        async with node(A, certificates.node(A), second.address, holdings=holdings, commit=True) as n:
            await until(lambda: n.saw(TenantSynced))
            assert n.saw(TenantChanged) == []
            assert holdings.tenants["acme-1"].model is model
            assert holdings.tenants["acme-1"].revision == 1
            assert holdings.tenants["acme-1"].brain == second.store.brain_id
            await until(lambda: [t.committed for s in second.distributor.nodes() for t in s.tenants] == [1])


async def test_node_goes_on_with_another_replica_by_delta(certificates: Certificates) -> None:
    placement = Placed({A: ["acme-1"]})
    stores = Store(), Store()
    async with brain(certificates, placement, store=stores[1]) as second:
        second.tenant(ACME, *many(100))
        second.store.update("acme-1", [service_port("web", 1)], [])
        async with brain(certificates, placement, store=stores[0]) as first:
            first.tenant(ACME, *many(100))
            holdings = Holdings()
            async with node(A, certificates.node(A), first.address, holdings=holdings) as n:
                await until(lambda: n.has(stores[0].tenants()["acme-1"].model.digest))
        async with node(A, certificates.node(A), first.address, second.address, holdings=holdings) as n:
            await until(lambda: n.has(stores[1].tenants()["acme-1"].model.digest))
            assert [event.touched for event in n.saw(TenantChanged)] == [frozenset({key("web")})]


async def test_node_reconnects_when_the_brain_comes_back(certificates: Certificates) -> None:
    placement = Placed({A: ["acme-1"]})
    async with brain(certificates, placement) as first:
        first.tenant(ACME, *many(10))
        port = int(first.address.rpartition(":")[2])
        session = node(A, certificates.node(A), first.address)
        n = await session.__aenter__()
        await until(lambda: n.has(first.store.tenants()["acme-1"].model.digest))
    try:
        await until(lambda: n.saw(Disconnected))
        assert n.has(first.store.tenants()["acme-1"].model.digest), "the brain is gone and content stays"
        async with brain(certificates, placement, port=port) as second:
            await until(lambda: len(n.saw(Connected)) == 2)
            second.tenant(ACME, *many(11))
            await until(lambda: n.has(second.store.tenants()["acme-1"].model.digest))
    finally:
        await session.__aexit__(None, None, None)


async def test_a_tenant_that_is_not_synced_is_not_mentioned(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1", "beta-1"]})) as b:
        b.store.add_tenant(ACME)
        b.store.replace("acme-1", many(1))
        b.store.set_stale("acme-1", 5.0, "connection refused")
        b.tenant(BETA)
        held = Held(ACME, TenantModel(many(3)), 9, "an earlier brain", synced=True)
        holdings = Holdings()
        holdings.put(held)
        async with node(A, certificates.node(A), b.address, holdings=holdings) as n:
            await until(lambda: n.has(EMPTY_DIGEST, "beta-1"))
            assert not [event for event in n.events if getattr(event, "uid", "") == "acme-1"]
            assert held.model.digest == TenantModel(many(3)).digest
            b.store.set_synced("acme-1")
            await until(lambda: n.has(TenantModel(many(1)).digest))


async def test_stale_tenant_keeps_its_content_and_gets_well(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME, *many(2))
        async with node(A, certificates.node(A), b.address) as n:
            await until(lambda: n.has(TenantModel(many(2)).digest))
            b.store.set_stale("acme-1", 1700000000.5, "connection refused")
            await until(lambda: n.saw(TenantStale))
            held = n.holdings.tenants["acme-1"]
            assert (held.stale_since, held.stale_reason) == (1700000000.5, "connection refused")
            assert n.has(TenantModel(many(2)).digest)
            b.store.set_stale("acme-1", None)
            await until(lambda: len(n.saw(TenantStale)) == 2)
            assert (held.stale_since, held.stale_reason) == (None, "")


async def test_node_that_missed_the_recovery_of_a_stale_tenant_is_told(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME)
        holdings = Holdings()
        holdings.put(Held(ACME, synced=True, stale_since=3.0, stale_reason="down"))
        async with node(A, certificates.node(A), b.address, holdings=holdings) as n:
            await until(lambda: n.saw(TenantStale))
            assert holdings.tenants["acme-1"].stale_since is None


async def test_removed_tenant_leaves_the_node(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1", "beta-1"]})) as b:
        b.tenant(ACME, *many(2))
        b.tenant(BETA, *many(2))
        async with node(A, certificates.node(A), b.address) as n:
            await until(lambda: n.has(TenantModel(many(2)).digest) and n.has(TenantModel(many(2)).digest, "beta-1"))
            b.store.remove_tenant("acme-1")
            await until(lambda: n.saw(TenantGone))
            assert set(n.holdings) == {"beta-1"}
            b.tenant(ACME, *many(1))
            await until(lambda: n.has(TenantModel(many(1)).digest))


async def test_tenant_follows_its_pods(certificates: Certificates) -> None:
    placement = Placed({A: []})
    async with brain(certificates, placement) as b:
        b.tenant(ACME, *many(2))
        async with node(A, certificates.node(A), b.address) as n:
            await until(lambda: n.saw(TenantsComplete))
            assert not set(n.holdings)
            placement.set(A, tenants=["acme-1"])
            await until(lambda: n.has(TenantModel(many(2)).digest))
            placement.set(A, tenants=[])
            await until(lambda: n.saw(TenantGone))
            b.store.update("acme-1", many(5), [])
            placement.set(A, tenants=["acme-1"])
            await until(lambda: n.has(TenantModel(many(5)).digest))


async def test_nothing_is_lost_while_a_restarted_brain_is_still_finding_out(certificates: Certificates) -> None:
    placement = Placed({A: ["beta-1"]}, ready=False)
    holdings = Holdings()
    holdings.put(Held(ACME, TenantModel(many(3)), 9, "an earlier brain", synced=True))
    async with brain(certificates, placement) as b:
        b.tenant(BETA, *many(1))
        async with node(A, certificates.node(A), b.address, holdings=holdings) as n:
            await until(lambda: n.has(TenantModel(many(1)).digest, "beta-1"))
            told = (TenantGone, TenantsComplete, PlacementChanged, FactsChanged)
            assert not [event for event in n.events if isinstance(event, told)]
            assert n.has(TenantModel(many(3)).digest)
            placement.become_ready()
            await until(lambda: n.saw(TenantGone))
            assert set(holdings) == {"beta-1"}
            assert n.saw(TenantsComplete) == [TenantsComplete(frozenset({"beta-1"}))]
            assert n.saw(PlacementChanged) == [PlacementChanged({})]


async def test_changed_facts_of_a_tenant_are_announced(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME)
        async with node(A, certificates.node(A), b.address) as n:
            await until(lambda: n.has(EMPTY_DIGEST))
            renamed = Tenant("acme-1", "acme-prod", (parse_prefix("10.32.0.0/16"),))
            b.store.add_tenant(renamed)
            await until(lambda: n.saw(TenantChanged))
            assert n.holdings.tenants["acme-1"].tenant == renamed
            assert n.saw(TenantChanged)[-1].touched == frozenset()


async def test_node_learns_its_pods_and_facts_and_their_changes(certificates: Certificates) -> None:
    one, two, three = (parse_address(f"10.1.0.{n}") for n in (1, 2, 3))
    placement = Placed({A: []})
    facts = NodeFacts("zone-a", (parse_address("192.0.2.1"), parse_address("fd00::1")), (parse_prefix("10.1.0.0/24"),))
    placement.set(A, pods={one: "acme-1", two: "beta-1"}, facts=facts)
    async with brain(certificates, placement) as b, node(A, certificates.node(A), b.address) as n:
        await until(lambda: n.saw(PlacementChanged))
        assert n.saw(FactsChanged) == [FactsChanged(facts)]
        assert n.saw(PlacementChanged)[-1].addresses == {one: "acme-1", two: "beta-1"}
        placement.set(A, pods={two: "acme-1", three: "beta-1"})
        await until(lambda: len(n.saw(PlacementChanged)) == 2)
        assert n.saw(PlacementChanged)[-1].addresses == {two: "acme-1", three: "beta-1"}
        assert n.saw(PlacementChanged)[0].addresses == {one: "acme-1", two: "beta-1"}, "an event is not changed later"
        assert len(n.saw(FactsChanged)) == 1


@pytest.mark.parametrize("change", ["content", "patch of an unknown port"])
async def test_node_whose_copy_is_wrong_takes_a_snapshot(certificates: Certificates, change: str) -> None:
    async with brain(certificates, Placed({A: ["acme-1", "beta-1"]})) as b:
        b.tenant(ACME, service_port("web", *range(100)), *many(5))
        b.tenant(BETA, *many(2))
        async with node(A, certificates.node(A), b.address) as n:
            stored = b.store.tenants()["acme-1"]
            await until(lambda: n.has(stored.model.digest) and n.has(TenantModel(many(2)).digest, "beta-1"))
            right = dict(stored.model.ports)
            # The copy goes wrong behind the brain's back, as by a defect.
            if change == "content":
                n.holdings.tenants["acme-1"].model.put(service_port("svc-1", 77))
            else:
                n.holdings.tenants["acme-1"].model.remove(key("web"))
            wrong = dict(n.holdings.tenants["acme-1"].model.ports)
            beta = n.holdings.tenants["beta-1"].model
            seen: list[object] = []

            def look() -> bool:
                seen.append(dict(n.holdings.tenants["acme-1"].model.ports))
                return n.has(stored.model.digest)

            b.store.update("acme-1", [service_port("web", *range(101))], [])
            await until(look)
            whole = (wrong, right, dict(stored.model.ports))
            assert all(state in whole for state in seen), "a half-applied delta was seen"
            assert [event.touched for event in n.saw(TenantChanged)].count(None) == 3, "first of both, and the repair"
            assert n.holdings.tenants["beta-1"].model is beta
            assert len(n.saw(Connected)) == 1
            b.store.update("acme-1", [service_port("web", *range(102))], [])
            await until(lambda: n.has(stored.model.digest))
            assert n.saw(TenantChanged)[-1].touched == frozenset({key("web")})


async def test_a_slow_client_gets_the_newest_state_not_the_history(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"], "node-b": ["acme-1"]})) as b:
        b.tenant(ACME, *many(50))
        stored = b.store.tenants()["acme-1"]
        async with (
            wire(certificates.node(A), b.address, certificates.ca) as slow,
            node("node-b", certificates.node("node-b"), b.address) as fast,
        ):
            await slow.hello(A)
            await slow.kinds("synced")
            before = stored.revision
            # It reads nothing now, while far more is changed than the transport's windows take (some MB).
            chance = random.Random(7)
            for _ in range(200):
                b.store.update("acme-1", [service_port("web", *chance.sample(range(1 << 16), 3000))], [])
                await until(lambda: fast.has(stored.model.digest))
            changes = stored.revision - before
            assert changes == 200
            received, last = 0, 0
            while last < stored.revision:
                message = await slow.next()
                assert message is not None
                received += 1
                kind = message.WhichOneof("message")
                last = max(last, message.delta.to if kind == "delta" else message.snapshot.revision)
            assert received < changes


async def test_tenants_take_turns_so_a_huge_one_does_not_delay_a_small_one(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1", "beta-1"]})) as b:
        b.tenant(ACME, *[service_port(f"svc-{i}", *range(1000), number=i) for i in range(200)])
        b.tenant(BETA, *many(2))
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A)
            order = []
            while True:
                message = await w.next()
                assert message is not None
                match message.WhichOneof("message"):
                    case "snapshot":
                        assert message.ByteSize() <= 256 << 10
                        order.append(message.snapshot.tenant)
                    case "synced" if message.synced.tenant == "acme-1":
                        break
            assert order.count("acme-1") > 10
            assert "beta-1" in order[:3]


async def test_snapshots_are_sent_to_a_few_nodes_at_a_time_and_to_all_in_the_end(certificates: Certificates) -> None:
    names = [f"node-{index}" for index in range(6)]
    limits = Limits(snapshots=1, lease=0.2)
    async with brain(certificates, Placed({name: ["acme-1"] for name in names}), limits=limits) as b:
        b.tenant(ACME, *[service_port(f"svc-{i}", *range(1000), number=i) for i in range(1500)])
        async with wire(certificates.node("node-0"), b.address, certificates.ca) as frozen:
            await frozen.hello("node-0")  # has its turn, and then reads nothing
            await frozen.next()
            for name in names[1:]:
                async with wire(certificates.node(name), b.address, certificates.ca) as w:
                    await w.hello(name)
                    assert "snapshot" in await w.kinds("synced")
            assert "snapshot" in await frozen.kinds("synced"), "a slow node is not forgotten"


async def test_acknowledgements_tell_how_far_each_node_is(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME, *many(2))
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A)
            await w.kinds("synced")
            stored = b.store.tenants()["acme-1"]

            def status():  # type: ignore[no-untyped-def]
                return b.distributor.nodes()[0].tenants[0]

            assert (status().sent, status().received, status().committed, status().current) == (1, 0, 0, False)
            assert status().lag_seconds > 0
            ack = {"tenant": "acme-1", "revision": 1, "digest": stored.model.digest}
            await w.say(ack=distribution_pb2.Ack(stage=distribution_pb2.RECEIVED, **ack))
            await until(lambda: status().received == 1)
            assert not status().current
            rejection = distribution_pb2.Rejection(
                key={"namespace": "default", "service": "svc-1", "port": "http", "protocol": 6}, reason="no memory"
            )
            await w.say(
                ack=distribution_pb2.Ack(
                    stage=distribution_pb2.COMMITTED, rejections=[rejection], microseconds=42, **ack
                )
            )
            await until(lambda: status().committed == 1)
            assert status().current
            assert status().lag_seconds == 0
            assert status().commit_microseconds == 42
            assert [(r.key, r.reason) for r in status().rejections] == [(key("svc-1"), "no memory")]
            b.store.update("acme-1", many(3), [])
            await until(lambda: status().sent == 2)
            assert not status().current
            await w.say(ack=distribution_pb2.Ack(tenant="acme-1", revision=2, error="no such table"))
            await until(lambda: status().error == "no such table")
