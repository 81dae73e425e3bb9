"""How nodes and pods are wired: plain functions from names and addresses to iproute2 commands. No I/O.

Pods are *routed*, as Calico does it: each pod has a veth pair of its own, its addresses are /32 and /128, its gateway
is a link-local address that nobody owns, and the node has a host route to it. No two pods share a segment. That matters
to a Service proxy: on a bridge, the answer of an endpoint to a client on the same node would go straight across and
miss the conntrack entry that has to translate it back. Neighbours are static on both sides, so there is no ARP, no
neighbour discovery, and nothing to wait for.

A *flat* pod's routes are in the node's main table. An *overlay* tenant has a table of its own, so that tenants may use
the same pod addresses on the same node; a packet is led there by the device it comes from (`rule iif`), or for probes
by the one it is sent to (`rule oif`). Between nodes the tenant's packets travel in its VXLAN `vx-TENANT`, whose peers
are static too. Devices carry the tenant's name (`vp-acme-3`, `vx-acme`): by that a node agent recognises whose packet
it sees.

One kind of packet has neither: an answer made by the node's own kernel to a tenant's packet (the ICMP error of a
`reject`, a TCP reset, a SYN-ACK of a node's socket). For these a small nftables table `lab` marks what tenants send,
the kernel reflects the mark into its answer (`fwmark_reflect`), and `rule fwmark` leads it to the tenant's table. With
VRFs the kernel would do all this by itself; many kernels lack them.
"""

from __future__ import annotations

from dataclasses import dataclass

UPLINK = "eth0"  # of nodes, pods and clients alike

POD_GATEWAY4 = "169.254.1.1"
POD_GATEWAY6 = "fe80::1"
# The two ends of every pod's link. The same everywhere: no two links meet on one segment.
GATEWAY_MAC = "02:00:00:00:00:01"
POD_MAC = "02:00:00:00:00:02"

FLAT_MTU = 1500
OVERLAY_MTU = 1450  # 1500 less IPv4, UDP, VXLAN and the inner Ethernet header (RFC 7348)
VXLAN_PORT = 4789

_REPLIES = 900  # rule preferences: behind `local` (0), before `main` (32766)
_DEVICES = 1000
_LAST_RESORT = 4278198272  # metric of `unreachable`: behind every other route (ip-route(8) uses it for the same)

Sysctls = dict[str, int]

HOST_SYSCTLS: Sysctls = {
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    "ipv4/conf/all/accept_redirects": 0,
    "ipv6/conf/all/accept_redirects": 0,
    "ipv6/conf/default/accept_redirects": 0,
    "ipv6/conf/all/disable_ipv6": 0,
    "ipv6/conf/default/disable_ipv6": 0,
    # No duplicate address detection: an address is usable at once, not a second later. Both are needed
    # (addrconf_dad_begin).
    "ipv6/conf/all/accept_dad": 0,
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/default/accept_ra": 0,
}
ROUTER_SYSCTLS: Sysctls = HOST_SYSCTLS | {
    "ipv4/ip_forward": 1,
    "ipv6/conf/all/forwarding": 1,
    "ipv4/conf/all/send_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
    # ICMP errors are answers that tests count; by default the seventh within a second is swallowed
    # (XRLIM_BURST_FACTOR).
    "ipv4/icmp_ratelimit": 0,
    "ipv6/icmp/ratelimit": 0,
    # And 50 in a burst for all receivers together (icmp_global_allow); older kernels have it for the machine only.
    "-ipv4/icmp_msgs_per_sec": 1_000_000,
    "-ipv4/icmp_msgs_burst": 1_000_000,
}
NODE_SYSCTLS: Sysctls = ROUTER_SYSCTLS | {
    "ipv4/fwmark_reflect": 1,
    "ipv6/fwmark_reflect": 1,
    "ipv4/tcp_fwmark_accept": 1,
}


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """One port of the fabric: a node's or a client's link to the data-centre network. Addresses without prefix
    length.
    """

    ns: str
    port: str
    """The device at the fabric's end."""
    ip4: str
    ip6: str


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """The data-centre network: one segment, and a router in it that everybody has as default gateway."""

    ns: str
    gateway4: str
    gateway6: str
    length4: int
    length6: int

    def build(self) -> list[str]:
        """Commands in the fabric's namespace. What the router has no route for is answered with "unreachable", so that
        a lost packet shows at once.
        """
        return [
            "link set lo up",
            "link add fabric type bridge forward_delay 0 mcast_snooping 0",
            "link set fabric up",
            f"address add {self.gateway4}/{self.length4} dev fabric",
            f"address add {self.gateway6}/{self.length6} dev fabric nodad",
            f"route add unreachable 0.0.0.0/0 metric {_LAST_RESORT}",
            f"route add unreachable ::/0 metric {_LAST_RESORT}",
        ]

    def plug(self, uplink: Uplink) -> list[str]:
        """Commands in the namespace of a node or client, that connect it; then `accept` in the fabric's."""
        return [
            "link set lo up",
            f"link add {UPLINK} type veth peer name {uplink.port} netns {self.ns}",
            f"link set {UPLINK} up",
            f"address add {uplink.ip4}/{self.length4} dev {UPLINK}",
            f"address add {uplink.ip6}/{self.length6} dev {UPLINK} nodad",
            f"route add 0.0.0.0/0 via {self.gateway4}",
            f"route add ::/0 via {self.gateway6}",
        ]

    def accept(self, uplink: Uplink) -> list[str]:
        """Commands in the fabric's namespace, behind those of `plug`."""
        return [f"link set {uplink.port} master fabric", f"link set {uplink.port} up"]


