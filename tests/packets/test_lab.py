"""The lab itself, with real packets: what the other packet tests and the demo take for granted.

The Service proxy here is a few lines of nft written by hand. They show that the lab's networks carry what a Service
needs (translation at the client's node, answers through the same node, zones that keep equal five-tuples apart), so
that a failing test of the real backend is the backend's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vcproxy.lab import (
    Broken,
    Client,
    DialFailed,
    Lab,
    LabError,
    LabUnavailable,
    Node,
    Outcome,
    Pod,
    Refused,
    Reply,
    TcpSession,
    TimedOut,
    Unreachable,
    netns,
    require_root,
    sctp_request,
    tcp_request,
    udp_request,
)

pytestmark = pytest.mark.packets

PREFIX = "vcp-test-lab"
VIP = {4: "10.32.0.10", 6: "fd00:32::10"}
EMPTY_VIP = {4: "10.32.0.11", 6: "fd00:32::11"}  # a Service without endpoints
MASQUERADED_VIP = {4: "10.32.0.12", 6: "fd00:32::12"}
REQUESTS: dict[str, Callable[..., Outcome]] = {"tcp": tcp_request, "udp": udp_request}

ZONES = {"acme": 1, "globex": 2}
OVERLAY = {  # the same in both tenants
    "client": ("10.244.0.1", "fd00:244::1"),
    "near": ("10.244.0.2", "fd00:244::2"),
    "far": ("10.244.0.3", "fd00:244::3"),
}
ENDPOINTS = {  # of the ports of VIP: what is near for one tenant is far for the other; and the client itself
    "acme": {80: "near", 81: "far", 82: "client"},
    "globex": {80: "far", 81: "near", 82: "client"},
}

families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])
tenants = pytest.mark.parametrize("tenant", ["acme", "globex"])


@dataclass(frozen=True)
class Site:
    lab: Lab
    one: Node
    two: Node
    pods: dict[str, Pod]
    outside: Client


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Two nodes; in each of two tenants, with the same addresses: a client and an endpoint on `one`, an endpoint on
    `two`.
    """
    with Lab(PREFIX) as lab:
        one, two = lab.node("one"), lab.node("two")
        pods = []
        for name, vni in (("acme", 100), ("globex", 200)):
            tenant = lab.overlay_tenant(name, vni)
            pods += [one.overlay_pod(tenant, pod, *OVERLAY[pod]) for pod in ("client", "near")]
            pods.append(two.overlay_pod(tenant, "far", *OVERLAY["far"]))
            if name == "globex":
                pods.append(two.overlay_pod(tenant, "alone", "10.244.0.9", "fd00:244::9"))
        pods += [
            one.flat_pod("flat/client", "10.200.1.1", "fd00:200:0:1::1"),
            one.flat_pod("flat/near", "10.200.1.2", "fd00:200:0:1::2"),
            two.flat_pod("flat/far", "10.200.2.3", "fd00:200:0:2::3"),
        ]
        outside = lab.client("outside", "192.168.77.200", "fd77::200")
        for pod in pods:
            lab.serve(pod, tcp=[8080], udp=[8080])
        one.run(["nft", "-f", "-"], stdin=service_proxy())
        two.run(["nft", "-f", "-"], stdin=zones())
        yield Site(lab, one, two, {pod.name: pod for pod in pods}, outside)


def zones() -> str:
    """nft: every packet of a tenant in the tenant's zone, in both directions."""
    lines = ["add table inet test"]
    for hook, device in (("prerouting", "iifname"), ("output", "oifname")):
        lines.append(f"add chain inet test raw_{hook} {{ type filter hook {hook} priority raw; }}")
        for tenant, zone in ZONES.items():
            lines += [
                f'add rule inet test raw_{hook} {device} "{glob}-{tenant}{star}" ct zone set {zone}'
                for glob, star in (("vp", "-*"), ("vx", ""))
            ]
    return "\n".join(lines) + "\n"


