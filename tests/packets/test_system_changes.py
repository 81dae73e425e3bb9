"""Services and endpoints change: the kernel follows, and only elements of what changed are written."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.packets.system import REQUESTS, VIP, Site, Web, eventually, site, who
from vcproxy.lab import Refused, Reply, netns, tcp_request, udp_request

pytestmark = pytest.mark.packets

WEB = Web(pods=("web-1", "web-2"))
OTHER = Web(name="other", ips=("10.96.0.11", "fd00:96::11"), pods=("web-1", "web-2", "web-3"))
POOL = 0xFFFFF  # the part of a frontend's value that is the pool's number; above it is the pool's size
THIRD = ("10.96.0.12", "fd00:96::12")

families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])


@pytest.fixture(scope="module")
def running() -> Iterator[Site]:
    with site(("acme", "globex"), webs=[WEB, OTHER]) as made:
        yield made


@pytest.fixture(autouse=True)
def as_before(running: Site) -> Iterator[None]:
    yield
    running.publish("acme", WEB, OTHER)


def everywhere(site: Site, port: int = 80, *, times: int = 20) -> set[object]:
    """Who answers acme's clients under WEB's addresses."""
    return {
        found
        for client in ("client-one", "client-two")
        for protocol in REQUESTS
        for address in VIP.values()
        for found in site.answered("acme", client, protocol, address, port, times=times)
    }


@pytest.mark.parametrize(
    "pods", [("web-1", "web-2", "web-3"), ("web-2",), ("web-1", "web-3"), ("web-3",)], ids=["added", "removed", "replaced", "all replaced"]
)  # fmt: skip
def test_endpoints_change(running: Site, pods: tuple[str, ...]) -> None:
    with running.watched("one") as lines:
        running.publish("acme", Web(pods=pods), OTHER)
    assert everywhere(running) == {f"acme/{name}" for name in pods}
    assert lines
    assert_only_pools_of(running, "acme", VIP, lines)


def test_endpoint_replaced_while_another_service_has_a_connection(running: Site) -> None:
    """To the same endpoint even: it goes from `web`, and stays in `other`."""
    with running.session("acme", address=OTHER.ips[0]) as held:
        gone = held.reply.pod.removeprefix("acme/")
        running.publish("acme", Web(pods=[name for name in WEB.pods if name != gone] or ["web-3"]), OTHER)
        assert held.ask("still") == f"acme/{gone} still"


@families
def test_service_created_and_deleted(running: Site, family: int) -> None:
    new = Web(name="new", ips=THIRD, pods=("web-2",))
    client, vip = running.pods["acme/client-one"], THIRD[family == 6]
    with running.watched("one") as lines:
        running.publish("acme", WEB, OTHER, new)
        assert {who(request(client, vip, 80)) for request in REQUESTS.values()} == {"acme/web-2"}
        running.publish("acme", WEB, OTHER)
    told = "\n".join(lines)
    assert THIRD[0] in told
    for address in (*VIP.values(), *OTHER.ips):
        assert f"{address} " not in told
    for name in ("virtual_ips4", "tcp4_frontends", "udp4_frontends"):
        assert THIRD[0] not in json.dumps(running.elements("one", "set" if name.startswith("v") else "map", name))


def test_ports_change(running: Site) -> None:
    """The port dialled, then the port it leads to; the old one is refused."""
    moved = Web(pods=WEB.pods, ports=(("http", "TCP", 81, 8080), ("ask", "UDP", 81, 8080)))
    running.publish("acme", moved, OTHER)
    assert everywhere(running, 81) == {"acme/web-1", "acme/web-2"}
    assert everywhere(running, 80, times=3) == {Refused()}
    retargeted = Web(pods=WEB.pods, ports=(("http", "TCP", 81, 8081), ("ask", "UDP", 81, 8081)))
    running.publish("acme", retargeted, OTHER)
    for request in REQUESTS.values():
        outcome = request(running.pods["acme/client-one"], VIP[4], 81)
        assert isinstance(outcome, Reply)
        assert outcome.local[1] == 8081


@families
@protocols
def test_service_without_endpoints_and_port_that_is_not_served_are_refused(
    running: Site, protocol: str, family: int
) -> None:
    running.publish("acme", Web(), OTHER)
    assert running.answered("acme", "client-one", protocol, VIP[family], times=5) == {Refused()}
    assert running.answered("acme", "client-two", protocol, OTHER.ips[family == 6], 9999, times=5) == {Refused()}
    assert running.answered("globex", "client-one", protocol, VIP[family]) == {"globex/web-1", "globex/web-2"}


@families
@protocols
def test_client_ip_affinity(running: Site, protocol: str, family: int) -> None:
    """A client stays with its endpoint, also when another is added; and is served when its endpoint goes."""
    sticky = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 300}}}
    running.publish("acme", Web(pods=WEB.pods, spec=sticky), OTHER)
    zone = running.zone("one", "acme")
    assert zone
    running.forget_flows("one", zone)
    answered = running.answered("acme", "client-one", protocol, VIP[family])
    assert len(answered) == 1
    running.publish("acme", Web(pods=(*WEB.pods, "web-3"), spec=sticky), OTHER)
    assert running.answered("acme", "client-one", protocol, VIP[family]) == answered
    rest = [name for name in (*WEB.pods, "web-3") if f"acme/{name}" not in answered]
    running.publish("acme", Web(pods=rest, spec=sticky), OTHER)
    moved = running.answered("acme", "client-one", protocol, VIP[family])
    assert len(moved) == 1
    assert moved <= {f"acme/{name}" for name in rest}
    listed = running.nodes["one"].run(["nft", "list", "map", "inet", "vcproxy", f"affinity{family}"])
    assert "expires" in listed.stdout


@families
@protocols
def test_pod_reaches_itself_through_its_service(running: Site, protocol: str, family: int) -> None:
    """Hairpin: masqueraded, or the pod would answer itself past the translation. Others are not masqueraded."""
    running.publish("acme", Web(pods=("web-1",)), OTHER)
    assert running.answered("acme", "web-1", protocol, VIP[family]) == {"acme/web-1"}
    client = running.pods["acme/client-one"]
    outcome = REQUESTS[protocol](client, VIP[family], 80)
    assert isinstance(outcome, Reply)
    assert outcome.peer[0] == (client.ip4 if family == 4 else client.ip6)


@families
def test_udp_flow_moves_when_its_endpoint_goes(running: Site, family: int) -> None:
    """One socket, one source port: without deleted conntrack entries it would be sent to the old endpoint for ever."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    running.publish("acme", Web(pods=("web-2",)), OTHER)
    with netns.socket_in(running.pods["acme/client-one"].ns, kind, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.connect((VIP[family], 80))
        assert ask(sock) == "acme/web-2"
        running.publish("acme", Web(pods=("web-3",)), OTHER)
        assert eventually(lambda: ask(sock) == "acme/web-3", timeout=3)
        assert {ask(sock) for _ in range(5)} == {"acme/web-3"}


@families
def test_tcp_connection_outlives_its_endpoint(running: Site, family: int) -> None:
    """A pod that terminates finishes what it serves, as with kube-proxy."""
    with running.session("acme", address=VIP[family]) as held:
        running.publish("acme", Web(pods=("web-3",)), OTHER)
        assert held.ask("bye") == f"{held.reply.pod} bye"
        assert who(tcp_request(running.pods["acme/client-one"], VIP[family], 80)) == "acme/web-3"


@pytest.mark.parametrize("options", [(), ("-j",)], ids=["text", "json"])
@pytest.mark.parametrize("node", ["one", "two"])
def test_populated_table_can_be_listed(running: Site, node: str, options: tuple[str, ...]) -> None:
    """By the distribution's nft, which has crashed on less."""
    client = running.pods[f"acme/client-{node}"]
    assert isinstance(udp_request(client, VIP[4], 80), Reply)
    listed = running.nft(node, *options, "list", "table", "inet", "vcproxy")
    assert VIP[4] in listed
    assert VIP[6] in listed


def ask(sock: socket.socket) -> str:
    sock.send(b"who?")
    return str(json.loads(sock.recv(65536))["pod"])


def assert_only_pools_of(site: Site, tenant: str, vips: dict[int, str], lines: list[str]) -> None:
    """No element told of is a frontend of another address, or in a pool that another frontend leads to."""
    zone = site.zone("one", tenant)
    theirs = {
        (family, value & POOL)
        for family, vip in vips.items()
        for protocol in REQUESTS
        for (of, address, _), value in frontends(site, f"{protocol}{family}_frontends")
        if (of, address) != (zone, vip)
    }
    assert len(theirs) >= 8  # OTHER, and all of globex
    for line in lines:
        assert not [other for other in OTHER.ips if f"{other} " in line], line
        for family in vips:
            if f" endpoints{family} " in line:
                assert (family, priority(line.partition("{")[2].split()[0]) & POOL) not in theirs, line


def frontends(site: Site, name: str) -> list[tuple[tuple[int, str, int], int]]:
    """Zone, address and port; and the pool value."""
    return [
        ((key["concat"][0], key["concat"][1], key["concat"][2]), priority(value))
        for key, value in site.elements("one", "map", name)
    ]


def priority(value: object) -> int:
    """`meta priority` as nft writes it: a number, or "major:minor" in hex as tc(8) does."""
    if isinstance(value, int):
        return value
    if value == "none":
        return 0
    major, _, minor = str(value).partition(":")
    return (int(major or "0", 16) << 16) + int(minor or "0", 16)
