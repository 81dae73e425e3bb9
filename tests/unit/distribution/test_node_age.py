"""What a node was told of itself never goes back in time, whatever replica of the brain it comes to."""

from pathlib import Path

import pytest

from tests.unit.distribution.rig import (
    ACME,
    BETA,
    Certificates,
    Placed,
    brain,
    node,
    service_port,
    until,
    wire,
)
from vcproxy.model.addresses import parse_address
from vcproxy.model.mark import Mark, Position
from vcproxy.model.node import NodeFacts
from vcproxy.model.tenant import TenantModel
from vcproxy.node.cache import Cache
from vcproxy.node.holdings import FactsChanged, Held, Holdings, PlacementChanged, TenantGone, TenantsComplete
from vcproxy.ops import metrics
from vcproxy.pb import convert, distribution_pb2

PODS = "/api/v1/pods"
A = "node-a"
POD = parse_address("10.1.0.1")


def at(version: int, *, seen: int | None = None, epoch: int = 0) -> Mark:
    return {PODS: Position(version, version if seen is None else seen, epoch)}


def placed(version: int, *tenants: str, zone: str = "") -> Placed:
    made = Placed({A: tenants})
    made.at = at(version)
    made.set(A, facts=NodeFacts(zone=zone), pods={POD: ACME.uid} if ACME.uid in tenants else {})
    return made