def service_proxy() -> str:
    """nft: the Services of ENDPOINTS under VIP and MASQUERADED_VIP, one that refuses, and flat node ports: 30080 as
    externalTrafficPolicy Local has it, 30081 as Cluster has it.
    """
    lines = [
        "add chain inet test nat { type nat hook prerouting priority dstnat; }",
        "add chain inet test post { type nat hook postrouting priority srcnat; }",
        "add rule inet test post meta l4proto tcp ct original proto-dst 30081 masquerade",
        "add rule inet test nat ip daddr 203.0.113.7 tcp dport 80 dnat ip to 10.200.1.2:8080",
    ]
    for family, ip in ((4, "ip"), (6, "ip6")):
        nat = f"add rule inet test nat {ip} daddr"
        one, near, far = (
            ("192.168.77.11", "10.200.1.2:8080", "10.200.2.3:8080"),
            ("fd77::11", "[fd00:200:0:1::2]:8080", "[fd00:200:0:2::3]:8080"),
        )[family == 6]
        lines += [
            f"add rule inet test post ct original {ip} daddr {MASQUERADED_VIP[family]} masquerade",
            f"{nat} {EMPTY_VIP[family]} reject",
            f"{nat} {one} tcp dport 30080 dnat {ip} to {near}",
            f"{nat} {one} tcp dport 30081 dnat {ip} to {far}",
        ]
        for tenant, ports in ENDPOINTS.items():
            for port, endpoint in ports.items():
                target = ("{}:8080", "[{}]:8080")[family == 6].format(OVERLAY[endpoint][family == 6])
                lines += [
                    f"{nat} {vip[family]} {protocol} dport {port} ct zone {ZONES[tenant]} dnat {ip} to {target}"
                    for vip in (VIP, MASQUERADED_VIP)
                    for protocol in REQUESTS
                ]
    return zones() + "\n".join(lines) + "\n"


def address(place: Pod | Node | Client, family: int) -> str:
    return place.ip4 if family == 4 else place.ip6


def answered_by(outcome: Outcome) -> str | Outcome:
    """The pod that answered, or what happened instead: one value that a failing test shows whole."""
    return outcome.pod if isinstance(outcome, Reply) else outcome


@families
@protocols
@pytest.mark.parametrize("network", ["flat", "acme", "globex"])
@pytest.mark.parametrize("where", ["near", "far"])
def test_pod_reaches_pod(site: Site, network: str, where: str, protocol: str, family: int) -> None:
    client, server = site.pods[f"{network}/client"], site.pods[f"{network}/{where}"]
    outcome = REQUESTS[protocol](client, address(server, family), 8080)
    assert answered_by(outcome) == server.name
    assert isinstance(outcome, Reply)
    assert outcome.peer == outcome.source
    assert outcome.peer[0] == address(client, family)
    assert outcome.local == (address(server, family), 8080)


@families
@protocols
def test_tenant_does_not_reach_another_networks_pods(site: Site, protocol: str, family: int) -> None:
    """On the same node; and it is told so, which shows that its packets did not even leave by the main table."""
    client = site.pods["acme/far"]
    # No more targets: "no route" is answered five times in a row to one source (ip_error in net/ipv4/route.c).
    for pod in (site.pods["globex/alone"], site.pods["flat/far"]):
        outcome = REQUESTS[protocol](client, address(pod, family), 8080)
        assert isinstance(outcome, Unreachable), (pod.name, outcome)


@families
@protocols
@tenants
@pytest.mark.parametrize("port", [80, 81])
def test_same_cluster_ip_and_same_pod_ips_in_two_tenants(
    site: Site, tenant: str, port: int, protocol: str, family: int
) -> None:
    endpoint = site.pods[f"{tenant}/{ENDPOINTS[tenant][port]}"]
    outcome = REQUESTS[protocol](site.pods[f"{tenant}/client"], VIP[family], port)
    assert answered_by(outcome) == endpoint.name
    assert isinstance(outcome, Reply)
    assert outcome.local == (address(endpoint, family), 8080)
    assert outcome.peer == outcome.source


@families
def test_two_tenants_hold_the_same_five_tuple_at_the_same_time(site: Site, family: int) -> None:
    def session(tenant: str) -> TcpSession:
        return TcpSession(site.pods[f"{tenant}/client"], VIP[family], 80, source_port=40000)

    with session("acme") as acme, session("globex") as globex:
        assert acme.reply.source == globex.reply.source
        assert (acme.reply.pod, globex.reply.pod) == ("acme/near", "globex/far")
        for word in ("one", "two"):
            assert acme.ask(word) == f"acme/near {word}"
            assert globex.ask(word) == f"globex/far {word}"


