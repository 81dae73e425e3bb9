"""Who is local, by each of kube-proxy's detectors: masquerade to ClusterIPs, and the short cut of Local policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.packets.programmed import Programmed, answered_by, cluster_ip, frontend, programmed, service
from vcproxy.lab import Client, Lab, Node, Outcome, Place, Pod, Reply, tcp_request
from vcproxy.lab.iproute import ip as iproute
from vcproxy.lab.wiring import GATEWAY_MAC, POD_GATEWAY4, POD_GATEWAY6
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.forwarding import Action, Masquerade
from vcproxy.model.services import FrontendKind

pytestmark = pytest.mark.packets

VIP = {4: "10.97.0.10", 6: "fd00:97::10"}
NEAR_VIP = {4: "10.97.0.11", 6: "fd00:97::11"}
LB = {4: "198.51.100.10", 6: "2001:db8:100::10"}
families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])

BRIDGE = "cbr0"
PREFIXES = tuple(map(parse_prefix, ("10.200.1.0/24", "fd00:200:0:1::/64")))


@dataclass(frozen=True)
class World:
    lab: Lab
    node: Node
    client: Pod
    near: Pod
    far: Pod
    outside: Client
    backend: Programmed

    def detect(self, **how: object) -> None:
        """Give the backend a detector, and nothing of the one before."""
        self.backend.set_node(node_addresses=(parse_address(self.node.ip4), parse_address(self.node.ip6)), **how)


def _bridged(node: Node, pods: list[Pod]) -> None:
    """Put pods on one bridge of the node, as kubenet and the bridge plugin do. Each gets a MAC of its own."""
    lines = [
        f"link add {BRIDGE} address {GATEWAY_MAC} type bridge",
        f"link set {BRIDGE} addrgenmode none",
        f"link set {BRIDGE} up",
    ]
    for number, pod in enumerate(pods, 16):
        mac = f"02:00:00:00:00:{number:02x}"
        # The kernel forgets a device's neighbours with its address (neigh_changeaddr).
        gateways = [
            f"neighbour add {via} lladdr {GATEWAY_MAC} dev eth0 nud permanent" for via in (POD_GATEWAY4, POD_GATEWAY6)
        ]
        iproute([f"link set eth0 address {mac}", *gateways], ns=pod.ns)
        lines.append(f"link set {pod.device} address 02:00:00:00:01:{number:02x} master {BRIDGE}")
        for address in (pod.ip4, pod.ip6):
            lines.append(f"route replace {address} dev {BRIDGE}")
            lines.append(f"neighbour replace {address} lladdr {mac} dev {BRIDGE} nud permanent")
    iproute(lines, ns=node.ns)


@pytest.fixture(scope="module", params=["routed", "bridged"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with Lab("vcp-local") as lab:
        one, two = lab.node("one"), lab.node("two")
        client = one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2")
        near = one.flat_pod("near", "10.200.1.3", "fd00:200:0:1::3")
        far = two.flat_pod("far", "10.200.2.2", "fd00:200:0:2::2")
        outside = lab.client("outside", "192.168.77.200", "fd77::200")
        for prefix in ("198.51.100.0/24", "10.97.0.0/16", "2001:db8:100::/64", "fd00:97::/64"):
            lab.route(outside, prefix, via=one)
            lab.route(one, prefix, via=outside)
        if request.param == "bridged":
            _bridged(one, [client, near])
        for pod in (near, far):
            lab.serve(pod, tcp=[80])
        with programmed(one) as (backend,):
            backend.put(
                "super",
                service(cluster_ip(*VIP.values()), [far], name="far"),
                service(cluster_ip(*NEAR_VIP.values()), [near], name="near", own=[near]),
                service(
                    [
                        frontend(
                            FrontendKind.LOAD_BALANCER, address, 80, outside=Action.LOCAL, masquerade=Masquerade.HOST
                        )
                        for address in LB.values()
                    ],
                    [near, far],
                    local=[near],
                    name="local-policy",
                ),
                complete=True,
            )  # fmt: skip
            yield World(lab, one, client, near, far, outside, backend)


def _device(world: World) -> str:
    """What the node sees the client's packets enter by."""
    bridged = world.node.run(["ip", "-o", "link", "show", "master", BRIDGE], check=False)
    return BRIDGE if world.client.device in bridged.stdout else world.client.device


DETECTORS: dict[str, Callable[[World], dict[str, object]]] = {
    "ClusterCIDR": lambda _: {"local_sources": PREFIXES},
    "BridgeInterface": lambda world: {"local_interfaces": (_device(world),)},
    "InterfaceNamePrefix": lambda world: {"local_interfaces": (f"{_device(world)[:3]}*",)},
}
detectors = pytest.mark.parametrize("detector", list(DETECTORS))


