"""Who has which address in the cluster: one table, and the routes that follow from it.

    control   10.99.0.1, fd00:99::1    the router of the nodes' network, API server, load balancers, test program
    node N    10.99.0.1N, fd00:99::1N  pods 10.244.N.0/24, fd00:10:244:N::/64

Pods have addresses of their own, and nodes route to each other's pods without a tunnel, as in a network made for it. The
control machine has one more address, outside the nodes' network: what it dials through load balancers comes from there,
as from a client in the internet.
"""

from dataclasses import dataclass

CONTROL = ("10.99.0.1", "fd00:99::1")
API_PORT = 6443
API_SERVER = f"https://{CONTROL[0]}:{API_PORT}"
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
API_SERVICE = ("10.96.0.1", "fd00:10:96::1")
DNS_SERVICE = "10.96.0.10"
POD_CIDRS = ("10.244.0.0/16", "fd00:10:244::/56")
LOAD_BALANCERS = ("10.98.0.0/24", "fd00:98::/64")
OUTSIDE = ("10.97.0.1", "fd00:97::1")
"""The control machine's address as a client from outside."""

NODE_SYSCTLS = {
    "ipv4/ip_forward": 1,
    "ipv6/conf/all/forwarding": 1,
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    "ipv6/conf/all/accept_dad": 0,
    "ipv6/conf/default/accept_dad": 0,
}
CONTROL_SYSCTLS = NODE_SYSCTLS | {
    # Connections, not clients, are spread over a load balancer's nodes.
    "ipv4/fib_multipath_hash_policy": 1,
    "ipv6/fib_multipath_hash_policy": 1,
}


@dataclass(frozen=True)
class NodeAddresses:
    """What node number 1 to 9 has."""

    number: int

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def zone(self) -> str:
        return f"zone-{(self.number - 1) % 3 + 1}"

    @property
    def addresses(self) -> tuple[str, str]:
        return f"10.99.0.1{self.number}", f"fd00:99::1{self.number}"

    @property
    def pod_cidrs(self) -> tuple[str, str]:
        return f"10.244.{self.number}.0/24", f"fd00:10:244:{self.number}::/64"

    def uplink(self, control_pid: int) -> list[str]:
        """`ip` commands on the node: its link to the control machine, whose end is named as the node."""
        own4, own6 = self.addresses
        return [
            f"link add eth0 type veth peer name {self.name} netns {control_pid}",
            "link set lo up",
            "link set eth0 up",
            f"address add {own4}/24 dev eth0",
            f"address add {own6}/64 dev eth0 nodad",
            f"route add 0.0.0.0/0 via {CONTROL[0]}",
            f"route add ::/0 via {CONTROL[1]}",
        ]

    def accept(self) -> list[str]:
        """`ip` commands on the control machine, behind those of `uplink`."""
        return [f"link set {self.name} master nodes up", *self.routes()]

    def routes(self) -> list[str]:
        """`ip` commands anywhere else in the nodes' network: the way to this node's pods."""
        return [f"route add {cidr} via {via}" for cidr, via in zip(self.pod_cidrs, self.addresses, strict=True)]


def control_links() -> list[str]:
    """`ip` commands on the control machine, before any node is there."""
    return [
        "link set lo up",
        f"address add {OUTSIDE[0]}/32 dev lo",
        f"address add {OUTSIDE[1]}/128 dev lo",
        "link add nodes type bridge forward_delay 0 mcast_snooping 0",
        "link set nodes up",
        f"address add {CONTROL[0]}/24 dev nodes",
        f"address add {CONTROL[1]}/64 dev nodes nodad",
        # What is sent to a load balancer that has no node vanishes, as in a cloud. Not a blackhole route, with which
        # connect(2) fails at once: a bridge without ports, on which nobody is asked for a hardware address.
        "link add void type bridge",
        "link set void arp off up",
        *(f"route add {cidr} dev void" for cidr in LOAD_BALANCERS),
    ]