@families
@protocols
@tenants
def test_service_without_endpoints_is_refused_every_time(site: Site, tenant: str, protocol: str, family: int) -> None:
    """The node's ICMP errors find the tenant's pod among pods of the same address, and are not rationed."""
    client = site.pods[f"{tenant}/client"]
    assert [REQUESTS[protocol](client, EMPTY_VIP[family], 80) for _ in range(10)] == [Refused()] * 10


@families
@protocols
@tenants
@pytest.mark.parametrize("port", [80, 81, 82])
def test_masqueraded_connection_comes_back(site: Site, port: int, tenant: str, protocol: str, family: int) -> None:
    """Between nodes too: the answer to a node's address stays in the tenant's network, where its zone is. And from a
    pod to itself (hairpin).
    """
    outcome = REQUESTS[protocol](site.pods[f"{tenant}/client"], MASQUERADED_VIP[family], port)
    assert answered_by(outcome) == f"{tenant}/{ENDPOINTS[tenant][port]}"
    assert isinstance(outcome, Reply)
    assert outcome.peer[0] == address(site.one, family)


@families
@tenants
def test_probe_from_the_host_into_a_tenants_device(site: Site, tenant: str, family: int) -> None:
    pod = site.pods[f"{tenant}/near"]
    outcome = tcp_request(site.one, address(pod, family), 8080, device=pod.device)
    assert answered_by(outcome) == pod.name
    assert isinstance(outcome, Reply)
    assert outcome.peer[0] == address(site.one, family)


@families
@tenants
def test_tenants_pod_and_the_nodes_own_sockets(site: Site, tenant: str, family: int) -> None:
    site.lab.serve(site.one, tcp=[10250])
    try:
        for client in (site.pods[f"{tenant}/client"], site.pods[f"{tenant}/far"]):
            assert answered_by(tcp_request(client, address(site.one, family), 10250)) == "one"
            assert tcp_request(client, address(site.one, family), 10251) == Refused()
    finally:
        site.lab.stop_serving(site.one)


@families
def test_node_port_from_outside(site: Site, family: int) -> None:
    near = tcp_request(site.outside, address(site.one, family), 30080)
    assert answered_by(near) == "flat/near"
    assert isinstance(near, Reply)
    assert near.peer[0] == address(site.outside, family)  # not masqueraded: externalTrafficPolicy Local
    far = tcp_request(site.outside, address(site.one, family), 30081)
    assert answered_by(far) == "flat/far"
    assert isinstance(far, Reply)
    assert far.peer[0] == address(site.one, family)


def test_external_ip_is_routed_to_a_node(site: Site) -> None:
    assert tcp_request(site.outside, "203.0.113.7", 80) == Unreachable("EHOSTUNREACH")
    site.lab.route(site.outside, "203.0.113.0/24", via=site.one)
    assert answered_by(tcp_request(site.outside, "203.0.113.7", 80)) == "flat/near"


@families
def test_flat_pods_and_the_outside(site: Site, family: int) -> None:
    site.lab.serve(site.outside, tcp=[443])
    for pod in (site.pods["flat/near"], site.pods["flat/far"]):
        assert answered_by(tcp_request(site.outside, address(pod, family), 8080)) == pod.name
        assert answered_by(tcp_request(pod, address(site.outside, family), 443)) == "outside"
    site.lab.stop_serving(site.outside)


def test_request_that_is_dropped_times_out(site: Site) -> None:
    site.two.run(
        ["nft", "-f", "-"],
        stdin="table inet deaf { chain c { type filter hook prerouting priority 0; th dport 9 drop; }; }\n",
    )
    client, far = site.pods["flat/client"], site.pods["flat/far"]
    assert tcp_request(client, far.ip4, 9, timeout=0.1) == TimedOut()
    assert udp_request(client, far.ip6, 9, timeout=0.1) == TimedOut()
    assert tcp_request(client, far.ip4, 10) == Refused()


