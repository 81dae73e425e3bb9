"""Other people's tables beside ours: a firewall that drops, a container engine that translates, a network that marks.

The tables are those of their makers in shape: firewalld's filter chains (everything that is not known is rejected, what
is translated is let through), Docker's `ip nat` (at our own priorities, so that who registered first comes first), and
a network policy in Calico's way (accept by mark, masquerade what leaves the pod network). Each is loaded before and
after our table, since hooks of one priority run in the order of their registration. Services work as if they were
alone, what the others do works too, and not one rule of theirs is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.packets.programmed import Programmed, answered_by, cluster_ip, frontend, programmed, service
from vcproxy.lab import Client, Lab, Node, Outcome, Pod, Refused, Reply, Unreachable, tcp_request, udp_request
from vcproxy.model.forwarding import Action, Masquerade
from vcproxy.model.services import FrontendKind, Protocol

pytestmark = pytest.mark.packets

VIP = {4: "10.97.0.10", 6: "fd00:97::10"}
EMPTY = {4: "10.97.0.20", 6: "fd00:97::20"}
NODE_PORT, LOCAL_NODE_PORT, PUBLISHED = 30080, 30081, 8081

families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])

FIREWALLD = """
table inet firewalld {
  chain filter_INPUT {
    type filter hook input priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    meta l4proto ipv6-icmp accept
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    reject with icmpx admin-prohibited
  }
  chain filter_OUTPUT {
    type filter hook output priority filter + 10; policy accept;
    ct state { established, related } accept
    oifname "lo" accept
  }
}
"""

DOCKER = """
table ip nat {
  chain DOCKER {
    iifname "docker0" return
    tcp dport %(published)d dnat to %(target)s
  }
  chain PREROUTING {
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local jump DOCKER
  }
  chain OUTPUT {
    type nat hook output priority -100; policy accept;
    ip daddr != 127.0.0.0/8 fib daddr type local jump DOCKER
  }
  chain POSTROUTING {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 172.17.0.0/16 oifname != "docker0" masquerade
  }
}
table ip filter {
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    jump DOCKER-USER
    ct state { established, related } accept
    ip daddr 10.200.0.0/16 accept
    ip saddr 10.200.0.0/16 accept
  }
  chain DOCKER-USER {
    return
  }
}
"""

CALICO = """
table inet calico {
  chain mangle_prerouting {
    type filter hook prerouting priority mangle; policy accept;
    ct state { established, related } accept
    meta mark set meta mark & 0xfff0ffff
    iifname "veth*" meta mark set meta mark | 0x00010000
    iifname != "veth*" meta mark set meta mark | 0x00020000
    ct mark set meta mark
  }
  chain filter_forward {
    type filter hook forward priority filter - 5; policy accept;
    ct state { established, related } accept
    meta mark & 0x00030000 == 0 drop
    ct mark & 0x00030000 == 0 drop
  }
  chain nat_postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 10.200.0.0/16 ip daddr != 10.200.0.0/16 masquerade
    ip6 saddr fd00:200::/32 ip6 daddr != fd00:200::/32 masquerade
  }
}
"""


@dataclass(frozen=True)
class World:
    node: Node
    client: Pod
    near: Pod
    far: Pod
    outside: Client


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab("vcp-foreign") as lab:
        one, two = lab.node("one"), lab.node("two")
        found = World(
            one,
            one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2"),
            one.flat_pod("near", "10.200.1.3", "fd00:200:0:1::3"),
            two.flat_pod("far", "10.200.2.2", "fd00:200:0:2::2"),
            lab.client("outside", "192.168.77.200", "fd77::200"),
        )
        for pod in (found.near, found.far):
            lab.serve(pod, tcp=[80], udp=[80])
        yield found


TABLES = {
    "firewalld": (FIREWALLD, ["inet firewalld"]),
    "docker": (DOCKER, ["ip nat", "ip filter"]),
    "calico": (CALICO, ["inet calico"]),
}


@pytest.fixture(params=[(name, first) for name in TABLES for first in (True, False)], ids=lambda param: f"{param[0]}, {'loaded first' if param[1] else 'loaded last'}")  # fmt: skip
def beside(world: World, request: pytest.FixtureRequest) -> Iterator[str]:
    """A foreign table, and ours with Services; what it is called."""
    name, first = request.param
    text, tables = TABLES[name]
    if name == "docker":
        text = text % {"published": PUBLISHED, "target": f"{world.near.ip4}:80"}

    def load() -> None:
        world.node.run(["nft", "-f", "-"], stdin=text)

    if first:
        load()
    with programmed(world.node) as (backend,):
        fill(world, backend)
        if not first:
            load()
        before = [world.node.run(["nft", "-s", "list", "table", *table.split()]).stdout for table in tables]
        yield name
        backend.put("super", complete=True)
        fill(world, backend)
        backend.repair()
        after = [world.node.run(["nft", "-s", "list", "table", *table.split()]).stdout for table in tables]
        assert after == before
    for table in tables:
        world.node.run(["nft", "delete", "table", *table.split()])
    world.node.run(["conntrack", "-F"])


def fill(world: World, backend: Programmed) -> None:
    """A Service as ClusterIP and NodePort, one of policy Local, and one without endpoints."""
    pods = [world.near, world.far]
    public = [
        *cluster_ip(*VIP.values()),
        *(frontend(FrontendKind.NODE_PORT, family, NODE_PORT) for family in (4, 6)),
        *(
            frontend(FrontendKind.NODE_PORT, family, LOCAL_NODE_PORT, outside=Action.LOCAL, masquerade=Masquerade.HOST)
            for family in (4, 6)
        ),
    ]
    backend.put(
        "super",
        service(public, pods, local=[world.near], own=[world.near]),
        service(public, pods, local=[world.near], own=[world.near], name="ask", protocol=Protocol.UDP),
        service(cluster_ip(*EMPTY.values(), inside=Action.REJECT), name="empty"),
        complete=True,
    )


def ip(place: Pod | Node | Client, family: int) -> str:
    return place.ip4 if family == 4 else place.ip6


@families
def test_services_work_as_if_alone(world: World, beside: str, family: int) -> None:
    node = ip(world.node, family)
    for place in (world.client, world.node):
        for request in (tcp_request, udp_request):
            assert answered_by(lambda p=place, r=request: r(p, VIP[family], 80), 20) == {"near", "far"}
    for request in (tcp_request, udp_request):
        assert answered_by(lambda r=request: r(world.outside, node, NODE_PORT), 20) == {"near", "far"}
        assert answered_by(lambda r=request: r(world.outside, node, LOCAL_NODE_PORT), 8) == {"near"}
        assert answered_by(lambda r=request: r(world.node, node, NODE_PORT), 20) == {"near", "far"}
    assert tcp_request(world.client, EMPTY[family], 80) == Refused()


@families
def test_sources_are_as_if_alone(world: World, beside: str, family: int) -> None:
    assert seen(tcp_request(world.client, VIP[family], 80)) == ip(world.client, family)
    assert seen(tcp_request(world.outside, ip(world.node, family), LOCAL_NODE_PORT)) == ip(world.outside, family)
    assert seen(tcp_request(world.outside, ip(world.node, family), NODE_PORT)) != ip(world.outside, family)


@families
def test_a_pod_reaches_itself_through_its_service(world: World, beside: str, family: int) -> None:
    assert "near" in answered_by(lambda: tcp_request(world.near, VIP[family], 80), 20)


def test_what_the_others_do_works_too(world: World, beside: str) -> None:
    match beside:
        case "firewalld":  # lets through what is translated, and nothing else
            outcome = tcp_request(world.client, world.far.ip4, 80)
            assert isinstance(outcome, Unreachable), outcome
        case "docker":
            assert answered_by(lambda: tcp_request(world.outside, world.node.ip4, PUBLISHED), 5) == {"near"}
            assert answered_by(lambda: tcp_request(world.node, world.node.ip4, PUBLISHED), 5) == {"near"}
        case "calico":  # masquerades what leaves the pod network, and only that
            assert seen(tcp_request(world.client, world.far.ip4, 80)) == world.client.ip4


def seen(outcome: Outcome) -> str:
    """The client's address as the server saw it."""
    assert isinstance(outcome, Reply), outcome
    return outcome.peer[0]
