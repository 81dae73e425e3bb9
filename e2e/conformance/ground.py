"""The lab's side of conformance: the nodes, pods and clients that cases name, and where packets go without a proxy.

One node's proxy is tested. So everybody, the other node and its pods too, sends Service addresses to this node, and
what the other node's pods answer to the outside goes back through it: a connection whose source is kept is translated
back there. Addresses that nobody has and no proxy forwards go on to a machine `beyond`, which answers "host unreachable": that
is how a packet that a proxy leaves alone is told from one that it drops. (The fabric's router would say that too, but
Linux rations the errors of `unreachable` routes for the whole machine, net.ipv4.route.error_cost.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.conformance.model import FAMILIES, NODE, PODS
from tests.conformance.objects import EXTRA_CIDRS, LITERAL_CIDRS, PUBLIC_CIDRS, SERVICE_CIDRS, Cast, cast_of
from vcproxy.lab import Client, Lab, Node, Pod, Tenant, netns, wiring
from vcproxy.lab.dial import Place
from vcproxy.lab.iproute import ip

TARGETS = (8080, 8081, 8082)
"""What every endpoint listens on."""
BEYOND = (*PUBLIC_CIDRS, *EXTRA_CIDRS, *LITERAL_CIDRS)
"""Addresses that nobody has."""

_REFUSAL = "ip daddr {} reject with icmp type host-unreachable"
_REFUSAL6 = "ip6 daddr {} reject with icmpv6 type addr-unreachable"


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
            for prefix in (*SERVICE_CIDRS, *BEYOND):
                lab.route(place, prefix, via=self.here)
        for client in self.outside.values():
            lab.route(self.nodes["there"], f"{client.ip4}/32", via=self.here)
            lab.route(self.nodes["there"], f"{client.ip6}/128", via=self.here)
        self._end(lab.client("beyond", "192.168.77.202", "fd77::202"))
        lab.serve(self.here, tcp=TARGETS, udp=TARGETS, sctp=TARGETS)

    def _end(self, beyond: Client) -> None:
        netns.sysctl(beyond.ns, wiring.ROUTER_SYSCTLS)
        for prefix in BEYOND:
            self.lab.route(self.here, prefix, via=beyond)
        rules = "".join(f"add rule inet end pre {_REFUSAL.format(prefix)}\n" for prefix in BEYOND if ":" not in prefix)
        rules += "".join(f"add rule inet end pre {_REFUSAL6.format(prefix)}\n" for prefix in BEYOND if ":" in prefix)
        hook = "type filter hook prerouting priority raw; policy accept;"
        netns.run(
            beyond.ns, ["nft", "-f", "-"], stdin=f"add table inet end\nadd chain inet end pre {{ {hook} }}\n{rules}"
        )

    def second_addresses(self, cast: Cast) -> None:
        """Give this node its second addresses."""
        # Deprecated (RFC 4862): the node's own connections do not come from it; IPv4 has that order anyway.
        second = {4: "/24 dev eth0", 6: "/64 dev eth0 nodad preferred_lft 0"}
        ip([f"address add {one}{second[family]}" for family, one in cast.secondary.items()], ns=self.here.ns)
        self._own = (self.here.ip4, self.here.ip6, *cast.secondary.values())

    def listen_behind(self, ports: Sequence[int]) -> None:
        """Answer on all of the node's addresses at these ports, which only packets reach that no proxy has touched."""
        self.lab.serve(self.here, tcp=ports, udp=ports, sctp=ports, addresses=self._own)

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
            self.lab.serve(pod, tcp=TARGETS, udp=TARGETS, sctp=TARGETS)
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