async def test_a_replica_that_lags_takes_nothing_away_and_says_nothing_old(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcproxy.node.session.PATIENCE", 1e9)
    known, lagging = placed(9, ACME.uid, zone="new"), placed(5, BETA.uid, zone="old")
    holdings = Holdings()
    async with brain(certificates, known) as one:
        one.tenant(ACME, service_port("web", 1))
        async with node(A, certificates.node(A), one.address, holdings=holdings) as n:
            await until(lambda: n.has(one.store.tenants()[ACME.uid].model.digest))
            await until(lambda: bool(n.saw(TenantsComplete)))
    assert holdings.mark == at(9)
    async with brain(certificates, lagging) as other:
        other.tenant(ACME, service_port("web", 1))
        other.tenant(BETA, service_port("dns", 2))
        async with node(A, certificates.node(A), other.address, holdings=holdings) as n:
            await until(lambda: metrics.value("vcproxy_tenants_brain_behind") == 1)
            await until(lambda: n.has(other.store.tenants()[BETA.uid].model.digest, BETA.uid))
            assert lagging.ahead == [at(9)] * len(lagging.ahead)
            assert lagging.ahead
            for kind in (FactsChanged, PlacementChanged, TenantGone, TenantsComplete):
                assert n.saw(kind) == []
            assert ACME.uid in holdings
            # It has caught up: what it says now is true, that the tenant has left, too.
            lagging.reach(at(11))
            await until(lambda: bool(n.saw(TenantsComplete)))
            assert n.saw(FactsChanged)[-1].facts.zone == "old"
            await until(lambda: bool(n.saw(TenantGone)))
            assert metrics.value("vcproxy_tenants_brain_behind") == 0
    assert holdings.mark == at(11)


async def test_a_quiet_replica_does_not_look_like_one_that_lags(certificates: Certificates) -> None:
    """The other one has had a bookmark since; nothing has happened."""
    quiet = placed(7, ACME.uid)
    holdings = Holdings()
    holdings.mark = at(7, seen=90)
    async with brain(certificates, quiet) as b, node(A, certificates.node(A), b.address, holdings=holdings) as n:
        await until(lambda: bool(n.saw(TenantsComplete)))
    assert quiet.ahead == []


async def test_a_node_goes_on_to_a_replica_that_knows(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcproxy.node.session.PATIENCE", 0.1)
    holdings = Holdings()
    holdings.mark = at(9)
    async with (
        brain(certificates, placed(5)) as lagging,
        brain(certificates, placed(9, zone="z")) as current,
        node(A, certificates.node(A), lagging.address, current.address, holdings=holdings) as n,
    ):
        await until(lambda: bool(n.saw(FactsChanged)))
        assert [event.facts.zone for event in n.saw(FactsChanged)] == ["z"]


async def test_a_history_that_was_rewritten_is_newer(certificates: Certificates) -> None:
    holdings = Holdings()
    holdings.mark = at(900)
    rewritten = placed(3, zone="z")
    rewritten.at = at(3, epoch=1_700_000_000_000)
    async with brain(certificates, rewritten) as b, node(A, certificates.node(A), b.address, holdings=holdings) as n:
        await until(lambda: bool(n.saw(FactsChanged)))
    assert holdings.mark == rewritten.at


async def test_of_what_a_brain_without_marks_says_nobody_knows_how_new_it_is(certificates: Certificates) -> None:
    holdings = Holdings()
    holdings.mark = at(9)
    old = placed(0, zone="z")
    old.at = {}
    async with brain(certificates, old) as b, node(A, certificates.node(A), b.address, holdings=holdings) as n:
        await until(lambda: bool(n.saw(FactsChanged)))
        assert old.ahead == []
    assert holdings.mark == {}


async def test_an_epoch_that_nobody_can_have_noticed_is_not_believed(certificates: Certificates) -> None:
    holdings = Holdings()
    holdings.mark = at(9, epoch=2**63)
    async with brain(certificates, placed(5)) as b, node(A, certificates.node(A), b.address, holdings=holdings) as n:
        await until(lambda: bool(n.saw(FactsChanged)))


async def test_nothing_is_removed_before_the_placement_is_ready_though_the_tenant_was_deleted(
    certificates: Certificates,
) -> None:
    starting = Placed({A: []}, ready=False)
    starting.at = at(12)
    async with brain(certificates, starting) as b:
        b.store.add_tenant(ACME)
        b.store.remove_tenant(ACME.uid)
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            known = [distribution_pb2.Known(tenant=ACME.uid, digest=bytes(32))]
            await w.say(hello=distribution_pb2.Hello(node=A, known=known, mark=convert.encode_mark(at(9))))
            assert await w.kinds("welcome") == ["welcome"]
            starting.become_ready()
            assert await w.kinds("removed") == ["facts", "placement", "complete", "removed"]


async def test_it_is_remembered_over_a_restart_of_the_node(tmp_path: Path) -> None:
    holdings = Holdings()
    holdings.mark = at(9, seen=20, epoch=5)
    cache = Cache(tmp_path, node=A, holdings=holdings)
    cache.keep_node(NodeFacts(), {})
    await cache.flush()
    again = Holdings()
    Cache(tmp_path, node=A, holdings=again).load()
    assert again.mark == holdings.mark


class At:
    """A follower that stays where it is."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self.ahead: list[Mark] = []

    def mark(self) -> Mark:
        return self._mark

    def overtaken(self, by: Mark) -> None:
        self.ahead.append(by)


async def test_content_compiled_by_an_older_view_of_the_super_cluster_is_not_sent(certificates: Certificates) -> None:
    """The tenant's own objects are the same: what differs is whose pods are known to be whose."""
    own = {"Service": Position(4, 8), "EndpointSlice": Position(7, 8)}
    held = Held(ACME, TenantModel([service_port("web", 1, 2)]), synced=True, mark={**own, **at(9)})
    holdings = Holdings()
    holdings.put(held)
    lagging = placed(9, ACME.uid)
    async with brain(certificates, lagging) as b:
        b.tenant(ACME, service_port("web", 1))
        follower = At({**own, **at(5)})
        b.store.follow(ACME.uid, follower)
        async with node(A, certificates.node(A), b.address, holdings=holdings) as n:
            await until(lambda: bool(held.behind))
            assert held.behind == "this brain has read pods up to version 5, the node has version 9"
            assert follower.ahead[0] == at(9)
            assert n.has(TenantModel([service_port("web", 1, 2)]).digest)
            follower._mark = {**own, **at(9)}
            b.store.announce(ACME.uid)
            await until(lambda: n.has(b.store.tenants()[ACME.uid].model.digest))
