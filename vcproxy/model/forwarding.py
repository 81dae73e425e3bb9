"""What one node must do for one tenant: the resolver's output and every backend's input.

A ForwardedPort is a ServicePort with this node's choices made: topology and traffic policies are resolved into at most
two pools of targets, and each frontend says which pool (or refusal) a client gets. All frontends of a service port
share the pools, so affinity is shared by them (as in kube-proxy) and a target is one kernel element however many
addresses the service has.

    client inside    a pod of the tenant, any pod of the super cluster, or the node itself
    client outside   anybody else; only public frontends (all kinds but CLUSTER_IP) can see one

Targets are packed (address, port) records, TARGET4 or TARGET6 of model.endpoints: 6 or 18 octets, sorted.
"""

import enum

import msgspec

from vcproxy.model.addresses import Prefix
from vcproxy.model.services import FrontendKind, PortKey


class Action(enum.IntEnum):
    """What happens to the first packet of a connection."""

    CLUSTER = 1  # a random target of the cluster pool
    LOCAL = 2  # a random target of the local pool
    DROP = 3  # a Local policy, targets on other nodes only
    REJECT = 4  # no usable target anywhere: ICMP port unreachable


class Masquerade(enum.IntEnum):
    """When the source address of a connection through a frontend is replaced by the node's."""

    NONLOCAL = 1  # cluster-ip: clients that are no local pod (and, by option, all)
    ALWAYS = 2  # public, external traffic policy Cluster
    HOST = 3  # public, policy Local: only for clients on the node itself, which are sent to the cluster pool


class ForwardedFrontend(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One dialled address with what to do, by client. A NODE_PORT's address is all zeros (any node address)."""

    kind: FrontendKind
    address: bytes
    port: int
    inside: Action
    outside: Action
    masquerade: Masquerade

    @property
    def family(self) -> int:
        """4 or 6."""
        return 4 if len(self.address) == 4 else 6


class ForwardedPort(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A service port as this node forwards it. A pool that no frontend uses is empty.

    `own4`, `own6`: addresses (4 or 16 octets each, packed, sorted) of targets that run on this node, for hairpin.
    `serving4`, `serving6`: UDP only, else empty: targets whose established flows stay, ready or serving anywhere,
    whatever policies and topology say (kube-proxy's conntrack reconciliation rule).
    """

    key: PortKey
    frontends: tuple[ForwardedFrontend, ...] = ()
    cluster4: bytes = b""
    cluster6: bytes = b""
    local4: bytes = b""
    local6: bytes = b""
    affinity_seconds: int = 0
    source_ranges: tuple[Prefix, ...] = ()
    own4: bytes = b""
    own6: bytes = b""
    serving4: bytes = b""
    serving6: bytes = b""

    def pool(self, action: Action, family: int) -> bytes:
        """The packed targets that an action picks from; empty for DROP and REJECT."""
        if action is Action.CLUSTER:
            return self.cluster4 if family == 4 else self.cluster6
        if action is Action.LOCAL:
            return self.local4 if family == 4 else self.local6
        return b""