def pod(*, node_ns: str, device: str, ip4: str, ip6: str, mtu: int) -> list[str]:
    """Commands in a pod's namespace: its link to the node, where `device` is the other end, its addresses and its
    gateway.
    """
    return [
        "link set lo up",
        f"link add {UPLINK} address {POD_MAC} mtu {mtu} type veth"
        f" peer name {device} address {GATEWAY_MAC} mtu {mtu} netns {node_ns}",
        # No link-local addresses, hence no router solicitations either.
        f"link set {UPLINK} addrgenmode none",
        f"link set {UPLINK} up",
        f"address add {ip4}/32 dev {UPLINK}",
        f"address add {ip6}/128 dev {UPLINK} nodad",
        f"neighbour add {POD_GATEWAY4} lladdr {GATEWAY_MAC} dev {UPLINK} nud permanent",
        f"neighbour add {POD_GATEWAY6} lladdr {GATEWAY_MAC} dev {UPLINK} nud permanent",
        f"route add {POD_GATEWAY4}/32 dev {UPLINK} scope link",
        f"route add 0.0.0.0/0 via {POD_GATEWAY4} dev {UPLINK}",
        f"route add ::/0 via {POD_GATEWAY6} dev {UPLINK}",
    ]


def pod_port(*, device: str, ip4: str, ip6: str, table: int | None = None) -> list[str]:
    """Commands in the node's namespace, behind those of `pod`: the routes to the pod, in the main table (flat) or the
    tenant's (overlay).
    """
    where = f" table {table}" if table else ""
    return [
        f"link set {device} addrgenmode none",
        f"link set {device} up",
        f"neighbour add {ip4} lladdr {POD_MAC} dev {device} nud permanent",
        f"neighbour add {ip6} lladdr {POD_MAC} dev {device} nud permanent",
        f"route add {ip4}/32 dev {device}{where}",
        f"route add {ip6}/128 dev {device}{where}",
    ]


def flat_route(*, cidr4: str, cidr6: str, ip4: str, ip6: str) -> list[str]:
    """Commands in the namespace of a node or the fabric: the pod network of a node is behind the node's addresses."""
    return [f"route add {cidr4} via {ip4}", f"route add {cidr6} via {ip6}"]