def test_serving_stops_and_starts(site: Site) -> None:
    client, pod = site.pods["acme/client"], site.pods["acme/far"]
    with TcpSession(client, pod.ip4, 8080) as session:
        site.lab.stop_serving(pod)
        with pytest.raises(DialFailed) as failed:
            session.ask("still there?")
        assert failed.value.outcome == Broken()
    assert tcp_request(client, pod.ip6, 8080) == Refused()
    assert udp_request(client, pod.ip4, 8080) == Refused()
    site.lab.serve(pod, tcp=[8080], udp=[8080])
    assert answered_by(tcp_request(client, pod.ip6, 8080)) == pod.name
    assert answered_by(udp_request(client, pod.ip4, 8080)) == pod.name


def test_sctp_tells_who_answers_who_refuses_and_who_is_silent(site: Site) -> None:
    client, pod, far = (site.pods[f"acme/{name}"] for name in ("client", "near", "far"))
    site.lab.serve(pod, sctp=[9100])
    for source_port, address in ((41001, pod.ip4), (41002, pod.ip6)):
        found = sctp_request(client, address, 9100, source_port=source_port)
        assert isinstance(found, Reply)
        assert (found.pod, found.local) == (pod.name, (address, 9100))
        assert found.peer == found.source == (client.ip6 if ":" in address else client.ip4, source_port)
        assert sctp_request(client, address, 9101, timeout=0.2, source_port=source_port) == TimedOut()
    reject = "table inet r { chain in { type filter hook input priority 0; meta l4proto sctp reject; }; }"
    netns.run(far.ns, ["nft", reject])
    try:
        for source_port, address in ((41003, far.ip4), (41004, far.ip6)):
            assert sctp_request(client, address, 9100, source_port=source_port) == Refused()
    finally:
        netns.run(far.ns, ["nft", "delete table inet r"])


def test_source_port_is_free_again_at_once(site: Site) -> None:
    client = site.pods["acme/client"]
    for _ in range(3):
        outcome = tcp_request(client, VIP[4], 81, source_port=41000)
        assert answered_by(outcome) == "acme/far"
        assert isinstance(outcome, Reply)
        assert outcome.source == (client.ip4, 41000)


def test_port_that_is_taken(site: Site) -> None:
    with pytest.raises(LabError, match=r"tcp port 8080 of 10\.200\.1\.2 .*Address already in use"):
        site.lab.serve(site.pods["flat/near"], tcp=[8080])


def test_long_line_and_many_sessions(site: Site) -> None:
    """More than a socket buffer in one line; more sessions than the default limit of descriptors allows in one process
    of clients and servers.
    """
    client = site.pods["acme/client"]
    with TcpSession(client, VIP[4], 80, timeout=10) as session:
        assert session.ask("x" * 100_000) == "acme/near " + "x" * 100_000
    sessions = [TcpSession(client, VIP[family], 80) for family in (4, 6) for _ in range(100)]
    assert {session.ask("here") for session in sessions} == {"acme/near here"}
    for session in sessions:
        session.close()


def test_mistakes_name_the_object_and_the_address(site: Site) -> None:
    pod = site.pods["flat/near"]
    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: site.one.flat_pod("x", pod.ip4, "fd00:200:0:1::77"), r"pod x: 10\.200\.1\.2 .* of pod flat/near"),
        (
            lambda: site.two.flat_pod("x", "10.200.1.77", "fd00:200:0:2::77"),
            r"pod x: want addresses in node two's 10\.200\.2\.0/24",
        ),
        (lambda: site.lab.node("one"), "'one' is taken"),
        (lambda: site.lab.overlay_tenant("new", 100), "VNI 100 is taken"),
        (lambda: site.one.run(["nft", "-f", "-"], stdin="add nonsense\n"), "(?s)nft -f - ended with 1: .*nonsense"),
        (lambda: site.one.run(["sleep", "60"], timeout=0.05), "sleep 60 took more than 0.05 s"),
        (lambda: site.lab.route(site.outside, "203.0.113.0/33", via=site.one), r"`ip route replace 203\.0\.113\.0/33"),
    ]
    for mistake, message in mistakes:
        with pytest.raises(LabError, match=message):
            mistake()


