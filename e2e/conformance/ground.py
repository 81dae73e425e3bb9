"""The lab's side of conformance: the nodes, pods and clients that cases name, and where packets go without a proxy.

One node's proxy is tested. So everybody, the other node and its pods too, sends Service addresses to this node, and
what the other node's pods answer to the outside goes back through it: a connection whose source is kept is translated
back there. What nobody forwards ends at the fabric's router, which says "unreachable": that is how a packet that the
proxy leaves alone is told from one that it drops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.conformance.model import FAMILIES, NODE, PODS
from tests.conformance.objects import PUBLIC_CIDRS, SERVICE_CIDRS, Cast, cast_of
from vcproxy.lab import Client, Lab, Node, Pod, Tenant
from vcproxy.lab.dial import Place
from vcproxy.lab.iproute import ip

TARGETS = (8080, 8081, 8082)
"""What every endpoint listens on, TCP and UDP."""


class Ground:
    """See the module. `casts`: by tenant, "" for the super cluster's pods."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.nodes: Mapping[str, Node] = {"here": lab.node("one"), "there": lab.node("two")}
        self.here = self.nodes["here"]
        self.outside: Mapping[str, Client] = {
            "outside": lab.client("outside", "192.168.77.200", "fd77::200"),
            "blocked": lab.client("blocked", "192.168.77.201", "fd77::201"),
        }
        self.casts: dict[str, Cast] = {}
        self.overlays: list[Tenant] = []
        self._pods: dict[tuple[str, str], Pod] = {}
        for place in (*self.outside.values(), self.nodes["there"]):
            for prefix in (*SERVICE_CIDRS, *PUBLIC_CIDRS):
                lab.route(place, prefix, via=self.here)
        for client in self.outside.values():
            lab.route(self.nodes["there"], f"{client.ip4}/32", via=self.here)
            lab.route(self.nodes["there"], f"{client.ip6}/128", via=self.here)
        lab.serve(self.here, tcp=TARGETS, udp=TARGETS)

    def second_addresses(self, cast: Cast, node_ports: Sequence[int]) -> None:
        """Give this node its second addresses, and a server of its own on them at these ports."""
        addresses = list(cast.secondary.values())
        lines = [f"address add {address}/{24 if '.' in address else 64} dev eth0 nodad" for address in addresses]
        ip([line.replace(" nodad", "") if "." in line else line for line in lines], ns=self.here.ns)
        if node_ports:
            self.lab.serve(self.here, tcp=node_ports, udp=node_ports, addresses=addresses)

    def hold(self, addresses: Sequence[str]) -> None:
        """Put load-balancer addresses on the loopback device, as load balancers on the node do. With scope host: the
        node masquerades by its own address all the same.
        """
        ip(
            [f"address add {one}/{'32' if '.' in one else '128'} dev lo scope host" for one in addresses],
            ns=self.here.ns,
        )

    def add_super(self) -> None:
        """The super cluster's pods."""
        self._add("", {role: self._flat(role, role, number) for number, role in enumerate(PODS, start=2)})

    def add_flat(self, tenant: str) -> None:
        """A tenant's pods on the shared network, with addresses of their own."""
        first = 2 + 20 * len(self.casts)
        self._add(
            tenant,
            {role: self._flat(f"{tenant}/{role}", role, number) for number, role in enumerate(PODS, start=first)},
        )

    def add_overlay(self, tenant: str) -> None:
        """A tenant's pods on its own network, with the addresses of every other's."""
        network = self.lab.overlay_tenant(tenant, vni=100 + len(self.overlays))
        self.overlays.append(network)
        made = {
            role: self.nodes[where].overlay_pod(network, role, f"10.244.0.{number}", f"fd00:244::{number:x}")
            for number, (role, where) in enumerate(PODS.items(), start=2)
        }
        self._add(tenant, made)

    def _flat(self, name: str, role: str, number: int) -> Pod:
        node = self.nodes[PODS[role]]
        return node.flat_pod(
            name, node.pod_cidr4.replace("0/24", str(number)), node.pod_cidr6.replace("/64", f"{number:x}")
        )

    def _add(self, tenant: str, pods: Mapping[str, Pod]) -> None:
        for role, pod in pods.items():
            self.lab.serve(pod, tcp=TARGETS, udp=TARGETS)
            self._pods[tenant, role] = pod
        self.casts[tenant] = cast_of({role: {4: pod.ip4, 6: pod.ip6} for role, pod in pods.items()})
        for ip_family in FAMILIES:
            assert self.casts[tenant].address(NODE, ip_family) in (self.here.ip4, self.here.ip6)

    def place(self, tenant: str, role: str) -> Place:
        """Where a role dials from."""
        if role == NODE:
            return self.here
        return self.outside.get(role) or self._pods[tenant, role]

    def pods(self, tenant: str) -> Mapping[str, Pod]:
        return {role: self._pods[tenant, role] for role in PODS}