@dataclass(frozen=True, kw_only=True)
class Vtep:
    """A node as the other nodes of an overlay see it (RFC 7348: VXLAN tunnel end point). `number` is unique in the lab,
    from 1 to 65535.
    """

    number: int
    ip4: str
    ip6: str

    @property
    def mac(self) -> str:
        """Of the node's VXLAN devices, the same for all tenants."""
        return f"02:00:00:01:{self.number >> 8:02x}:{self.number & 255:02x}"

    @property
    def gateway6(self) -> str:
        """The next hop to it. Not its node address, which IPv6 refuses to look for on another device than the uplink
        (ip6_route_check_nh_onlink).
        """
        return f"fe80::1:{self.number:x}"


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """What a tenant's network is made of on any node."""

    tenant: str
    vni: int
    table: int
    """Its routing table on every node, and the mark of its packets."""

    @property
    def vxlan(self) -> str:
        return f"vx-{self.tenant}"

    def pod_device(self, number: int) -> str:
        return f"vp-{self.tenant}-{number}"

    @property
    def interfaces(self) -> tuple[str, str]:
        """Globs that match the tenant's devices on any node and nobody else's; what a NodeConfiguration's `attachments`
        want.
        """
        return f"vp-{self.tenant}-*", self.vxlan

    def join(self, vtep: Vtep) -> list[str]:
        """Commands in the namespace of a node, once: the VXLAN device and the tenant's table.

        What the table has no route for is unreachable: it must not leak to the main table, where other tenants' flat
        pods are.
        """
        return [
            f"link add {self.vxlan} address {vtep.mac} mtu {OVERLAY_MTU} type vxlan id {self.vni} dev {UPLINK}"
            f" local {vtep.ip4} dstport {VXLAN_PORT} nolearning",
            f"link set {self.vxlan} addrgenmode none",
            f"link set {self.vxlan} up",
            f"route add unreachable 0.0.0.0/0 metric {_LAST_RESORT} table {self.table}",
            f"route add unreachable ::/0 metric {_LAST_RESORT} table {self.table}",
        ]

    def device_rules(self, device: str) -> list[str]:
        """`ip rule` commands, for each family: what comes from a device of the tenant, or is sent to it, is routed by
        the tenant's table.
        """
        return [f"rule add pref {_DEVICES} {side} {device} lookup {self.table}" for side in ("iif", "oif")]

    def reply_rules(self, *, family: int) -> list[str]:
        """`ip rule` commands: the kernel's own answers to the tenant. Not for UDP: VXLAN's outer packet inherits the
        mark of the inner one.
        """
        icmp = "icmp" if family == 4 else "ipv6-icmp"
        return [
            f"rule add pref {_REPLIES} fwmark {self.table} ipproto {protocol} lookup {self.table}"
            for protocol in (icmp, "tcp")
        ]

    def mark_rules(self) -> str:
        """nft commands: the table `lab`, and in it the mark of this tenant. Before connection tracking (-200) and raw
        (-300).
        """
        rules = [f'add rule inet lab marks iifname "{glob}" meta mark set {self.table}' for glob in self.interfaces]
        return "\n".join(
            [
                "add table inet lab",
                "add chain inet lab marks { type filter hook prerouting priority -310; policy accept; }",
                *rules,
                "",
            ]
        )

    def peer(self, vtep: Vtep) -> list[str]:
        """`ip` commands: another node of the tenant.

        Its node addresses are routed through the tenant's network as well: an answer to a masqueraded connection has to
        come back through the device, and so the conntrack zone, that the connection left by.
        """
        return [
            f"neighbour add {vtep.ip4} lladdr {vtep.mac} dev {self.vxlan} nud permanent",
            f"neighbour add {vtep.gateway6} lladdr {vtep.mac} dev {self.vxlan} nud permanent",
            *self.behind(vtep, ip4=vtep.ip4, ip6=vtep.ip6),
        ]

    def peer_forwarding(self, vtep: Vtep) -> list[str]:
        """`bridge` commands: frames to its hardware address are sent to its node address."""
        return [f"fdb append {vtep.mac} dev {self.vxlan} dst {vtep.ip4}"]

    def behind(self, vtep: Vtep, *, ip4: str, ip6: str) -> list[str]:
        """`ip` commands: the tenant has these addresses on that node."""
        return [
            f"route add {ip4}/32 via {vtep.ip4} dev {self.vxlan} onlink table {self.table}",
            f"route add {ip6}/128 via {vtep.gateway6} dev {self.vxlan} table {self.table}",
        ]