def _seen(place: Place, family: int, vip: dict[int, str]) -> str:
    """The client as the endpoint of a ClusterIP saw it."""
    outcome = tcp_request(place, vip[family], 80)
    assert isinstance(outcome, Reply), outcome
    return outcome.peer[0]


def _own(place: Pod | Node | Client, family: int) -> str:
    return place.ip4 if family == 4 else place.ip6


@detectors
@families
def test_who_is_masqueraded_to_a_cluster_ip(world: World, detector: str, family: int) -> None:
    world.detect(**DETECTORS[detector](world))
    for vip in (VIP, NEAR_VIP):
        assert _seen(world.client, family, vip) == _own(world.client, family)
    # Masquerade takes an address of the node's; to a pod of its own, which has but the uplink's.
    for vip in (VIP, NEAR_VIP):
        assert _seen(world.outside, family, vip) == _own(world.node, family)
        assert _seen(world.node, family, vip) == _own(world.node, family)


@detectors
@families
def test_a_local_policy_binds_who_is_not_local(world: World, detector: str, family: int) -> None:
    world.detect(**DETECTORS[detector](world))

    def dial(place: Place) -> Callable[[], Outcome]:
        return lambda: tcp_request(place, LB[family], 80)

    assert answered_by(dial(world.client), times=24) == {"near", "far"}
    outcome = tcp_request(world.client, LB[family], 80)
    assert isinstance(outcome, Reply)
    assert outcome.peer[0] == _own(world.client, family)
    assert answered_by(dial(world.outside), times=24) == {"near"}
    outcome = tcp_request(world.outside, LB[family], 80)
    assert isinstance(outcome, Reply)
    assert outcome.peer[0] == _own(world.outside, family)
    assert answered_by(dial(world.node), times=24) == {"near", "far"}


@families
def test_without_a_detector_nobody_is_masqueraded_and_pods_are_outside(world: World, family: int) -> None:
    world.detect()
    assert _seen(world.client, family, VIP) == _own(world.client, family)
    assert answered_by(lambda: tcp_request(world.client, LB[family], 80), times=24) == {"near"}


@pytest.mark.parametrize(
    "interfaces", [("another0",), ("vet",), ("vetx*",), ("cbr",)], ids=["another", "a part", "another prefix", "part"]
)
def test_other_devices_are_not_local(world: World, interfaces: tuple[str, ...]) -> None:
    world.detect(local_interfaces=interfaces)
    assert _seen(world.client, 4, VIP) == world.node.ip4
    assert answered_by(lambda: tcp_request(world.client, LB[4], 80), times=24) == {"near"}


@pytest.mark.parametrize("detector", ["BridgeInterface", "InterfaceNamePrefix"])
def test_devices_may_come_and_go(detector: str) -> None:
    """Nothing is bound to a device that exists: neither when the detector is set, nor later."""
    with Lab("vcp-local") as lab:
        one, two = lab.node("one"), lab.node("two")
        far = two.flat_pod("far", "10.200.2.2", "fd00:200:0:2::2")
        lab.serve(far, tcp=[80])
        name = "veth0001" if detector == "BridgeInterface" else "veth*"
        with programmed(one) as (backend,):
            backend.put("super", service(cluster_ip(*VIP.values()), [far]), complete=True)
            backend.set_node(node_addresses=(), local_interfaces=(name,))
            first = one.flat_pod("first", "10.200.1.2", "fd00:200:0:1::2")
            assert first.device == "veth0001"
            assert _seen(first, 4, VIP) == first.ip4
            iproute([f"link delete {first.device}"], ns=one.ns)
            again = one.flat_pod("again", "10.200.1.3", "fd00:200:0:1::3")
            iproute(
                [
                    f"link set {again.device} down",
                    f"link set {again.device} name veth0001",
                    "link set veth0001 up",
                    f"route add {again.ip4} dev veth0001",
                    f"route add {again.ip6} dev veth0001",
                    f"neighbour replace {again.ip4} lladdr 02:00:00:00:00:02 dev veth0001 nud permanent",
                    f"neighbour replace {again.ip6} lladdr 02:00:00:00:00:02 dev veth0001 nud permanent",
                ],
                ns=one.ns,
            )
            assert _seen(again, 4, VIP) == again.ip4
            assert _seen(again, 6, VIP) == again.ip6


def test_a_restarted_agent_adopts_the_detector(world: World) -> None:
    world.detect(**DETECTORS["InterfaceNamePrefix"](world))
    before = world.node.run(["nft", "list", "set", "inet", "vcproxy", "local_interfaces"]).stdout
    reopened = world.backend.reopened()
    assert reopened.backend.drifted() is False
    world.backend.backend = reopened.backend
    assert world.node.run(["nft", "list", "set", "inet", "vcproxy", "local_interfaces"]).stdout == before
    assert f'0 . "{_device(world)[:3]}*"' in before
    assert _seen(world.client, 4, VIP) == world.client.ip4
