"""The same ClusterIP, port and protocol in every tenant and in the super cluster: everybody reaches their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from e2e.conftest import NamespaceFactory
from e2e.oracle import SUPER
from e2e.traffic import REQUESTS
from e2e.world import PORT, World, fresh_vips, uid_of, web
from vcproxy.lab import Outcome, Place, Refused, Reply, TcpSession, TimedOut

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

TENANTS = (SUPER, "acme", "globex", "initech")
ENDPOINTS = ("web-1", "web-2")

tenants = pytest.mark.parametrize("tenant", TENANTS)
clients = pytest.mark.parametrize("client", ["client-one", "client-two"])
protocols = pytest.mark.parametrize("protocol", ["TCP", "UDP"])
families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])


@pytest.fixture(scope="module", params=["flat", "overlay"])
def world(request: pytest.FixtureRequest) -> World:
    made: World = request.getfixturevalue(f"{request.param}_world")
    return made


@pytest.fixture(scope="module")
def vips(world: World) -> Iterator[tuple[str, str]]:
    """ClusterIPs of a Service in every tenant, with an endpoint on each node."""
    vips = fresh_vips()
    with ExitStack() as stack:
        for tenant in TENANTS:
            objects = web("reach", vips, world.some(tenant, *ENDPOINTS))
            if tenant in world.manifests:
                world.apply(tenant, objects)
                stack.callback(world.apply, tenant, [])
            else:
                client = world.planes[tenant].client
                client.create_all(objects)
                stack.callback(client.delete, "Service", "reach", "default")
                for item in objects[1:]:
                    stack.callback(client.delete, "EndpointSlice", item["metadata"]["name"], "default")
        world.converged()
        yield vips


def answers(place: Place, address: str, protocol: str) -> set[str | Outcome]:
    """Who answers, or what happens instead: twenty requests, of which all go to one of two endpoints but twice in a
    million times."""
    outcomes = (REQUESTS[protocol](place, address, PORT) for _ in range(20))
    return {outcome.pod if isinstance(outcome, Reply) else outcome for outcome in outcomes}


@families
@protocols
@clients
@tenants
def test_pods_reach_their_own_tenants_endpoints_and_no_others(
    world: World, vips: tuple[str, str], tenant: str, client: str, protocol: str, family: int
) -> None:
    place = world.pods[tenant, client]
    assert answers(place, vips[family == 6], protocol) == {f"{tenant}/{name}" for name in ENDPOINTS}


@families
@protocols
@pytest.mark.parametrize("node", ["one", "two"])
def test_hosts_reach_the_super_clusters_endpoints(
    world: World, vips: tuple[str, str], node: str, protocol: str, family: int
) -> None:
    found = answers(world.nodes[node], vips[family == 6], protocol)
    assert found == {f"{SUPER}/{name}" for name in ENDPOINTS}


@families
@tenants
def test_pod_that_is_its_services_only_endpoint_reaches_itself(
    world: World, tenant: str, family: int, fresh_namespace: NamespaceFactory
) -> None:
    vips = fresh_vips()
    own = world.some(tenant, "web-1")
    if tenant in world.manifests:
        world.apply(tenant, [*world.manifests[tenant], *web(f"hairpin-{family}", vips, own)])
    else:
        client = world.planes[tenant].client
        client.create_all(web("hairpin", vips, own, namespace=fresh_namespace(client)))
    world.converged(tenant)
    assert {who for protocol in REQUESTS for who in answers(own[0], vips[family == 6], protocol)} == {f"{tenant}/web-1"}


@families
def test_address_of_one_tenant_is_nothing_to_others(
    world: World, family: int, fresh_namespace: NamespaceFactory
) -> None:
    client = world.planes["acme"].client
    vips = fresh_vips()
    client.create_all(web("private", vips, world.some("acme", "web-1"), namespace=fresh_namespace(client)))
    world.converged("acme")
    address = vips[family == 6]
    assert answers(world.pods["acme", "client-one"], address, "TCP") == {"acme/web-1"}
    for tenant in ("globex", SUPER):
        for protocol, request in REQUESTS.items():
            outcome = request(world.pods[tenant, "client-one"], address, PORT, timeout=0.3)
            assert isinstance(outcome, TimedOut), f"{tenant} {protocol}: {outcome}"


@families
@tenants
def test_other_port_of_a_cluster_ip_is_refused(world: World, vips: tuple[str, str], tenant: str, family: int) -> None:
    for request in REQUESTS.values():  # once: Linux sends ICMP errors sparingly (net.ipv4.icmp_msgs_burst)
        assert request(world.pods[tenant, "client-one"], vips[family == 6], PORT + 1) == Refused()


@families
def test_same_five_tuple_lives_in_every_overlay_tenant_at_once(
    overlay_world: World, fresh_namespace: NamespaceFactory, family: int
) -> None:
    world, vips = overlay_world, fresh_vips()
    acme, globex = world.planes["acme"].client, world.planes["globex"].client
    name = fresh_namespace(acme, globex)
    for tenant, client in (("acme", acme), ("globex", globex)):
        client.create_all(web("same", vips, world.some(tenant, *ENDPOINTS), namespace=name))
    world.converged("acme", "globex")
    with ExitStack() as stack:
        sessions = {
            tenant: stack.enter_context(
                TcpSession(world.pods[tenant, "client-one"], vips[family == 6], PORT, source_port=41000)
            )
            for tenant in ("acme", "globex")
        }
        assert len({session.reply.source for session in sessions.values()}) == 1
        for turn in range(5):
            for tenant, session in sessions.items():
                assert session.ask(f"turn {turn}").startswith(f"{tenant}/")


def test_every_tenant_has_a_zone_of_its_own(world: World) -> None:
    for node in world.nodes:
        zones = world.kernel(node).zones
        named = [zones[uid_of(tenant)] for tenant in TENANTS]
        assert len(set(named)) == len(TENANTS)
        assert zones[SUPER] == 0
