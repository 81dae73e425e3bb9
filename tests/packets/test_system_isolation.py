"""Tenants that share ClusterIPs, ports and pod addresses reach their own pods and never another's: real processes, real
packets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.packets.system import REQUESTS, VIP, Site, Traffic, Web, site, who
from vcproxy.lab import Refused, Reply, tcp_request

pytestmark = pytest.mark.packets

OVERLAYS = ("acme", "globex", "initech")
FLAT = ("red", "blue")
WEB = Web(pods=("web-1", "web-2"))

families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])
clients = pytest.mark.parametrize("client", ["client-one", "client-two"])
tenants = pytest.mark.parametrize("tenant", [*OVERLAYS, *FLAT])


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    with site(OVERLAYS, FLAT, webs=[WEB]) as made:
        yield made


@families
@protocols
@clients
@tenants
def test_cluster_ip_reaches_own_endpoints_on_both_nodes(
    shared: Site, tenant: str, client: str, protocol: str, family: int
) -> None:
    """One endpoint is on the client's node, the other on the other; answers come back through overlays of the same
    addresses and, in flat tenants, over the uplink that they share.
    """
    answered = shared.answered(tenant, client, protocol, VIP[family])
    assert answered == {f"{tenant}/web-1", f"{tenant}/web-2"}


@families
@tenants
def test_endpoint_sees_the_clients_own_address(shared: Site, tenant: str, family: int) -> None:
    client = shared.pods[f"{tenant}/client-one"]
    outcome = tcp_request(client, VIP[family], 80)
    assert isinstance(outcome, Reply)
    assert outcome.peer == outcome.source
    assert outcome.local[0] in {
        (pod.ip4, pod.ip6)[family == 6] for name, pod in shared.pods.items() if name.startswith(f"{tenant}/web-")
    }


@families
@clients
def test_same_five_tuple_in_three_tenants_at_once(shared: Site, client: str, family: int) -> None:
    """All are open together, carry data both ways in turns, and go on when the others close one after the other."""
    with contextlib.ExitStack() as stack:
        sessions = {
            tenant: stack.enter_context(shared.session(tenant, client, VIP[family], source_port=40000))
            for tenant in OVERLAYS
        }
        assert len({session.reply.source for session in sessions.values()}) == 1
        for turn in range(3):
            for tenant, session in sessions.items():
                assert session.reply.pod.startswith(f"{tenant}/")
                assert session.ask(f"turn {turn}") == f"{session.reply.pod} turn {turn}"
        while sessions:
            sessions.pop(next(iter(sessions))).close()
            for session in sessions.values():
                assert session.ask("still") == f"{session.reply.pod} still"


@families
@protocols
def test_same_five_tuple_again_at_once_after_another_tenants(shared: Site, protocol: str, family: int) -> None:
    """What conntrack remembers of one tenant's connection does not answer for the next tenant's."""
    for turn in range(2):
        for tenant in OVERLAYS:
            outcome = REQUESTS[protocol](shared.pods[f"{tenant}/client-one"], VIP[family], 80, source_port=40100)
            assert str(who(outcome)).startswith(f"{tenant}/web-"), (turn, tenant, outcome)


@families
def test_own_tenants_endpoint_changes_do_not_disturb_others(shared: Site, family: int) -> None:
    """While one tenant's endpoints go and come, others with the same addresses keep every connection and lose no
    request; their elements are not written.
    """
    acme, globex = shared.pods["acme/client-one"], shared.pods["globex/client-one"]
    with (
        shared.session("globex", address=VIP[family], source_port=40200) as globex_held,
        shared.session("red", address=VIP[family], source_port=40200) as red_held,
        Traffic(globex, VIP[family]) as traffic,
    ):
        shared.publish("acme", Web(pods=()))
        assert who(tcp_request(acme, VIP[family], 80)) == Refused()
        assert globex_held.ask("a") == f"{globex_held.reply.pod} a"
        shared.publish("acme", Web(pods=("web-3",)))
        assert shared.answered("acme", "client-one", "tcp", VIP[family]) == {"acme/web-3"}
        traffic.more()
        shared.publish("acme", WEB)
        assert globex_held.ask("b") == f"{globex_held.reply.pod} b"
        assert red_held.ask("c") == f"{red_held.reply.pod} c"
    assert set(traffic.outcomes) == {"globex/web-1", "globex/web-2"}


@families
@protocols
def test_flat_tenants_with_the_same_cluster_ip(shared: Site, protocol: str, family: int) -> None:
    """Different endpoints behind one ClusterIP on one network: the client's address decides."""
    shared.publish("red", Web(pods=("web-1",)))
    shared.publish("blue", Web(pods=("web-3",)))
    try:
        for client in ("client-one", "client-two"):
            assert shared.answered("red", client, protocol, VIP[family]) == {"red/web-1"}
            assert shared.answered("blue", client, protocol, VIP[family]) == {"blue/web-3"}
    finally:
        shared.publish("red", WEB)
        shared.publish("blue", WEB)


@families
def test_flat_connections_from_one_source_port_to_the_same_cluster_ip(shared: Site, family: int) -> None:
    with (
        shared.session("red", address=VIP[family], source_port=40300) as red,
        shared.session("blue", address=VIP[family], source_port=40300) as blue,
    ):
        for word in ("one", "two"):
            assert red.ask(word) == f"{red.reply.pod} {word}"
            assert blue.ask(word) == f"{blue.reply.pod} {word}"
        assert red.reply.pod.startswith("red/")
        assert blue.reply.pod.startswith("blue/")
