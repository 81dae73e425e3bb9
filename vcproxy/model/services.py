"""Service ports and their frontends: the unit that Kubernetes balances, compiled and canonical.

A ServicePort says all that any node may need about one (namespace, service, port name, protocol). It is immutable and
canonical: equal meaning gives equal fields and so an equal digest, whatever the order in which objects arrived.
"""

import enum
from typing import NamedTuple

import msgspec

from vcproxy.model.addresses import Prefix
from vcproxy.model.endpoints import HintSet


class Protocol(enum.IntEnum):
    """Numbers as in the IP header (IANA), so that they go into kernel keys as they are."""

    TCP = 6
    UDP = 17
    SCTP = 132


class FrontendKind(enum.IntEnum):
    """How a client came to know the address it dials. CLUSTER_IP is private to its tenant; the others are public."""

    CLUSTER_IP = 1
    EXTERNAL_IP = 2
    LOAD_BALANCER = 3
    NODE_PORT = 4


class PortKey(NamedTuple):
    """Identity of a service port inside its tenant. `port` is the port's name, "" if it has none."""

    namespace: str
    service: str
    port: str
    protocol: Protocol

    def __str__(self) -> str:
        name = f"{self.namespace}/{self.service}"
        return f"{name}:{self.port}/{self.protocol.name}" if self.port else f"{name}/{self.protocol.name}"


class Frontend(msgspec.Struct, frozen=True, gc=False, array_like=True, order=True):
    """One address that a client dials: 4 or 16 octets and a port 1..65535.

    For NODE_PORT the address is all zeros: "any node address of this family".
    """

    kind: FrontendKind
    address: bytes
    port: int

    @property
    def family(self) -> int:
        """4 or 6."""
        return 4 if len(self.address) == 4 else 6


class ServicePort(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One service port with everything nodes need. Sorted tuples; packed endpoints as model.endpoints describes.

    `internal_local`, `external_local`: the traffic policies are Local. `affinity_seconds`: 0 for none, else the
    ClientIP timeout. `source_ranges`: loadBalancerSourceRanges; they gate LOAD_BALANCER frontends only.
    `health_check_node_port`: where each node tells a load balancer whether it has endpoints of the Service, 0: nowhere;
    the same for all ports of a Service, and only with `external_local`.
    """

    key: PortKey
    frontends: tuple[Frontend, ...] = ()
    internal_local: bool = False
    external_local: bool = False
    affinity_seconds: int = 0
    source_ranges: tuple[Prefix, ...] = ()
    hint_sets: tuple[HintSet, ...] = ()
    endpoints4: bytes = b""
    endpoints6: bytes = b""
    health_check_node_port: int = 0

    @property
    def families(self) -> tuple[int, ...]:
        """4, 6 or both: the families in which it can be dialled."""
        return tuple(sorted({frontend.family for frontend in self.frontends}))

    def leads_to(self, address: bytes) -> bool:
        """False only if no endpoint has this address: a quick look at the octets, wherever in a record they lie."""
        return address in (self.endpoints4 if len(address) == 4 else self.endpoints6)

    def same_but_endpoints(self, other: "ServicePort") -> bool:
        """True if the two differ at most in endpoints: then a patch of endpoints tells the whole difference."""
        return (
            self.key == other.key
            and self.frontends == other.frontends
            and self.internal_local == other.internal_local
            and self.external_local == other.external_local
            and self.affinity_seconds == other.affinity_seconds
            and self.source_ranges == other.source_ranges
            and self.hint_sets == other.hint_sets
            and self.health_check_node_port == other.health_check_node_port
        )