def test_tenant_spreads_to_a_node_that_joins_later() -> None:
    """A node's first pod of a tenant is connected with all that is there, and a pod that comes later with every
    node.
    """
    with Lab(PREFIX) as lab:
        tenant = lab.overlay_tenant("late", 300)
        pods = []
        for number in (1, 2, 3, 4):
            node = lab.node(f"n{number}")
            pods.append(node.overlay_pod(tenant, f"p{number}", f"10.244.0.{number}", f"fd00:244::{number}"))
            lab.serve(pods[-1], tcp=[80])
        for client in pods:
            for family in (4, 6):
                assert [answered_by(tcp_request(client, address(pod, family), 80)) for pod in pods] == [
                    pod.name for pod in pods
                ]


def test_sockets_and_processes_belong_where_they_were_made(site: Site) -> None:
    here = Path("/proc/thread-self/ns/net").readlink()
    there = Path(site.one.run(["readlink", "/proc/self/ns/net"]).stdout.strip())
    assert there != here
    with netns.entered(site.one.ns):
        assert Path("/proc/thread-self/ns/net").readlink() == there
        with pytest.raises(LabError, match="does not exist"), netns.entered("vcp-test-lab-nowhere"):
            pass
        assert Path("/proc/thread-self/ns/net").readlink() == there
    assert Path("/proc/thread-self/ns/net").readlink() == here
    with netns.socket_in(site.one.ns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((site.one.ip4, 0))  # an address that only the node has


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(error: type[BaseException]) -> None:
    before = machine()
    with pytest.raises(error), Lab(PREFIX) as lab:
        node = lab.node("one")
        pod = node.overlay_pod(lab.overlay_tenant("acme", 100), "web", "10.244.0.1", "fd00:244::1")
        lab.serve(pod, tcp=[80])
        stubborn = node.spawn(["sh", "-c", "trap '' TERM; read forever < /dev/zero"])
        process = node.spawn(["sleep", "600"])
        assert process.pid in netns.pids(node.ns)
        assert machine() == before
        lab_namespaces = [name for name in netns.names() if name.startswith(node.ns.removesuffix("one"))]
        assert len(lab_namespaces) == 3
        stubborn.kill()
        raise error
    assert process.returncode == -signal.SIGTERM
    assert not set(lab_namespaces) & set(netns.names())
    assert machine() == before


def machine() -> dict[str, str]:
    """What a lab must not touch: the devices, policy and forwarding of the machine's own network; and the processes it
    would leave.
    """
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    rules = subprocess.run(["ip", "rule"], capture_output=True, text=True, check=True).stdout
    forwarding = (
        Path("/proc/sys/net/ipv4/ip_forward").read_text() + Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text()
    )
    return {"links": links, "rules": rules, "forwarding": forwarding}


def test_server_process_ends_with_the_lab() -> None:
    with Lab(PREFIX) as lab:
        before = children()
        lab.serve(lab.node("one"), tcp=[80])
        assert len(children() - before) == 1
    assert children() == before


def children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


KILLED_MAKER = """
import os, signal, subprocess
from vcproxy.lab import Lab
lab = Lab("{prefix}").__enter__()
node = lab.node("one")
nowhere = subprocess.DEVNULL
lab.serve(node, tcp=[80])
print(node.ns, node.spawn(["sleep", "600"], stdout=nowhere, stderr=nowhere).pid, lab._servers._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sweep_removes_what_a_killed_maker_left_and_nothing_of_the_living() -> None:
    prefix = f"vcp-sweep-{os.getpid()}"
    argv = [sys.executable, "-c", KILLED_MAKER.format(prefix=prefix)]
    with Lab(prefix) as alive:
        node = alive.node("one")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[2])
        assert done.returncode == -signal.SIGKILL, done.stderr
        ns, *pids = done.stdout.split()
        assert ns in netns.names()
        assert sorted(Lab.sweep(prefix)) == sorted([ns, ns.removesuffix("one") + "fabric"])
        assert ns not in netns.names()
        assert node.run(["true"]).returncode == 0
        assert Lab.sweep(prefix) == []
        deadline = time.monotonic() + 10
        while any(running(int(pid)) for pid in pids):
            assert time.monotonic() < deadline, "the killed maker's processes still run"
            time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_machine_that_cannot_hold_a_lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_root()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabUnavailable, match="`ip` is not installed; install the package iproute2"):
        require_root()
